"""Rows of benchmarks for people: a table for every problem, and a plot of all of `bench decode`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from kvstack import artefact
from kvstack.bench.contender import NAME
from kvstack.bench.trial import Row

COLOURS = {"bf16": "#9aa0a6", "fp8": "#e8a33d"}
OWN, OTHER = "#2a7de1", "#c9664f"


@dataclass(frozen=True)
class Layout:
    """How rows become tables. by: fields that rows of one problem share. time: the field that they are sorted by, mostly their time.
    title: of a problem, from one of its rows. columns: heads, and the cells of a row that was timed."""

    by: tuple[str, ...]
    time: str
    title: Callable[[Row], str]
    columns: Mapping[str, Callable[[Row], str]]


def ratio(x: float | None) -> str:
    """A ratio of times, which there may not be."""
    return "-" if x is None else f"{x:.2f}"


DECODE = Layout(
    by=("B", "N"),
    time="us",
    title=lambda r: f"rows x tokens {_shape(r)}, {r['Hq']} query heads, {r['Hkv']} KV heads of {r['D']}",
    columns={
        "contender": lambda r: r["name"],
        "bits": lambda r: r["bits"],
        "µs": lambda r: f"{r['us']:,.1f}",
        "TB/s": lambda r: f"{r['tb_s']:.2f}",
        "of a copy": lambda r: f"{r['of_copy']:.0%}",
        "x best bf16": lambda r: ratio(r["vs_bf16"]),
        "x best fp8": lambda r: ratio(r["vs_fp8"]),
    },
)


def problems(rows: Sequence[Row], layout: Layout = DECODE) -> list[list[Row]]:
    """The rows of every problem, the fastest contender first and those that did not run last."""
    groups = groupby(rows, key=lambda r: [r[field] for field in layout.by])
    return [sorted(group, key=lambda r: r[layout.time] or float("inf")) for _, group in groups]


def tables(rows: Sequence[Row], layout: Layout = DECODE) -> list[Table]:
    """A table per problem."""
    out = []
    for group in problems(rows, layout):
        title = layout.title(group[0])
        table = Table(title=title, title_justify="left", min_width=len(title))
        for i, head in enumerate(layout.columns):
            table.add_column(head, justify="left" if i < 2 else "right", no_wrap=True)
        for r in group:
            if r[layout.time]:
                table.add_row(*(cell(r) for cell in layout.columns.values()), style="bold" if r["name"] == NAME else None)
        out.append(table)
    return out


def left_out(rows: Sequence[Row]) -> list[str]:
    """A line per contender and reason for not running it."""
    lines = {f"{r['name']} ({r['bits']}) did not run: {r['reason']}": None for r in rows if "reason" in r}
    return list(lines)


def _shape(r: Row) -> str:
    return f"{r['B']} x {r['N']:,}"


def figure(rows: Sequence[Row], title: str) -> Any:
    """Rows of `bench decode`: one panel per problem, a bar per contender, as long as its time."""
    from matplotlib.figure import Figure

    panels = problems(rows)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(len(group) for group in panels)
    fig: Any = Figure(figsize=(5.4 * columns, (0.27 * tallest + 0.9) * lines), layout="constrained")
    for i, group in enumerate(panels):
        ax = fig.add_subplot(lines, columns, i + 1)
        ran = [r for r in reversed(group) if r["us"]]
        # A peer that is many times slower than all others would squeeze them: its bar is cut and hatched, its number is not.
        slowest = sorted((r["us"] for r in ran), reverse=True)[:2] or [1.0]
        end = min(slowest[0], 1.5 * slowest[-1])
        for y, r in enumerate(ran):
            colour = OWN if r["name"] == NAME else COLOURS.get(r["bits"], OTHER)
            ax.barh(y, min(r["us"], end), color=colour, hatch="//" if r["us"] > end else None)
            ratio = "" if r["vs_bf16"] is None else f"  {r['vs_bf16']:.2f}x"
            ax.text(min(r["us"], end), y, f" {r['us']:,.0f}{ratio}", va="center", fontsize=7)
        ax.set_yticks(range(len(ran)), [f"{r['name']} {r['bits']}" for r in ran], fontsize=7)
        ax.set_xlim(0, 1.3 * end)
        ax.set_title(f"{_shape(group[0])} tokens", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(title, x=0.01, ha="left", fontsize=12)
    fig.supxlabel("µs per decode step of one layer, and speed over the best bf16 peer", fontsize=9)
    return fig


def write_plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the figure as PNG. Raises ArtefactError when it cannot be written."""
    with artefact.replacing(path) as temporary:
        figure(rows, title).savefig(temporary, dpi=130, format="png")
