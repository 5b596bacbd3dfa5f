"""`rkv`: R-KV (arXiv 2505.24133). Tokens that the newest queries attend to stay, less those that repeat others.

    L_n   = max over the group of q k scale
    I     = maxpool(mean over the newest queries of softmax(L))      over what is older than these queries, pooled along the candidates
    C     = cosines of all keys, diagonal 0; in each row the newest of those above 0.5 is set to 0, or the oldest key if none is above
    R     = softmax(mean over the rows of C)                         over all keys
    score = weight / 100 * I - (1 - weight / 100) * R

Cosines are over all keys of the KV head and the softmax of L is over all that are older than the queries, as published, so sinks and
the exact window have a part in them; the pooling runs over candidates only. Candidates younger than `queries` stay (+inf). C is N x N,
so it is made for one KV head at a time.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvstack.checks import whole_number
from kvstack.scorers.base import Layer, Scorer, Selection, View, recent_logits
from kvstack.scorers.snapkv import check_kernel, mean_attention, pooled

ALIKE = 0.5  # the cosine above which one key repeats another


def redundancy(key: Tensor, valid: Tensor, age: Tensor) -> Tensor:
    """How much each key repeats others, `[B, H, N]` of sum 1 over `valid [B, H, N]`: `key [B, H, N, D]` of `age [B, H, N]`."""
    order = (-age).masked_fill(~valid, 1).argsort(-1)  # oldest first, what is not valid last
    unit = normalize(key.masked_fill(~valid[..., None], 0), dim=-1)
    place = torch.arange(key.shape[2], device=key.device)
    out = torch.empty_like(key[..., 0])
    for b, h in product(*map(range, key.shape[:2])):
        ordered = unit[b, h, order[b, h]]
        cosine = (ordered @ ordered.T).fill_diagonal_(0)
        newest = torch.where(cosine > ALIKE, place, 0).amax(-1)
        cosine[place, newest] = 0
        out[b, h, order[b, h]] = cosine.sum(0) / valid[b, h].sum()
    return out.masked_fill(~valid, -torch.inf).softmax(-1)


class RKVScorer(Scorer):
    """See the module."""

    def __init__(self, queries: int, kernel: int, weight: float) -> None:
        self.queries, self.kernel, self.weight = queries, kernel, weight

    def score(self, view: View) -> Tensor:
        """See `Scorer.score`."""
        n_heads, n = view.key.shape[1:3]
        pairs = (view.valid, view.near_valid), (view.age, view.near_age)
        valid, age = (torch.cat([a, b[:, None].expand(-1, n_heads, -1)], -1) for a, b in pairs)
        logits = torch.cat(recent_logits(view), -1).amax(2).masked_fill((age < self.queries)[:, :, None], -torch.inf)
        importance = pooled(mean_attention(logits, view.asked)[..., :n], self.kernel, "max")
        repeated = redundancy(torch.cat([view.key, view.near_key], 2), valid, age)[..., :n]
        score = self.weight * importance - (1 - self.weight) * repeated
        young = view.valid & (view.age < self.queries)
        return score.masked_fill(~view.valid, 0).masked_fill(young, torch.inf)


@dataclass(frozen=True)
class RKV(Selection):
    """R-KV over the newest `queries` (1..1024), pooled over `kernel` neighbours (odd, 1..1023); `weight` per cent (0..100) of the score
    is attention, the rest redundancy. Published: 8, 7, 10. Raises RecipeError for numbers out of range."""

    queries: int = 8
    kernel: int = 7
    weight: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("queries", self.queries, 1, 1024)
        check_kernel(self.kernel)
        whole_number("weight", self.weight, 0, 100)

    def build(self, layer: Layer) -> Scorer:
        """See `Selection.build`."""
        return RKVScorer(self.queries, self.kernel, self.weight / 100)
