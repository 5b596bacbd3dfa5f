"""`kvstack inspect`: what a profile says of a model's queries: how concentrated they are, and which distances they prefer.

Concentration R of a band is the length of the mean query over the mean length of queries (`Profile.concentration`): 1 when all queries
of the head agree on the band's phase. The dominant band of a head is its longest. Where R is near 1, the logit of a key depends on its
distance d alone. The preference drawn is that of a key along the mean query m of a head: sum_f |m_f|^2 cos(d w_f) / sum_f |m_f|^2,
which is 1 at distance 0 (TriAttention, arXiv 2604.04921). All of it is in the profile: no model runs.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvstack import artefact
from kvstack.errors import BadInputError
from kvstack.eval import page
from kvstack.lab.registry import folder
from kvstack.profile import Profile

EXAMPLES = """
kvstack inspect bundled
kvstack inspect out/qwen3/profile.safetensors --plot out/qwen3/queries --layer 12
"""

FARTHEST = 65536
OCTAVE = 4  # points of a curve from a distance to its double
FEW = 8  # heads that are told apart by colour; cells a side that are labelled


def inspect(
    profile: Annotated[str, typer.Argument(help="A profile, a folder with profile.safetensors, or `bundled`.")],
    plot: Annotated[Path | None, typer.Option(help="Write a plot: this path with .png and .html.")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="The layer whose preferences are drawn; the most concentrated one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of a table.")] = False,
) -> None:
    """Show how concentrated a model's queries are, layer by layer, and which distances they prefer."""
    path = folder(profile)
    if path.is_dir():  # of a profile, or of a model that has one
        path = next((p for p in (path / "profile.safetensors", path / "profile" / "profile.safetensors") if p.is_file()), path)
    found = Profile.load(path)
    rows = _rows(found)
    if not rows:
        raise BadInputError(f"{profile} has no statistics of queries. Calibrate again with `kvstack calibrate`.")
    layers = [row["layer"] for row in rows]
    if layer is None:
        layer = max(rows, key=lambda row: float(row["dominant"]))["layer"]
    if layer not in layers:
        raise BadInputError(f"--layer {layer} was not calibrated. Give one of {', '.join(map(str, layers))}.")
    if plot:
        artefact.check_folder(plot.parent)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        table = Table(title=f"{profile}: concentration R of queries, {found.tokens:,} tokens", title_justify="left")
        for name in _cells(rows[0]):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*_cells(row).values())
        Console(width=max(Console().width, 100)).print(table)
    for written in _write_plot(found, rows, profile, layer, plot) if plot else ():
        Console(stderr=as_json).print(f"wrote {written}", soft_wrap=True, highlight=False)


def _dominant(profile: Profile) -> Tensor:
    """Concentration `[L, Hq]` at each head's longest band."""
    return profile.concentration().gather(-1, profile.query_norm.argmax(-1, keepdim=True))[..., 0]


def _rows(profile: Profile) -> list[dict[str, Any]]:
    """A row per calibrated layer: mean R over all bands, R at the dominant band (mean of heads), shares of heads where that is high."""
    rows = []
    for i, (r, dominant, norm) in enumerate(zip(profile.concentration(), _dominant(profile), profile.query_norm, strict=True)):
        if norm.any():
            shares = {f"above_{x:.2f}": float((dominant > x).float().mean()) for x in (0.9, 0.95)}
            rows.append({"layer": i, "mean": float(r.mean()), "dominant": float(dominant.mean()), **shares})
    return rows


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """What is shown of a row, by the heads of the columns."""
    return {
        "layer": str(row["layer"]),
        "mean of bands": f"{row['mean']:.3f}",
        "dominant band": f"{row['dominant']:.3f}",
        "heads > .90": f"{100 * row['above_0.90']:.0f} %",
        "heads > .95": f"{100 * row['above_0.95']:.0f} %",
    }


def _preference(profile: Profile, layer: int) -> tuple[Tensor, Tensor]:
    """Distances `[N]` up to 65536, evenly on a log axis, and the preference `[Hq, N]` of every head; see the module.

    Each point is the exact mean over the whole distances up to the next, so that fast bands fade and do not alias: of cos(d w) over
    d = a, ..., a + n - 1 that is sin(n w / 2) / (n sin(w / 2)) cos((a + (n - 1) / 2) w).
    """
    steps = torch.arange(OCTAVE * (FARTHEST.bit_length() - 1) + 1, dtype=torch.float64)
    edge = (2 ** (steps / OCTAVE)).round().unique()
    n, middle = edge.diff(), (edge[1:] + edge[:-1] - 1) / 2
    w = profile.rope_frequency.double().clamp_min(1e-12)
    wave = torch.sin(n[:, None] * w / 2) / (n[:, None] * torch.sin(w / 2)) * torch.cos(middle[:, None] * w)  # [N, F]
    power = (profile.query_mean_real[layer] ** 2 + profile.query_mean_imag[layer] ** 2).double()
    return middle, (power / power.sum(-1, keepdim=True).clamp_min(1e-30)) @ wave.T


def _figure(profile: Profile, rows: list[dict[str, Any]], title: str, layer: int) -> Any:
    """Concentration of every head at its dominant band, and the distances that the heads of `layer` prefer."""
    from matplotlib.figure import Figure

    fig: Any = Figure(figsize=(13, 4.6), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=[1, 1.5])
    layers = [row["layer"] for row in rows]
    dominant = _dominant(profile)[layers].numpy()
    image = left.imshow(dominant, aspect="auto", cmap="viridis", vmin=min(0.8, float(dominant.min())), vmax=1)
    if max(dominant.shape) <= FEW:
        for (y, x), r in np.ndenumerate(dominant):
            left.text(x, y, f"{r:.2f}", ha="center", va="center", fontsize=9, color="white" if image.norm(r) < 0.6 else "black")
    left.set_title("Concentration at each head's dominant band", loc="left", fontsize=11)
    left.set_xlabel("query head")
    left.set_ylabel("layer")
    step = -(-len(layers) // 16)
    left.set_yticks(range(0, len(layers), step), layers[::step])
    left.xaxis.get_major_locator().set_params(integer=True)
    fig.colorbar(image, ax=left, label="R")
    distance, wanted = (t.numpy() for t in _preference(profile, layer))
    few = len(wanted) <= FEW
    for head, (curve, r) in enumerate(zip(wanted, dominant[layers.index(layer)], strict=True)):
        colour = f"C{head}" if few else image.cmap(image.norm(r))
        right.plot(distance, curve, color=colour, lw=1.6 if few else 1, alpha=1 if few else 0.6, label=f"head {head}" if few else None)
    if not few:
        right.plot(distance, wanted.mean(0), color="black", lw=2.5, label=f"mean of the {len(wanted)} heads, coloured by R")
    right.axhline(0, color="0.6", lw=0.8, zorder=0)
    right.set_xscale("log", base=2)
    right.set_xlim(1, FARTHEST)
    ticks = [4**i for i in range(9)]
    right.set_xticks(ticks, [f"{t:,}" for t in ticks])
    right.set_ylim(min(-0.1, 1.1 * float(wanted.min())), 1.03)
    right.set_title(f"Distances that the heads of layer {layer} prefer", loc="left", fontsize=11)
    right.set_xlabel("distance from query to key (tokens)")
    right.set_ylabel("logit of a key along the mean query (1 at distance 0)")
    right.grid(alpha=0.25)
    right.legend(fontsize=9, frameon=not few, loc="upper right")
    fig.suptitle(title, x=0.01, ha="left", fontsize=12)
    return fig


def _write_plot(profile: Profile, rows: list[dict[str, Any]], name: str, layer: int, stem: Path) -> list[Path]:
    """Write `stem.png`, and `stem.html` with picture and table in one file."""
    title = f"Queries of {name} before RoPE, {profile.tokens:,} tokens"
    cells = [_cells(row) for row in rows]
    shown = page.Table("", tuple(cells[0]), [tuple(c.values()) for c in cells])
    note = (
        "R is the length of the mean query over the mean length of queries, band by band. "
        f"Fingerprint of the model {profile.fingerprint}; text: {profile.source}."
    )
    return page.write(stem, title, {"": _figure(profile, rows, title, layer)}, [shown], note)
