"""A pretrained MHA model as attention that caches less: what `kvstack convert` measured, for people.

Rows: one of the model that came in (`mha`), one of every method measured, the target's first.

    method, rank, reference, cache_ratio, cache_bytes_per_token, windows, length, lost_key, lost_value, test_loss,
    loss_increase, loss_increase_low, loss_increase_high      of all but the model that came in
    distil_tokens, lr, curve, and the last four names with `_after`     of the target, when it was distilled

`cache_ratio` is the cache of the structure over that of the model that came in; `cache_bytes_per_token` is measured, in bf16.
References (`reference`: true) are MHA with weights of the structure's rank: their cache is as large as it was, and only their loss
counts. Losses are nats a token over windows of the test text, increases are paired over the windows. It converts and measures nothing.
"""

from collections.abc import Sequence
from typing import Any

from kvstack.eval.page import Table

Row = dict[str, Any]
NOTE = "Brackets are 95 % intervals over windows. *: MHA with weights of that structure, for its loss; its cache is not smaller."


def are_mine(rows: Sequence[Row]) -> bool:
    """Whether these are rows of this module."""
    return {"method", "lost_key"} <= rows[0].keys()


def tables(rows: Sequence[Row]) -> list[Table]:
    """A line for every method; what distillation left has columns of its own."""
    times = ["", "_after"] if any("test_loss_after" in row for row in rows) else [""]
    head = ("method", "rank", "of MHA's cache", "bytes/token", "lost K %", "lost V %", "test loss", "increase", "distilled", "increase")
    return [Table("", head[: 6 + 2 * len(times)], [_cells(row, times) for row in rows])]


def _cells(row: Row, times: Sequence[str]) -> tuple[str, ...]:
    cells = [row["method"] + "*" * row["reference"], str(row["rank"]), f"{row['cache_ratio']:.3f}"]
    cells.append(f"{row['cache_bytes_per_token']:,.0f}")
    cells += [f"{100 * row[name]:.2f}" for name in ("lost_key", "lost_value")]
    for when in times:
        loss, more = f"test_loss{when}", f"loss_increase{when}"
        cells.append(f"{row[loss]:.4f}" if loss in row else "")
        cells.append(f"{row[more]:+.4f} [{row[f'{more}_low']:+.4f}, {row[f'{more}_high']:+.4f}]" if more in row else "")
    return tuple(cells)
