"""`keydiff`: KeyDiff (arXiv 2504.15364). Keys that point elsewhere than the others stay.

score = -cos(k, anchor), the anchor being the mean of the unit keys of the candidates of a KV head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvstack.scorers.base import Layer, Scorer, Selection, View


class KeyDiffScorer(Scorer):
    """See the module."""

    ordered = False

    def score(self, view: View) -> Tensor:
        """See `Scorer.score`."""
        unit = normalize(view.key.masked_fill(~view.valid[..., None], 0), dim=-1)
        anchor = normalize(unit.sum(2), dim=-1)  # [B, H, D]: the mean's length has no part in the cosine
        return -torch.einsum("bhnd,bhd->bhn", unit, anchor)


@dataclass(frozen=True)
class KeyDiff(Selection):
    """Keys that differ from the mean stay."""

    def build(self, layer: Layer) -> Scorer:
        """See `Selection.build`."""
        return KeyDiffScorer()
