"""`oracle`: tokens that will be attended to stay. For evaluations only: it reads the queries that are still to come.

score = the greatest attention, over the queries from the row's next position on and over the group, that a key gets under a full cache:
exp(q k scale - lse). Zero where no queries are left. No scorer of one pass can know more; it is a bound to compare with, not a method.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvstack.scorers.base import Future, Layer, Scorer, Selection, View, by_group

CHUNK = 512  # queries whose logits are held at once


class OracleScorer(Scorer):
    """See the module."""

    ordered = False

    def __init__(self, future: Future) -> None:
        self.future = future

    def score(self, view: View) -> Tensor:
        """See `Scorer.score`."""
        heads, device = view.key.shape[1], view.key.device
        key = view.key.masked_fill(~view.valid[..., None], 0)
        greatest = torch.full_like(key[..., 0], -torch.inf)
        for start in range(int(view.seen.min()), self.future.lse.shape[-1], CHUNK):
            q = by_group(self.future.queries[:, :, start : start + CHUNK].to(device).float(), heads)
            lse = by_group(self.future.lse[:, :, start : start + CHUNK].to(device), heads)
            position = torch.arange(start, start + lse.shape[-1], device=device)
            come = (position >= view.seen.to(device)[:, None])[:, None, None] & (lse > -torch.inf)  # [B, H, G, T]
            logits = torch.einsum("bhgtd,bhnd->bhgtn", q, key) * view.scale - lse[..., None]
            greatest = greatest.maximum(logits.masked_fill(~come[..., None], -torch.inf).amax((2, 3)))
        return greatest.exp()


@dataclass(frozen=True)
class Oracle(Selection):
    """The greatest attention still to come. For evaluations only."""

    needs: ClassVar[tuple[str, ...]] = ("future",)

    def build(self, layer: Layer) -> Scorer:
        """See `Selection.build`."""
        assert layer.future is not None
        return OracleScorer(layer.future)
