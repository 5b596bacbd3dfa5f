"""What `kvstack bench serve` measured, for people: engines of vLLM with its own caches and with ours.

    engine, kv, kind, B, N, capacity_tokens, prefill_tokens_per_s, ms_per_step, tokens_per_s
    reason              instead of numbers

The kinds are `prefill` (prompts computed), `step` (over tokens that are in the cache), `largest` (the same, as many rows as fit),
`generation` (as many rows as fit from nothing to N tokens) and `failed`. It measures nothing.
"""

from collections.abc import Sequence
from typing import Any

from kvstack.eval.page import Table

Row = dict[str, Any]
NUMBERS = {  # fields, their heads, and how they are written
    "capacity_tokens": ("tokens that fit", ",d"),
    "ms_per_step": ("ms a step", ".2f"),
    "tokens_per_s": ("tokens/s", ",.0f"),
    "prefill_tokens_per_s": ("prompt tokens/s", ",.0f"),
}


def are_mine(rows: Sequence[Row]) -> bool:
    """Whether these are rows of this module."""
    return {"engine", "kv", "kind"} <= rows[0].keys()


def tables(rows: Sequence[Row]) -> list[Table]:
    """A line for every row; why one has no numbers has a column of its own."""
    why = ["reason"] if any("reason" in row for row in rows) else []
    head = ("engine", "kv", "kind", "rows x tokens", *(name for name, _ in NUMBERS.values()), *why)
    return [Table("", head, [_cells(row, why) for row in rows])]


def _cells(row: Row, why: Sequence[str]) -> tuple[str, ...]:
    shape = "" if row["N"] is None else f"{row['B']} x {row['N']:,}"
    numbers = [format(row[field], form) if field in row else "" for field, (_, form) in NUMBERS.items()]
    texts = [str(row.get(key, "")).replace("|", "/").replace("\n", " ") for key in why]
    return row["engine"], f"`{row['kv']}`", row["kind"], shape, *numbers, *texts
