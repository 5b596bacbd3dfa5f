"""`tri`: TriAttention (arXiv 2604.04921). How much the average future query wants a key, by calibrated query centres.

A query of band f is its centre m_f, turned by RoPE, and a rest of random direction and length |q_f| - |m_f|. The mean logit of a key
over future distances D = {1, 2, 4, ..., 65536} is then a trigonometric series in the distance. Folded (the mean over D commutes with
the sum over bands, and the key's own phase is in the cached key already), with t the position of the next query and s RoPE's scale:

    W_f = s m_f e^{i t w_f} mean_D e^{i d w_f}        c_f = s (a_f - |m_f|),  a_f the mean length of band f
    score(k) = sum_f Re W_f Re k_f + Im W_f Im k_f + c_f |k_f|

for a cached key k, turned: no position of it, no inverse rotation, no loop over offsets. Scores of every query head are standardised
over the candidates, and the greatest of a group's is the KV head's.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvstack.rope import Rope
from kvstack.scorers.base import Layer, QueryStats, Scorer, Selection, View, by_group, standardised

OFFSETS = tuple(2**i for i in range(17))  # equation of the paper's future average


def fold(stats: QueryStats, rope: Rope, seen: Tensor) -> tuple[Tensor, Tensor]:
    """`W [B, Hq, F]` complex64 and `c [Hq, F]` float32 for rows whose next query is at position `seen [B]`."""
    offsets = torch.tensor(OFFSETS, device=seen.device)
    turn = rope.phase(seen[:, None] + offsets).mean(1)  # [B, F]: the phase of each, then their mean, in the order of the exact sum
    scale = rope.scale.float().to(seen.device)
    return stats.mean * turn[:, None] * scale, (stats.norm - stats.mean.abs()) * scale


class TriScorer(Scorer):
    """See the module."""

    ordered = False

    def __init__(self, stats: QueryStats, rope: Rope, heads: int) -> None:
        self.stats, self.rope, self.heads = stats, rope, heads

    def linear(self, seen: Tensor) -> tuple[Rope, Tensor, Tensor]:
        """See `Scorer.linear`."""
        w, c = fold(self.stats, self.rope, seen)
        return self.rope, by_group(self.rope.vectors(w), self.heads), c.unflatten(0, (self.heads, -1)).contiguous()

    def raw(self, view: View) -> Tensor:
        """Scores of every query head, `[B, H, G, N]`."""
        _, w, c = self.linear(view.seen.to(view.key.device))
        keys = view.key.masked_fill(~view.valid[..., None], 0)
        return torch.einsum("bhgd,bhnd->bhgn", w, keys) + torch.einsum("hgf,bhnf->bhgn", c, self.rope.bands(keys).abs())

    def score(self, view: View) -> Tensor:
        """See `Scorer.score`."""
        return standardised(self.raw(view), view.valid[:, :, None]).amax(2)


@dataclass(frozen=True)
class Tri(Selection):
    """TriAttention. Published: heads=shared, no sinks, no window."""

    needs: ClassVar[tuple[str, ...]] = ("stats",)

    def build(self, layer: Layer) -> Scorer:
        """See `Selection.build`."""
        assert layer.stats is not None
        return TriScorer(layer.stats, layer.rope, layer.heads)
