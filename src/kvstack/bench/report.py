"""Rows of `bench decode` for people: a table for every problem, and a plot of all."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from kvstack import artefact
from kvstack.bench import own
from kvstack.bench.decode import Row

COLOURS = {"bf16": "#9aa0a6", "fp8": "#e8a33d"}
OWN, OTHER = "#2a7de1", "#c9664f"


def problems(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Titles and rows of the problems, in their order, the fastest contender first and those that did not run last."""
    groups = groupby(rows, key=lambda r: (r["B"], r["N"]))
    return [(f"{b} x {n:,}", sorted(group, key=lambda r: r["us"] or float("inf"))) for (b, n), group in groups]


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table per problem."""
    out = []
    for title, group in problems(rows):
        r = group[0]
        heads = f"{r['Hq']} query heads, {r['Hkv']} KV heads of {r['D']}"
        table = Table(title=f"rows x tokens {title}, {heads}", title_justify="left")
        for i, head in enumerate(("contender", "bits", "µs", "TB/s", "of a copy", "x best bf16", "x best fp8")):
            table.add_column(head, justify="left" if i < 2 else "right", no_wrap=True)
        for r in group:
            if r["us"]:
                table.add_row(*_cells(r), style="bold" if r["name"] == own.NAME else None)
        out.append(table)
    return out


def left_out(rows: Sequence[Row]) -> list[str]:
    """A line per contender and reason for not running it."""
    lines = {f"{r['name']} ({r['bits']}) did not run: {r['reason']}": None for r in rows if not r["us"]}
    return list(lines)


def _cells(r: Row) -> list[str]:
    ratios = ("-" if r[key] is None else f"{r[key]:.2f}" for key in ("vs_bf16", "vs_fp8"))
    return [r["name"], r["bits"], f"{r['us']:,.1f}", f"{r['tb_s']:.2f}", f"{r['of_copy']:.0%}", *ratios]


def figure(rows: Sequence[Row], title: str) -> Any:
    """One panel per problem: a bar per contender, as long as its time."""
    from matplotlib.figure import Figure

    panels = problems(rows)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(len(group) for _, group in panels)
    fig: Any = Figure(figsize=(5.4 * columns, (0.27 * tallest + 0.9) * lines), layout="constrained")
    for i, (name, group) in enumerate(panels):
        ax = fig.add_subplot(lines, columns, i + 1)
        ran = [r for r in reversed(group) if r["us"]]
        # A peer that is many times slower than all others would squeeze them: its bar is cut and hatched, its number is not.
        slowest = sorted((r["us"] for r in ran), reverse=True)[:2] or [1.0]
        end = min(slowest[0], 1.5 * slowest[-1])
        for y, r in enumerate(ran):
            colour = OWN if r["name"] == own.NAME else COLOURS.get(r["bits"], OTHER)
            ax.barh(y, min(r["us"], end), color=colour, hatch="//" if r["us"] > end else None)
            ratio = "" if r["vs_bf16"] is None else f"  {r['vs_bf16']:.2f}x"
            ax.text(min(r["us"], end), y, f" {r['us']:,.0f}{ratio}", va="center", fontsize=7)
        ax.set_yticks(range(len(ran)), [f"{r['name']} {r['bits']}" for r in ran], fontsize=7)
        ax.set_xlim(0, 1.3 * end)
        ax.set_title(f"{name} tokens", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(title, x=0.01, ha="left", fontsize=12)
    fig.supxlabel("µs per decode step of one layer, and speed over the best bf16 peer", fontsize=9)
    return fig


def write_plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the figure as PNG. Raises ArtefactError when it cannot be written."""
    with artefact.replacing(path) as temporary:
        figure(rows, title).savefig(temporary, dpi=130, format="png")
