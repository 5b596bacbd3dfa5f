"""What `kvstack bench churn` found, for people: a column for every engine. The rows are those of `bench.churn`. It measures nothing."""

from collections.abc import Sequence
from typing import Any

from kvstack.eval.page import Table

Row = dict[str, Any]
COUNTS = {
    "requests": "requests", "aborted": "  aborted", "preempted": "  preemptions", "new_tokens": "new tokens",
    "cached_tokens": "tokens of cached prefixes", "leaked_blocks": "blocks that are missing",
}  # fmt: skip
GROWN = {"gpu_bytes": "MB more on the GPU, from a fifth on", "host_bytes": "MB more on the host, from a fifth on"}
AGAIN = {"checked": "requests asked again", "differing": "  with other tokens", "tokens": "tokens compared"}


def are_mine(rows: Sequence[Row]) -> bool:
    """Whether these are rows of this module."""
    return {"engine", "kv", "blocks"} <= rows[0].keys()


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What happened and what was found, a line for each, with a cell for every row; those without numbers have empty cells."""

    def line(name: str, cell: Any) -> tuple[str, ...]:
        return name, *("" if "reason" in row else cell(row) for row in rows)

    def grown(row: Row, field: str) -> str:
        first = row[field][min(2, len(row[field]) - 1)]
        return f"{(row[field][-1] - first) / 1e6:,.1f}"

    return [
        line("seconds", lambda row: f"{row['seconds']:,.0f}"),
        *(line(name, lambda row, field=field: f"{row[field]:,}") for field, name in COUNTS.items()),
        *(line(name, lambda row, field=field: grown(row, field)) for field, name in GROWN.items()),
        *(line(name, lambda row, field=field: f"{row[field]:,}") for field, name in AGAIN.items()),
        line("  others", lambda row: f"{len(row['gaps']):,}"),
        line("  nats less likely, the worst", lambda row: f"{max(row['gaps'], default=0):.4f}"),
        line("  nats, eight at once and alone", lambda row: f"{max(row['together'], default=0):.4f}"),
        line("  nats, tokens of other requests", lambda row: "-" if row["others"] is None else f"{row['others']:.4f}"),
    ]


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table; why an engine has no numbers is its last line."""
    about = [("model", *(str(row["model"]) for row in rows))]
    about += [(name, *(f"{row[field]:,}" for row in rows)) for field, name in (("rows", "requests at once"), ("longest", "longest"))]
    why = [("not measured", *(str(row.get("reason", "")).replace("|", "/").replace("\n", " ") for row in rows))]
    body = [*about, *lines(rows), *(why if any("reason" in row for row in rows) else [])]
    return [Table("", ("", *(f"`{row['kv']}`" for row in rows)), body)]
