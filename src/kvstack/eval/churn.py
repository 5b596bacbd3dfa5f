"""What `kvstack bench churn` found, for people: a column for every engine. The rows are those of `bench.churn`. It measures nothing."""

from collections.abc import Callable, Sequence
from typing import Any

from kvstack.eval.page import Table

Row = dict[str, Any]
COUNTS = {
    "requests": "requests", "aborted": "  aborted", "preempted": "  preemptions", "new_tokens": "new tokens",
    "cached_tokens": "tokens of cached prefixes", "leaked_blocks": "blocks that are missing",
}  # fmt: skip
GROWN = {"gpu_bytes": "MB more on the GPU, from a fifth on", "host_bytes": "MB more on the host, from a fifth on"}
AGAIN = {"checked": "answers compared", "differing": "  with other tokens", "tokens": "tokens compared"}


def are_mine(rows: Sequence[Row]) -> bool:
    """Whether these are rows of this module."""
    return {"engine", "kv", "blocks"} <= rows[0].keys()


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What happened and what was found, a line for each, with a cell for every row; what a row does not know is an empty cell."""

    def line(name: str, field: str, cell: Callable[[Any], str] = "{:,}".format) -> tuple[str, ...]:
        return name, *(cell(row[field]) if field in row else "" for row in rows)

    def grown(samples: Sequence[float]) -> str:
        return f"{round((samples[-1] - samples[min(2, len(samples) - 1)]) / 1e6, 1) + 0.0:,.1f}"  # no -0.0

    def worst(gaps: Sequence[float]) -> str:
        return f"{max(gaps, default=0):.4f}"

    def count(gaps: Sequence[float]) -> str:
        return f"{len(gaps):,}"

    return [
        line("seconds", "seconds", "{:,.0f}".format),
        *(line(name, field) for field, name in COUNTS.items()),
        *(line(name, field, grown) for field, name in GROWN.items()),
        *(line(name, field) for field, name in AGAIN.items()),
        line("  that are not the likeliest", "gaps", count),
        line("  nats less likely, the worst", "gaps", worst),
        line("one engine, eight at once: not the likeliest", "together", count),
        line("  by nats, the worst", "together", worst),
        line("tokens of other requests, by nats", "others", lambda others: "-" if others is None else f"{others:.4f}"),
    ]


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table; why an engine has no numbers is its last line."""
    about = [("model", *(str(row["model"]) for row in rows))]
    about += [(name, *(f"{row[field]:,}" for row in rows)) for field, name in (("rows", "requests at once"), ("longest", "longest"))]
    why = [("not measured", *(str(row.get("reason", "")).replace("|", "/").replace("\n", " ") for row in rows))]
    body = [*about, *lines(rows), *(why if any("reason" in row for row in rows) else [])]
    return [Table("", ("", *(f"`{row['kv']}`" for row in rows)), body)]
