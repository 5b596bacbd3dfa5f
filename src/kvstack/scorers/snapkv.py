"""`snapkv`: SnapKV (arXiv 2404.14469). Tokens that the newest queries attend to stay, with their neighbours.

The published method looks once, at the end of the prompt. This is its decode-time form: the same pooled attention, at every eviction.

    A_n   = mean over the group, mean over the newest queries, of softmax(q k scale) over candidates and near tokens
    score = pool(A)_n      along the candidates in their order, `kernel` wide

Candidates younger than `queries` are the published observation window: they stay (+inf) and have no part in the pooling.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kvstack.checks import choice, whole_number
from kvstack.errors import RecipeError
from kvstack.scorers.base import Layer, Scorer, Selection, View, recent_logits

Pool = Literal["max", "mean"]


def mean_attention(logits: Tensor, asked: Tensor) -> Tensor:
    """Mean over the queries that were `asked [B, W]` of the softmax of `logits [B, ..., W, N]`: `[B, ..., N]`.

    Logits of -inf have no attention, also where a query has no others.
    """
    attention = logits.softmax(-1).masked_fill(logits == -torch.inf, 0)
    count = asked.sum(-1).clamp_min(1)
    return attention.sum(-2) / count.reshape(-1, *[1] * (logits.ndim - 2))


def pooled(x: Tensor, kernel: int, pool: Pool) -> Tensor:
    """`x [B, H, N]`, none of it negative, pooled over `kernel` neighbours (odd) with zeros beyond the ends."""
    if pool == "max":
        return F.max_pool1d(x, kernel, stride=1, padding=kernel // 2)
    return F.avg_pool1d(x, kernel, stride=1, padding=kernel // 2)


def check_kernel(kernel: int) -> None:
    """Raise RecipeError unless `kernel` is an odd number in 1..1023."""
    whole_number("kernel", kernel, 1, 1023)
    if kernel % 2 == 0:
        raise RecipeError(f"`kernel` cannot be {kernel}, which has no middle. Give an odd number, such as {kernel - 1}.")


class SnapKVScorer(Scorer):
    """See the module."""

    def __init__(self, queries: int, kernel: int, pool: Pool) -> None:
        self.queries, self.kernel, self.pool = queries, kernel, pool

    def score(self, view: View) -> Tensor:
        """See `Scorer.score`."""
        logits = torch.cat(recent_logits(view), -1)
        attention = mean_attention(logits, view.asked).mean(2)[..., : view.key.shape[2]]
        young = view.valid & (view.age < self.queries)
        # Tokens that are not valid have attention 0, which is what the pooling finds beyond the ends too.
        return pooled(attention.masked_fill(young, 0), self.kernel, self.pool).masked_fill(young, torch.inf)


@dataclass(frozen=True)
class SnapKV(Selection):
    """SnapKV over the newest `queries` (1..1024), pooled over `kernel` neighbours (odd, 1..1023) by `pool`. Published: 32, 7, max.

    Raises RecipeError for numbers out of range.
    """

    queries: int = 32
    kernel: int = 7
    pool: Pool = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("queries", self.queries, 1, 1024)
        check_kernel(self.kernel)
        choice("pool", self.pool, ("max", "mean"))

    def build(self, layer: Layer) -> Scorer:
        """See `Selection.build`."""
        return SnapKVScorer(self.queries, self.kernel, self.pool)
