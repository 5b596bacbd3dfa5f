"""Runs of `lab.pretrain` side by side: what a token costs in the cache of each architecture, and what loss it buys.

An *arm* is an attention with its arguments, as `attention.words` writes it. Rows are of two kinds:

    of runs          arm, attention, rank, variant, seed, params, cache_bytes_per_token, cache_ratio, formula_ratio, tokens, matrix_lr,
                     per_head, test_loss (at the first training length), test_loss_N (at the others), bits_per_byte, steps_to_mha,
                     step_ms, train_seconds, gpu (None on a CPU), decoding (see `attention.equality`)
    of comparisons   arm, against, seeds, difference (of test_loss), low, high, over_windows [2], over_seeds [2] or None

Differences are paired. Windows say how sure we are of these weights, seeds how sure of the architecture; `low` and `high` are of the
wider interval. steps_to_mha is the share of the steps after which the test loss is MHA's last. It trains nothing.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvstack.attention import DecoderConfig, words
from kvstack.errors import BadInputError
from kvstack.eval import page
from kvstack.eval.metrics import mean
from kvstack.eval.page import Table

Row = dict[str, Any]
Run = dict[str, Any]  # what pretrain.json holds
SHARED = ("width", "layers", "heads", "head_dim", "feed_forward", "rope_theta", "tokens", "batch", "lengths", "looks")
CURVE = ("step", "tokens", "loss", "ms", "tuning", "test", "seconds")
LOSSES = ("test loss (nats a token)", "test loss (nats a token)", "test loss less MHA's of the same seed")
NOTE = (
    "Brackets are 95 % intervals; of arms over seeds, of differences the wider of those over windows and over seeds. "
    "Cache and its formula are shares of MHA's bytes. Decoding: relative differences of its logits from those of the forward; the last "
    "but one column is the forward's own difference between bfloat16 and float32, the last in nats."
)


def read_run(folder: Path) -> Run:
    """The finished run in `folder`. Raises BadInputError, naming the folder, when there is none."""
    try:
        run: Run = json.loads((folder / "pretrain.json").read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise BadInputError(f"{folder} is not the folder of a run. Make one with `kvstack lab pretrain --out {folder}`.") from e
    if "test_losses" not in run:
        raise BadInputError(f"The run {folder} is not finished. Go on with --resume, or leave it out.")
    if not {"decoding", "environment"} <= run.keys():
        raise BadInputError(f"The run {folder} is of an older version, which kept less. Train it again, or leave it out.")
    return run


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in `folders`, checked to be comparable. Raises BadInputError, naming the folder, when one is not."""
    runs: list[Run] = []
    for folder in folders:
        run = read_run(folder)
        if len(_losses(run)) < 2:
            raise BadInputError(f"The run {folder} has one test window, which has no interval. Use a longer test text.")
        for other, name in zip(runs, folders, strict=False):
            _check_pair(run, folder, other, name)
        runs.append(run)
    for seed in sorted({r["config"]["seed"] for r in runs}):
        if not any(_is_mha(r) and r["config"]["seed"] == seed for r in runs):
            raise BadInputError(f"There is no MHA run of seed {seed} to compare with. Train one, or leave out that seed.")
    return runs


def _check_pair(run: Run, name: Path, other: Run, other_name: Path) -> None:
    a, b = run["config"], other["config"]
    differing = [key for key in SHARED if a[key] != b[key]] + [key for key in ("corpus",) if run[key] != other[key]]
    if a["seed"] == b["seed"] and a["data_seed"] != b["data_seed"]:
        differing.append("data_seed")
    if differing:
        raise BadInputError(f"The runs {other_name} and {name} differ in {', '.join(differing)}. Compare runs that share them.")
    if arm(run) == arm(other) and a["seed"] == b["seed"]:
        raise BadInputError(f"The runs {other_name} and {name} are both {arm(run)} of seed {a['seed']}. Leave one out.")


def arm(run: Run) -> str:
    """The architecture of a run, as a word."""
    return words.name(run["config"]["attention"])


def _is_mha(run: Run) -> bool:
    return bool(run["config"]["attention"]["attention"] == "mha")


def _losses(run: Run) -> list[float]:
    """Of the test windows of the first training length."""
    return list(run["test_losses"][str(run["config"]["lengths"][0][1])])


def steps_to(curve: Sequence[Row], loss: float) -> float | None:
    """The first step at which the test loss of a curve is at or below `loss`, between looks on a straight line; None when never."""
    at = next((i for i, row in enumerate(curve) if row["test"] <= loss), None)
    if at is None or at == 0:
        return None if at is None else float(curve[0]["step"])
    a, b = curve[at - 1], curve[at]
    return float(a["step"] + (b["step"] - a["step"]) * (a["test"] - loss) / (a["test"] - b["test"]))


def run_rows(runs: Sequence[Run]) -> list[Row]:
    """A row for every run, see the module; the largest caches first."""
    mha = {r["config"]["seed"]: r for r in runs if _is_mha(r)}
    rows = [_run_row(run, mha[run["config"]["seed"]]) for run in runs]
    return sorted(rows, key=lambda r: (-r["cache_bytes_per_token"], r["arm"], r["seed"]))


def _run_row(run: Run, mha: Run) -> Row:
    cfg, curve = run["config"], run["curve"]
    fields, first = cfg["attention"], cfg["lengths"][0][1]
    numbers, of_mha = (
        DecoderConfig(hidden_size=cfg["width"], num_attention_heads=cfg["heads"], head_dim=cfg["head_dim"], **f).cache_numbers
        for f in (fields, {"attention": "mha"})
    )
    is_lrkv, loss, steps = fields["attention"] == "lrkv", statistics.fmean(_losses(run)), steps_to(curve, mha["curve"][-1]["test"])
    return {
        "arm": arm(run),
        "attention": fields["attention"],
        "rank": fields["rank"] if is_lrkv else None,
        "variant": fields.get("variant", "exact") if is_lrkv else None,
        "seed": cfg["seed"],
        "params": run["parameters"],
        "cache_bytes_per_token": run["cache_bytes_per_token"],
        "cache_ratio": run["cache_bytes_per_token"] / mha["cache_bytes_per_token"],
        "formula_ratio": numbers / of_mha,
        "tokens": cfg["tokens"],
        "matrix_lr": cfg["matrix_lr"],
        "per_head": cfg["per_head"],
        "test_loss": loss,
        **{f"test_loss_{n}": statistics.fmean(losses) for n, losses in run["test_losses"].items() if int(n) != first},
        "bits_per_byte": loss / math.log(2) / run["corpus"]["bytes_per_token"],
        "steps_to_mha": None if steps is None else steps / curve[-1]["step"],
        "step_ms": statistics.median(r["ms"] for r in curve),
        "train_seconds": run["seconds"],
        "gpu": (run["environment"]["gpu"] or {}).get("name"),
        "decoding": run["decoding"],
    }


def comparisons(runs: Sequence[Run]) -> list[Row]:
    """A row for every LRKV arm and every other architecture whose cache is as large or larger, over the seeds that both have."""
    arms: dict[str, dict[int, Run]] = {}
    for run in runs:
        arms.setdefault(arm(run), {})[run["config"]["seed"]] = run
    size = {name: next(iter(own.values()))["cache_bytes_per_token"] for name, own in arms.items()}
    ours = [name for name in arms if words.read(name)["attention"] == "lrkv"]
    pairs = [(a, b) for a in ours for b in arms if b not in ours and size[b] >= size[a] and arms[a].keys() & arms[b].keys()]
    return [_compared(a, b, arms[a], arms[b]) for a, b in sorted(pairs, key=lambda p: (-size[p[0]], p[0], -size[p[1]], p[1]))]


def _compared(name: str, rival: str, own: dict[int, Run], its: dict[int, Run]) -> Row:
    seeds = sorted(own.keys() & its.keys())
    differences = np.array([np.subtract(_losses(own[s]), _losses(its[s])) for s in seeds])  # [seeds, windows]
    found = [mean(list(differences.mean(0)))] + ([mean(list(differences.mean(1)))] if len(seeds) > 1 else [])
    widest = max(found, key=lambda e: e.high - e.low)
    windows, over_seeds = ([e.low, e.high] for e in (found[0], found[-1]))
    return {
        "arm": name, "against": rival, "seeds": len(seeds), "difference": widest.mean, "low": widest.low, "high": widest.high,
        "over_windows": windows, "over_seeds": over_seeds if len(seeds) > 1 else None,
    }  # fmt: skip


def curve_rows(runs: Sequence[Run]) -> list[Row]:
    """The curves, `{arm, seed, curve: {column: [values]}}`, to four decimals."""
    return [
        {"arm": arm(r), "seed": r["config"]["seed"], "curve": {key: [round(row[key], 4) for row in r["curve"]] for key in CURVE}}
        for r in runs
    ]


def are_mine(rows: Sequence[Row]) -> bool:
    """Whether these are rows of this module."""
    return {"arm", "steps_to_mha"} <= rows[0].keys()


def tables(rows: Sequence[Row]) -> list[Table]:
    """A line for every arm, means over its seeds, and one for every comparison."""
    compared, arms = [r for r in rows if "against" in r], _by_arm(rows)
    lengths = [key for key in rows[0] if key.startswith("test_loss_")]
    at = [f"at {int(key.rpartition('_')[2]):,}" for key in lengths]
    head = ("arm", "cache %", "formula %", "bytes/token", "parameters", "seeds", "loss", *at, "bits/byte", "steps %", "ms a step", "on")
    out = [Table("architectures", head, [_arm_cells(name, own, lengths) for name, own in arms.items()])]
    head = ("arm", "in float32", "in bfloat16", "cached in bfloat16", "forward in bfloat16", "loss in bfloat16")
    out.append(Table("decoding against the forward", head, [_decoding_cells(name, own) for name, own in arms.items()]))
    if compared:
        head = ("arm", "against", "seeds", "difference", "over windows", "over seeds")
        out.append(Table("test loss less that of others", head, [_compared_cells(r) for r in compared]))
    return out


def _by_arm(rows: Iterable[Row]) -> dict[str, list[Row]]:
    out: dict[str, list[Row]] = {}
    for row in rows:
        if "against" not in row:
            out.setdefault(row["arm"], []).append(row)
    return out


def _arm_cells(name: str, own: Sequence[Row], lengths: Sequence[str]) -> tuple[str, ...]:
    row, steps = own[0], [r["steps_to_mha"] for r in own]
    e = mean([r["test_loss"] for r in own])
    return (
        name,
        f"{100 * row['cache_ratio']:.1f}",
        f"{100 * row['formula_ratio']:.1f}",
        f"{row['cache_bytes_per_token']:,.0f}",
        f"{row['params']:,}",
        str(len(own)),
        f"{e.mean:.4f}" + (f" {_brackets(e.low, e.high, '.4f')}" if len(own) > 1 else ""),
        *(f"{statistics.fmean(r[key] for r in own):.4f}" for key in lengths),
        f"{statistics.fmean(r['bits_per_byte'] for r in own):.4f}",
        "never" if None in steps else f"{100 * statistics.fmean(steps):.1f}",
        f"{statistics.median(r['step_ms'] for r in own):.1f}",
        ", ".join(sorted({(r["gpu"] or "CPU").removeprefix("NVIDIA ") for r in own})),
    )


def _decoding_cells(name: str, own: Sequence[Row]) -> tuple[str, ...]:
    """Relative differences of logits, and the loss in nats: of the seed in which they are largest."""
    found = [[r["decoding"][key] for r in own] for key in ("float32", "bfloat16", "bfloat16_stored", "bfloat16_forward")]
    loss = max((r["decoding"]["bfloat16_loss"] for r in own), key=abs)
    return name, *("-" if None in values else f"{max(values):.1e}" for values in found), f"{loss:+.1e}"


def _compared_cells(r: Row) -> tuple[str, ...]:
    difference = f"{r['difference']:+.4f} {_brackets(r['low'], r['high'])}"
    over = (_brackets(*r["over_windows"]), _brackets(*r["over_seeds"]) if r["over_seeds"] else "-")
    return r["arm"], r["against"], str(r["seeds"]), difference, *over


def _brackets(low: float, high: float, form: str = "+.4f") -> str:
    return f"[{low:{form}}, {high:{form}}]"


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (bytes, loss) those below which, with as few bytes, there is none; fewest bytes first."""
    out: list[tuple[float, float]] = []
    for point in sorted(points):
        if not out or point[1] < out[-1][1]:
            out.append(point)
    return out


def cache_figure(rows: Sequence[Row], title: str) -> Any:
    """Test loss against cache bytes: a point for every arm, from its best seed to its worst, and a line through the best arms."""
    from matplotlib.figure import Figure

    fig: Any = Figure(figsize=(8.5, 5.2), layout="constrained")
    ax = fig.add_subplot()
    points: list[tuple[float, float]] = []
    for name, own in _by_arm(rows).items():
        losses, x = [r["test_loss"] for r in own], own[0]["cache_bytes_per_token"]
        y = statistics.fmean(losses)
        taken = any(x == u and abs(y - v) < 0.002 for u, v in points)
        points.append((x, y))
        ax.errorbar(x, y, [[y - min(losses)], [max(losses) - y]], fmt="o", color=_colour(own[0]), capsize=3, label=name)
        ax.annotate(name, (x, y), xytext=(6, -12 if taken else 4), textcoords="offset points", fontsize=8)
    ax.step(*zip(*pareto(points), strict=True), where="post", color="0.7", zorder=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.set_xlabel("measured cache bytes per token (all layers)")
    ax.set_ylabel("test loss (nats a token)")
    ax.margins(x=0.18)
    ax.grid(alpha=0.25)
    fig.suptitle(title, x=0.01, ha="left", fontsize=12)
    return fig


def curve_figure(rows: Sequence[Row], curves: Sequence[Row], title: str) -> Any:
    """Test loss while training, against tokens and seconds, and less MHA's of the same seed: the best arm of every architecture."""
    from matplotlib.figure import Figure

    best: dict[tuple[str, str | None], tuple[float, str, Row]] = {}
    for name, own in _by_arm(rows).items():
        key, loss = (own[0]["attention"], own[0]["variant"]), statistics.fmean(r["test_loss"] for r in own)
        best[key] = min(best.get(key, (math.inf, name, own[0])), (loss, name, own[0]), key=lambda b: b[0])
    mha = {c["seed"]: c["curve"]["test"] for c in curves if c["arm"] == "mha"}
    # What happens in the first quarter is the same everywhere, and would flatten the rest.
    first = len(curves[0]["curve"]["test"]) // 4
    fig: Any = Figure(figsize=(14, 4.6), layout="constrained")
    axes = fig.subplots(1, 3)
    for _, name, row in best.values():
        for i, curve in enumerate(c for c in curves if c["arm"] == name):
            held, style = curve["curve"], {"color": _colour(row), "linewidth": 1.2, "label": None if i else name}
            tokens, loss = [n / 1e6 for n in held["tokens"][first:]], held["test"][first:]
            axes[0].plot(tokens, loss, **style)
            axes[1].plot(held["seconds"][first:], loss, **style)
            axes[2].plot(tokens, np.subtract(loss, mha[curve["seed"]][first:]), **style)
    for ax, x, y in zip(axes, ("million tokens", "seconds, with looks and compilation", "million tokens"), LOSSES, strict=True):
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        ax.grid(alpha=0.25)
    axes[0].legend(fontsize=8, frameon=False)
    fig.suptitle(title, x=0.01, ha="left", fontsize=12)
    return fig


def _colour(row: Row) -> str:
    kinds = ("mha", "gqa", "mqa", "mla", "csa", "hca", "lrkv")
    return f"C{kinds.index(row['attention']) + (row['variant'] == 'nope')}"


def write_plots(rows: Sequence[Row], curves: Sequence[Row], title: str, stem: Path) -> list[Path]:
    """Write `stem.png`, `stem-curves.png` and `stem.html` (tables and pictures in one file) and return their paths."""
    figures = {"": cache_figure(rows, title), "-curves": curve_figure(rows, curves, title)}
    return page.write(stem, title, figures, tables(rows), NOTE)
