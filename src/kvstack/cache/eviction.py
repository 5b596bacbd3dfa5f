"""Tokens leave a body of pages: the scorer says which, a selection kernel how many of each head, and the rest moves together, in place.

Every KV head leaves as many tokens as all others of its row, and decides alone. No number is read on the host, so whoever calls this
need not wait. When it is called, and what becomes of the pages that are empty then, is the caller's.
"""

import torch
from torch import Tensor

from kvstack.kernels.compact import compact
from kvstack.kernels.decode import Body
from kvstack.kernels.pages import PAGE, Pages
from kvstack.kernels.score import score_linear
from kvstack.kernels.select import select
from kvstack.scorers.base import Scorer, View

DECODED = 2**26  # numbers of keys that are decoded at once


def evict(body: Body, scorer: Scorer, places: int, came: Tensor, newer: Tensor, scale: float, layers: int = 1) -> None:
    """Leave every row of the body the `places` tokens that the scorer wants most, at its front, if it has more.

    came: `[B]`, tokens of each row so far. newer: `[B]`, of which so many came after those of the body. scale: of the logits. layers:
    the body has the B rows of so many layers, one layer after the other, and to a scorer of statistics their heads are those of one.
    """
    pages = body.pages
    slots = pages.table.shape[1] * PAGE
    weights = scorer.linear(came)
    if weights is not None:
        rope, w, c = weights
        if layers > 1:
            w = w.unflatten(1, (layers, -1)).transpose(0, 1).flatten(0, 1)
            c = c.unflatten(0, (layers, -1)).repeat_interleave(len(came), 0)
        raw = score_linear(pages, body.key, rope, w.contiguous(), c)
    else:
        came, newer = came.repeat(layers), newer.repeat(layers)
        rows = max(1, DECODED // (pages.pool.shape[1] * slots * pages.format.head_dim))
        parts = [_scores(body, scorer, came, newer, scale, slice(i, i + rows)) for i in range(0, len(came), rows)]
        raw = torch.cat(parts)[:, :, None]  # as if every KV head had one query head
    keep = select(raw, pages.lengths, min(places, slots), weights is not None, scorer.ordered)
    compact(pages, keep, pages.lengths.clamp_max(places), scorer.ordered)


def _scores(body: Body, scorer: Scorer, came: Tensor, newer: Tensor, scale: float, rows: slice) -> Tensor:
    """Scores `[b, H, N]` of some rows, for scorers that no kernel serves: keys are decoded, and values if they are asked for."""
    pages = body.pages
    held = pages.lengths[rows, None, None]
    place = torch.arange(pages.table.shape[1] * PAGE, device=pages.table.device)
    valid = (place < held).expand(-1, pages.pool.shape[1], -1)
    part = Body(Pages(pages.format, pages.pool, pages.table[rows], pages.lengths[rows]), body.key, body.value, body.cum)
    key, value, _ = part.sides()
    v = value.codec.decode(value.codes) if scorer.values else None
    age = newer[rows, None, None] + held - 1 - place
    return scorer.score(View.of_keys(key.codec.decode(key.codes), v, valid, age.expand(valid.shape), came[rows], scale))
