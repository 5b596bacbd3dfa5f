"""Compare rows for people: a terminal table, and one plot of quality against bytes as PNG and as a self-contained HTML page."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from kvstack.eval import architectures, churn, curves, page, rates, retrofit, serving

Row = dict[str, Any]


def _cells(row: Row) -> dict[str, str]:
    """What is shown of a row, by the heads of the columns; brackets are 95 % intervals."""
    cells = {"recipe": row["recipe"], "bytes/token": f"{row['bytes_per_token']:,.0f}", "ratio": f"{row['ratio']:.2f}x"}
    if "kl" in row:
        cells |= {"bits/byte": f"{row['bits_per_byte']:.4f}", "change %": f"{row['delta_pct']:+.2f}", "KL": f"{row['kl']:.2e}"}
    if "against" in row:
        e = row["against"]["kl"]
        cells[f"KL - that of {row['against']['recipe']}"] = f"{e['mean']:+.1e} [{e['low']:+.1e}, {e['high']:+.1e}]"
    for name, e in row["tasks"].items():
        cells[f"{name} %"] = f"{100 * e['accuracy']:.1f} [{100 * e['low']:.0f}, {100 * e['high']:.0f}]"
    graph = " (graph)" if row.get("decoding", "").startswith("CUDA graph") else ""  # rows of before say nothing, and had none
    return cells | {"tokens/s": f"{row['tokens_per_s']:.1f}{graph}"}


def table(rows: Sequence[Row], title: str) -> Table:
    """The compare rows as a terminal table; brackets are 95 % intervals."""
    out = Table(title=title, title_justify="left")
    for i, name in enumerate(_cells(rows[0])):
        out.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        out.add_row(*_cells(row).values())
    return out


def figure(rows: Sequence[Row], title: str) -> Any:
    """Quality against bytes: KL to bf16 (log), change of bits per byte, and mean task accuracy, one point per recipe."""
    from matplotlib.figure import Figure

    fig: Any = Figure(figsize=(13, 4.6), layout="constrained")
    panels: list[tuple[str, str, Callable[[Row], float | None]]] = [
        ("KL to bf16 (nats per token)", "kl", lambda r: r.get("kl") or None),
        ("bits per byte, change (%)", "delta", lambda r: r.get("delta_pct")),
        (
            "mean task accuracy (%)",
            "tasks",
            lambda r: 100 * sum(e["accuracy"] for e in r["tasks"].values()) / len(r["tasks"]) if r["tasks"] else None,
        ),
    ]
    families = [_family(r["recipe"]) for r in rows]
    for i, (label, key, value) in enumerate(panels):
        ax = fig.add_subplot(1, 3, i + 1)
        for j, row in enumerate(rows):
            y = value(row)
            if y is not None:
                colour = list(dict.fromkeys(families)).index(families[j])
                marker = "osD^v<>PX*hpd"[families[:j].count(families[j]) % 13]
                ax.plot(row["bytes_per_token"], y, marker, color=f"C{colour % 10}", label=row["recipe"], markersize=8)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        if key == "kl":
            ax.set_yscale("log")
        if key == "delta":
            ax.set_yscale("symlog", linthresh=0.1)
            changes = [1.5 * r.get("delta_pct", 0) for r in rows]
            ax.set_ylim(min(-0.05, *changes), max(0.1, *changes))
            ax.axhline(0, color="0.8", zorder=0)
        if key == "tasks":  # a sample more or less shall not look like a cliff
            ax.set_ylim(min(90.0, ax.get_ylim()[0]), 101)
        ax.set_xlabel("measured bytes per token (all layers)")
        ax.set_title(label, loc="left", fontsize=11)
        ax.grid(alpha=0.25)
    # A run may be without text or without tasks, and bf16 has no KL: the last panel with points has all of them, in order.
    handles = {label: handle for ax in reversed(fig.axes) for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    fig.suptitle(title, x=0.01, ha="left", fontsize=12)
    return fig


def _family(recipe: str) -> str:
    """Recipes of one family have one colour: the word without its bits."""
    word = re.sub(r"\d", "", recipe.partition("(")[0])
    return "polar" if word == "kv" else word


def write_plots(rows: Sequence[Row], title: str, stem: Path) -> list[Path]:
    """Write `stem.png` and `stem.html` (table and picture in one file) and return their paths."""
    note = "Brackets are 95 % intervals. The ratio is bf16 bytes over measured bytes of the same tokens."
    return page.write(stem, title, {"": figure(rows, title)}, [_as_table([_cells(row) for row in rows])], note)


def markdown(files: Sequence[Path]) -> str:
    """The rows of results files as one page of tables, each with its command and machine; files with other rows are left out."""
    parts = ["# Results\n\nMade from `results/*.json` by `make results`; brackets are 95 % intervals."]
    for path in files:
        found = json.loads(path.read_text("utf-8"))
        rows = found["rows"]
        shown = _shown(rows)
        if not shown[0].cells:
            continue
        env = found["environment"]
        machine = f"{env['gpu']['name'] if env['gpu'] else env['cpu']}, torch {env['torch']}, {env['date'][:10]}"
        tables = "\n\n".join(map(_in_markdown, shown))
        parts.append(f"## {path.stem}\n\n{machine}\n\n```\n{found['command']}\n```\n\n{_legend(rows[0])}{tables}")
    return "\n\n".join(parts) + "\n"


def _shown(rows: Sequence[dict[str, Any]]) -> list[page.Table]:
    if curves.are_mine(rows):
        return curves.compact(rows)
    found = next((study for study in (architectures, rates, retrofit, churn, serving) if study.are_mine(rows)), None)
    return found.tables(rows) if found else [_as_table(_lines(rows))]


def _as_table(lines: Sequence[dict[str, str]]) -> page.Table:
    return page.Table("", tuple(lines[0]) if lines else (), [tuple(line.values()) for line in lines])


def _in_markdown(table: page.Table) -> str:
    lines = (table.head, ["---"] * len(table.head), *table.cells)
    return (f"`{table.title}`\n\n" if table.title else "") + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _legend(row: dict[str, Any]) -> str:
    """What the columns of a benchmark are, and its brackets, which are no intervals."""
    if "vs_bf16" in row:
        what = "new tokens x tokens of the past" if "T" in row else "rows x tokens"
        return f"Columns: {what}. In brackets: how many times as fast as the fastest peer in bf16.\n\n"
    if "of_copy" in row:
        return (
            "Columns: rows x new tokens. In brackets: bytes read and written over the time, in units of a device copy's bandwidth.\n\n"
        )
    if "tb_per_s" in row:
        return f"{row['B']} rows of {row['N']:,} tokens, {row['H']} heads of {row['D']}.\n\n"
    if "N" in row and "error" in row:
        return "Columns: tokens of a row. RMS of the error over RMS of the output, against float64 on the same codes.\n\n"
    return ""


def _lines(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Cells of the rows of `compare` and of `bench` under their heads."""
    if compared := [row for row in rows if "bytes_per_token" in row]:
        return [{"tokens": f"{row['tokens']:,}", **_cells(row)} for row in compared]
    if "tokens_per_s" in rows[0] and "context" in rows[0]:
        first, evicting = rows[0]["tokens_per_s"], any("evict_ms" in row for row in rows)
        return [
            {
                "recipe": f"`{row['recipe']}`",
                "context": f"{row['context']:,}",
                "rows": str(row["batch"]),
                **({"generated": f"{row['generated']:,}"} if "generated" in row else {}),
                "ms a step": f"{row['ms']:.1f}",
                **({"ms an eviction": f"{row['evict_ms']:.1f}" if "evict_ms" in row else "-"} if evicting else {}),
                "tokens/s": f"{row['tokens_per_s']:,.0f}",
                "x": f"{row['tokens_per_s'] / first:.2f}",
                "peak GB": f"{row['peak_bytes'] / 1e9:.3f}",
            }
            for row in rows
        ]
    if "tb_per_s" in rows[0]:
        return [_low_rank(row) for row in sorted((r for r in rows if r["us"]), key=lambda r: float(r["us"]))]
    if "error" in rows[0] and not {"us", "ms"} & rows[0].keys():
        errors: dict[str, dict[str, str]] = {}
        for row in rows:
            line = errors.setdefault(row["bits"], {"bits": row["bits"]})
            line[f"{row['N']:,}"] = "-" if row["error"] is None else f"{row['error']:.1e}"
        return list(errors.values())
    return _speeds(rows) if "bits" in rows[0] else []


def _low_rank(row: dict[str, Any]) -> dict[str, str]:
    """Cells of a row of `bench lowrank`."""
    what = {"kernel": row["kernel"], "variant": row["variant"], "rank": str(row["rank"] or "-"), "GB": f"{row['bytes'] / 1e9:.2f}"}
    faster = row["speedup_over_best_mha"]
    return what | {
        "µs": f"{row['us']:,.1f}", "TB/s": f"{row['tb_per_s']:.2f}", "x best MHA": "-" if faster is None else f"{faster:.2f}",
        "error": f"{row['error']:.1e}",
    }  # fmt: skip


def _speeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A line per contender of `bench decode`, `prefill` or `encode`, with its time on every problem and how it compares."""
    time, unit, first = ("ms", "ms", "T") if "T" in rows[0] else ("us", "µs", "B")
    second, digits = "N" if "N" in rows[0] else "n", 3 if time == "ms" else 1
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault((row["name"], row["bits"]), {unit: row["name"], "bits": row["bits"]})
        if second == "n":
            note = f"{row['of_copy']:.1%}" if row[time] else ""
        else:
            note = "" if row["vs_bf16"] is None else f"{row['vs_bf16']:.2f}x"
        value = f"{row[time]:,.{digits}f}" if row[time] else "-"
        line[f"{row[first]:,} x {row[second]:,}"] = f"{value} ({note})" if note else value
    return list(lines.values())


if __name__ == "__main__":
    print(markdown([Path(name) for name in sys.argv[1:]]), end="")
