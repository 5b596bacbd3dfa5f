"""`h2o`: H2O (arXiv 2306.14048). Heavy hitters stay: tokens that got the most attention so far.

One number beside every token-head: the attention it got, summed over all queries since it came, mean over the group. That is its score.
The published recent half of the budget is the exact window: write a `window` of half the `budget`.
"""

from dataclasses import dataclass

from torch import Tensor

from kvstack.scorers.base import Layer, Scorer, Selection, View, by_group


class H2OScorer(Scorer):
    """See the module. records: the accumulated attention."""

    records = 1
    observes = True
    ordered = False

    def score(self, view: View) -> Tensor:
        """See `Scorer.score`."""
        return view.records[..., 0].masked_fill(~view.valid, 0)

    def observe(self, records: Tensor, weights: Tensor) -> Tensor:
        """See `Scorer.observe`."""
        return records + by_group(weights, records.shape[1]).float().sum(3).mean(2)[..., None]


@dataclass(frozen=True)
class H2O(Selection):
    """Accumulated attention. Published: half of the budget is the window."""

    def build(self, layer: Layer) -> Scorer:
        """See `Selection.build`."""
        return H2OScorer()
