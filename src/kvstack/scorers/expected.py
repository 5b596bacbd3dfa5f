"""`expected`: Expected Attention (arXiv 2510.00636), with calibrated statistics. The mean attention that future queries pay, times |v|.

Queries before RoPE are taken as Gaussian, of mean m and covariance S. With T the mean of RoPE's rotations (scale included) over the
`future` positions from the next query's on, those after RoPE have mean T m and covariance T S T^t, and the mean of the exponentiated
logits of a key k is the exponential of

    scale (T m) k + scale^2 / 2 k^t (T S T^t) k

for the key as it is cached. The softmax of that over the candidates, mean over the group, times |v| is the score. The published form
takes m and S from the prompt; that with statistics made beforehand is kvpress's.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvstack.checks import whole_number
from kvstack.rope import Rope
from kvstack.scorers.base import Layer, QueryStats, Scorer, Selection, View


class ExpectedScorer(Scorer):
    """See the module."""

    values = True
    ordered = False

    def __init__(self, stats: QueryStats, rope: Rope, future: int) -> None:
        assert stats.covariance is not None
        self.mean, self.covariance = stats.mean, stats.covariance
        self.rope, self.future = rope, future

    def ahead(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `[U, Hq, D]` and covariance `[U, Hq, D, D]` of the queries after RoPE from `position [U]` on."""
        steps = torch.arange(self.future, device=position.device)
        turn = self.rope.phase(position[:, None] + steps).mean(1) * self.rope.scale.float().to(position.device)  # [U, F]

        def turned(x: Tensor) -> Tensor:  # [U, Hq, D, D] times T^t
            return self.rope.vectors(self.rope.bands(x) * turn[:, None, None])

        return self.rope.vectors(self.mean * turn[:, None]), turned(turned(self.covariance[None]).mT)

    def score(self, view: View) -> Tensor:
        """See `Scorer.score`."""
        heads, invalid = view.key.shape[1], ~view.valid
        key = view.key.masked_fill(invalid[..., None], 0)
        position, which = view.seen.to(key.device).unique(return_inverse=True)
        means, covariances = (x.unflatten(1, (heads, -1)) for x in self.ahead(position))
        rows = []
        for k, u in zip(key, which, strict=True):  # one by one: keys times covariances are D numbers for every token of a query head
            linear = torch.einsum("hgd,hnd->hgn", means[u], k)
            square = torch.einsum("hgnd,hnd->hgn", k[:, None] @ covariances[u], k)
            rows.append(view.scale * linear + view.scale**2 / 2 * square)
        attention = torch.stack(rows).masked_fill(invalid[:, :, None], -torch.inf).softmax(-1).mean(2)
        assert view.value is not None
        length: Tensor = view.value.norm(dim=-1)
        return (attention * length).masked_fill(invalid, 0)


@dataclass(frozen=True)
class Expected(Selection):
    """Expected Attention over the next `future` positions (1..65536). Published: 512, with 4 sinks. Raises RecipeError beyond that."""

    needs: ClassVar[tuple[str, ...]] = ("stats", "covariance")
    future: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("future", self.future, 1, 65536)

    def build(self, layer: Layer) -> Scorer:
        """See `Selection.build`."""
        assert layer.stats is not None
        return ExpectedScorer(layer.stats, layer.rope, self.future)
