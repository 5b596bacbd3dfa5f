"""`knorm`: keys of small norm stay (arXiv 2406.11430). score = -|k|, of the key that attention reads."""

from dataclasses import dataclass

from torch import Tensor

from kvstack.scorers.base import Layer, Scorer, Selection, View


class KNormScorer(Scorer):
    """See the module."""

    ordered = False

    def score(self, view: View) -> Tensor:
        """See `Scorer.score`."""
        norm: Tensor = view.key.norm(dim=-1)
        return -norm.masked_fill(~view.valid, 0)


@dataclass(frozen=True)
class KNorm(Selection):
    """Keys of small norm stay."""

    def build(self, layer: Layer) -> Scorer:
        """See `Selection.build`."""
        return KNormScorer()
