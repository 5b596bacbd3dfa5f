"""Rows of `bench serve` for people: tables for the terminal, and a picture.

Every number has a factor beside it, how many times that of vLLM's own cache in bf16 it is, of the same kind at the same point: the same
rows and tokens, or as many rows as fit of the same tokens. Above 1 is faster, or holds more.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from kvstack import artefact
from kvstack.bench.report import COLOURS, OTHER, OWN

Row = dict[str, Any]
Point = tuple[str, int | None, int | None]  # kind, B, N
BASE = ("vLLM", "bf16")
MORE = {  # kinds, and the field of which more is better
    "capacity": "capacity_tokens", "largest": "tokens_per_s", "generation": "tokens_per_s", "step": "tokens_per_s",
    "prefill": "prefill_tokens_per_s",
}  # fmt: skip


def point(r: Row) -> Point:
    """What a row is compared at. Batches that are as large as fits differ, and are compared with each other."""
    return r["kind"], r["B"] if r["kind"] in ("step", "prefill") else None, r["N"]


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows with numbers and one of kind `capacity` for every engine: kind by kind, bf16 first and ours last."""
    rows = list(rows)
    held = {_engine(r): r | {"kind": "capacity", "B": None, "N": None} for r in rows if "capacity_tokens" in r}
    found = [*held.values(), *(r for r in rows if r["kind"] in MORE and "reason" not in r)]
    kinds = list(MORE)
    return sorted(found, key=lambda r: (kinds.index(r["kind"]), r["engine"] != BASE[0], _engine(r) != BASE))


def factor(r: Row, rows: Sequence[Row]) -> float | None:
    """How many times bf16's a row of `measured` rows is; None where bf16 was not measured."""
    field = MORE[r["kind"]]
    return next((r[field] / other[field] for other in rows if _engine(other) == BASE and point(other) == point(r)), None)


def tables(rows: Sequence[Row]) -> list[Table]:
    """What fits and what largest batches do; steps; prompts. Those of which there are rows."""
    found = measured(rows)
    each = [_largest(found), _points(found, "step", "Decode steps"), _points(found, "prefill", "Prompts")]
    return [table for table in each if table.row_count]


def left_out(rows: Sequence[Row]) -> list[str]:
    """A line for everything that was not measured, and why."""
    lines = []
    for r in rows:
        if "reason" in r:
            at = "" if r["N"] is None else f", {r['kind']}, {_shape(r)}"
            lines.append(f"{r['engine']}, {r['kv']}{at}: not measured: {r['reason']}")
    return list(dict.fromkeys(lines))


def _engine(r: Row) -> tuple[str, str]:
    return r["engine"], r["kv"]


def _shape(r: Row) -> str:
    return f"{r['B']} x {r['N']:,}"


def _largest(found: Sequence[Row]) -> Table:
    """A line for every engine."""
    kinds = ("capacity", "largest", "generation")
    cells = {(_engine(r), point(r)): r for r in found if r["kind"] in kinds}
    columns = list(dict.fromkeys(at for _, at in cells))
    title = "Tokens that fit; as many rows as fit, over N tokens, and each from nothing to N"
    heads = []
    for kind, _, n in columns:
        rows = f"rows {'over' if kind == 'largest' else 'to'} {n:,}" if n else ""
        heads += ["tokens that fit", "x bf16"] if kind == "capacity" else [rows, "tokens/s", "x bf16"]
    lines = []
    for engine in dict.fromkeys(engine for engine, _ in cells):
        line: list[str] = []
        for at in columns:
            r = cells.get((engine, at))
            if at[0] != "capacity":
                line.append("-" if r is None else str(r["B"]))
            line += ["-", "-"] if r is None else [f"{r[MORE[r['kind']]]:,.0f}", _times(r, found)]
        lines.append((engine, line))
    return _table(title, heads, lines)


def _points(found: Sequence[Row], kind: str, title: str) -> Table:
    """A line for every row of one kind, point by point."""
    rows = [r for r in found if r["kind"] == kind]
    order = list(dict.fromkeys(point(r) for r in rows))
    rows.sort(key=lambda r: order.index(point(r)))
    numbers: dict[str, Callable[[Row], str]] = {
        "rows x tokens": _shape,
        **({"ms a step": lambda r: f"{r['ms_per_step']:.2f}"} if kind == "step" else {}),
        "tokens/s": lambda r: f"{r[MORE[kind]]:,.0f}",
        "x bf16": lambda r: _times(r, found),
    }
    return _table(title, list(numbers), [(_engine(r), [cell(r) for cell in numbers.values()]) for r in rows])


def _table(title: str, heads: Sequence[str], lines: Sequence[tuple[tuple[str, str], list[str]]]) -> Table:
    out = Table(title=title, title_justify="left", min_width=len(title))
    for i, head in enumerate(("engine", "kv", *heads)):
        out.add_column(head, justify="left" if i < 2 else "right", no_wrap=True)
    for (engine, kv), line in lines:
        out.add_row(engine, kv, *line, style=None if engine == BASE[0] else "bold")
    return out


def _times(r: Row, found: Sequence[Row]) -> str:
    times = factor(r, found)
    return "-" if times is None else f"{times:.2f}"


def figure(rows: Sequence[Row], title: str) -> Any:
    """A panel for what fits, for every largest batch and generation, and for every step that all engines with steps were timed at; in
    each a bar for every engine."""
    from matplotlib.figure import Figure

    found = measured(rows)
    engines = list(dict.fromkeys(_engine(r) for r in [*found, *rows]))  # also those that failed
    panels = _panels(found)
    columns = max(1, min(4, len(panels)))
    lines = -(-max(1, len(panels)) // columns)
    fig: Any = Figure(figsize=(3.3 * columns + 1.2, (0.5 * len(engines) + 1.0) * lines + 0.5), layout="constrained")
    axes = fig.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax, at in zip(axes, panels, strict=False):
        _bars(ax, [r for r in found if point(r) == at], engines, found)
        ax.set_title(_about(at), loc="left", fontsize=9)
    fig.suptitle(title, x=0.01, ha="left", fontsize=12)
    fig.supxlabel("x: times vLLM's bf16, in speed or in tokens; above 1 is better.", fontsize=8)
    return fig


def _panels(found: Sequence[Row]) -> list[Point]:
    at: dict[Point, set[tuple[str, str]]] = {}
    for r in found:
        at.setdefault(point(r), set()).add(_engine(r))
    stepping = {_engine(r) for r in found if r["kind"] == "step"}
    return [p for p, engines in at.items() if p[0] in ("capacity", "largest", "generation") or (p[0] == "step" and engines == stepping)]


def _about(at: Point) -> str:
    kind, b, n = at
    if kind == "capacity":
        return "tokens that fit"
    if kind == "step":
        return f"ms a step, {b} x {n:,} tokens (less is better)"
    return f"tokens/s, as many rows of {n:,} as fit" if kind == "largest" else f"tokens/s, {n:,} generated, as many as fit"


def _bars(ax: Any, own: Sequence[Row], engines: Sequence[tuple[str, str]], found: Sequence[Row]) -> None:
    """The bars of one panel, the first engine on top."""
    for y, engine in enumerate(reversed(engines)):
        r = next((r for r in own if _engine(r) == engine), None)
        if r is None:
            ax.text(0, y, " not measured", va="center", fontsize=7, color="0.5")
            continue
        steps = r["kind"] == "step"
        value = r["ms_per_step" if steps else MORE[r["kind"]]]
        colour = COLOURS.get(engine[1], OTHER) if engine[0] == BASE[0] else OWN
        ax.barh(y, value, color=colour)
        times = factor(r, found)
        notes = [] if times is None else [f"{times:.2f}x"]
        notes += [f"{r['B']} rows"] if r["kind"] in ("largest", "generation") else []
        text = "\n".join(f" {line}" for line in (format(value, ",.1f" if steps else ",.0f"), ", ".join(notes)) if line)
        ax.text(value, y, text, va="center", fontsize=7)
    ax.set_yticks(range(len(engines)), [f"{kv}\n{engine}" for engine, kv in reversed(engines)], fontsize=7)
    ax.set_ylim(-0.6, len(engines) - 0.4)  # also for those without a bar
    ax.set_xlim(0, 1.6 * max(bar.get_width() for bar in ax.patches))  # room for the text
    ax.tick_params(axis="x", labelsize=7)
    ax.locator_params(axis="x", nbins=4)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.spines[["top", "right"]].set_visible(False)


def write_plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the figure as PNG. Raises ArtefactError when it cannot be written."""
    with artefact.replacing(path) as temporary:
        figure(rows, title).savefig(temporary, dpi=130, format="png")
