"""Rows of `selection` for people: tables of recipes by budgets, and curves of accuracy against budget as PNG and as an HTML page.

A line of a plot or a table is a *stack*: a recipe with BUDGET in the place of its budget. Recipes without a budget are level lines, and
have a column of their own. Intervals are 95 %.
"""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvstack.eval import page
from kvstack.eval.page import Table
from kvstack.eval.selection import MEAN, Row

WHOLE = "no budget"
MARKERS = "osD^vP"
NOTE = (
    "Brackets are 95 % intervals. An item counts when it begins in the second half of its sample. Memory: bf16 bytes of all tokens "
    "over the measured bytes at the end, and the most that a sequence held after a chunk."
)


def are_mine(rows: Sequence[Row]) -> bool:
    """Whether these are rows of `selection`."""
    return {"scorer", "budget", "working_set"} <= rows[0].keys()


def stack(row: Row) -> str:
    """The recipe of a row with BUDGET for its budget, which is the first argument in a canonical recipe."""
    return str(row["recipe"] if row["budget"] is None else row["recipe"].replace(f"({row['budget']}", "(BUDGET", 1))


def tables(rows: Sequence[Row]) -> list[Table]:
    """Recipes by budgets: accuracy of every task and of their mean, differences to a rival if there are any, and memory."""
    tasks, out = _distinct(r["task"] for r in rows), []
    for task in tasks:
        chosen = [r for r in rows if r["task"] == task]
        out.append(
            _grid(f"{task}, {chosen[0]['length']:,} tokens, accuracy %", "recipe", [(stack(r), r, _accuracy(r)) for r in chosen])
        )
        if compared := [r for r in chosen if "against" in r]:
            rival = compared[0]["against"]["recipe"]
            title = f"{task}, points above {stack({**compared[0], 'recipe': rival})}"
            out.append(_grid(title, "recipe", [(stack(r), r, _difference(r)) for r in compared]))
    last = [r for r in rows if r["task"] == tasks[-1]]
    memory = [(stack(r), r, f"{r['ratio']:.2f}x, {r['peak_bytes'] / 2**20:.2f} MiB") for r in last]
    return [*out, _grid(f"{tasks[-1]}, memory", "recipe", memory)]


def compact(rows: Sequence[Row]) -> list[Table]:
    """Tasks by budgets: a table for every stack, and another one where a task has a length of its own."""
    out = []
    for name in _distinct(stack(r) for r in rows):
        own = [r for r in rows if stack(r) == name]
        for length in _distinct(r["length"] for r in own):
            cells = [(r["task"], r, _accuracy(r)) for r in own if r["length"] == length]
            out.append(_grid(f"{name}, {length:,} tokens, accuracy %", "task", cells))
    return out


def _grid(title: str, corner: str, cells: Sequence[tuple[str, Row, str]]) -> Table:
    """A table with a line for each name and a column for each budget."""
    budgets = sorted({r["budget"] for _, r, _ in cells}, key=lambda b: (b is None, b))
    found = {(name, r["budget"]): text for name, r, text in cells}
    head = (corner, *(WHOLE if b is None else f"{b:,}" for b in budgets))
    return Table(title, head, [(name, *(found.get((name, b), "") for b in budgets)) for name in _distinct(n for n, _, _ in cells)])


def _accuracy(r: Row) -> str:
    return f"{100 * r['accuracy']:.1f} [{100 * r['low']:.0f}, {100 * r['high']:.0f}]"


def _difference(r: Row) -> str:
    mean, low, high = (100 * r["against"][key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _distinct(x: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(x))


def figures(rows: Sequence[Row], title: str) -> dict[str, Any]:
    """Matplotlib figures by the end of their names: accuracy against the budget, and against the budget over the working set."""
    return {"": budget_figure(rows, title)} | (
        {"-working-set": working_set_figure(rows, title)} if any(r["budget"] for r in rows) else {}
    )


def budget_figure(rows: Sequence[Row], title: str) -> Any:
    """A panel for every task and for their mean: accuracy against the budget, a line for each stack, shaded intervals."""
    tasks, looks = _distinct(r["task"] for r in rows), _looks(rows)
    fig, axes = _panels(len(tasks), title)
    for ax, task in zip(axes, tasks, strict=True):
        for i, (name, look) in enumerate(looks.items()):
            own = sorted((r for r in rows if r["task"] == task and stack(r) == name), key=lambda r: r["budget"] or 0)
            y, low, high = ([100 * r[key] for r in own] for key in ("accuracy", "low", "high"))
            if own[0]["budget"] is None:
                ax.axhline(y[0], label=name, **look)
                continue
            x = [r["budget"] for r in own]
            ax.plot(x, y, marker=MARKERS[i % len(MARKERS)], markersize=4, label=name, **look)
            ax.fill_between(x, low, high, color=look["color"], alpha=0.06, linewidth=0)
        length = next(r["length"] for r in rows if r["task"] == task)
        _dress(ax, f"{task}, {length:,} tokens", sorted({r["budget"] for r in rows if r["task"] == task} - {None}))
    _finish(fig, axes, "budget (tokens of a KV head)")
    return fig


def working_set_figure(rows: Sequence[Row], title: str) -> Any:
    """A panel for every stack: accuracy against budget over working set, a line for each task. From 1 on all that is needed fits."""
    chosen = [r for r in rows if r["budget"] is not None and r["task"] != MEAN]
    names, tasks = _distinct(map(stack, chosen)), _distinct(r["task"] for r in chosen)
    fig, axes = _panels(len(names), title)
    for ax, name in zip(axes, names, strict=True):
        for i, task in enumerate(tasks):
            own = sorted((r for r in chosen if r["task"] == task and stack(r) == name), key=lambda r: float(r["budget"]))
            x = [r["budget"] / r["working_set"] for r in own]
            ax.plot(x, [100 * r["accuracy"] for r in own], marker="o", markersize=4, color=f"C{i}", label=task)
        ax.axvline(1, color="0.6", linewidth=1, zorder=0)
        _dress(ax, name)
    _finish(fig, axes, "budget over working set")
    return fig


def write_plots(rows: Sequence[Row], title: str, stem: Path) -> list[Path]:
    """Write `stem.png`, `stem-working-set.png` and `stem.html` (tables and pictures in one file) and return their paths."""
    return page.write(stem, title, figures(rows, title), tables(rows), NOTE)


def _looks(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour and dashes of every stack: a colour for each scorer, black and dashed for the oracle, grey for no selection; other stacks
    of the same scorer are dotted. No budget is a thin line."""
    scorers = [s for s in _distinct(r["scorer"] for r in rows) if s not in ("oracle", "full")]
    out: dict[str, dict[str, Any]] = {}
    of: dict[str, str] = {}  # the scorer of every stack
    for r in rows:
        name, scorer = stack(r), r["scorer"]
        if name in out:
            continue
        colour = {"oracle": "black", "full": "0.6"}.get(scorer) or f"C{scorers.index(scorer) % 10}"
        dashes = ("--" if scorer == "oracle" else "-", ":", "-.", (0, (1, 3)))[list(of.values()).count(scorer) % 4]
        out[name], of[name] = {"color": colour, "linestyle": dashes, "linewidth": 1.1 if r["budget"] is None else 1.8}, scorer
    return out


def _panels(n: int, title: str) -> tuple[Any, list[Any]]:
    """A figure with `n` panels, at most four in a line, that share the y axis."""
    from matplotlib.figure import Figure

    columns = min(4, n)
    lines = -(-n // columns)
    fig: Any = Figure(figsize=(max(6.0, 3.6 * columns), 3.3 * lines + 0.9), layout="constrained")
    grid = fig.subplots(lines, columns, sharey=True, squeeze=False)
    for ax in grid.flat[n:]:
        ax.remove()
    for ax in grid[:, 0]:
        ax.set_ylabel("accuracy (%)")
    fig.suptitle(title, x=0.01, ha="left", fontsize=12)
    return fig, list(grid.flat[:n])


def _dress(ax: Any, title: str, ticks: Sequence[int] = ()) -> None:
    ax.set_xscale("log", base=2)
    if ticks:
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        ax.set_xlim(ticks[0] / 1.1, ticks[-1] * 1.1)
    else:
        ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.set_ylim(-3, 103)
    ax.set_title(textwrap.fill(title, 36), loc="left", fontsize=10)
    ax.grid(alpha=0.25)


def _finish(fig: Any, axes: Sequence[Any], label: str) -> None:
    """Name the x axes, and give the figure one legend."""
    for ax in axes[-4:]:  # the lowest of every column
        ax.set_xlabel(label)
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    inches = 0.5 + 0.072 * max(map(len, handles))  # of an entry: its line, and letters of nine points
    columns = max(1, min(4, int(fig.get_size_inches()[0] / inches)))
    fig.set_figheight(fig.get_figheight() + 0.2 * max(0, -(-len(handles) // columns) - 4))  # there is room for four lines of them
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
