"""`streaming`: StreamingLLM (arXiv 2309.17453). The newest tokens stay, and of the first ones the store's sinks.

score = -age. It looks at no key. Published: 4 sinks; there keys are turned again to their place in the cache, here they keep the
position they came with, as everywhere in this library.
"""

from dataclasses import dataclass

from torch import Tensor

from kvstack.scorers.base import Layer, Scorer, Selection, View


class StreamingScorer(Scorer):
    """See the module."""

    def score(self, view: View) -> Tensor:
        """See `Scorer.score`."""
        return -view.age.float()


@dataclass(frozen=True)
class Streaming(Selection):
    """StreamingLLM. Published: 4 sinks."""

    def build(self, layer: Layer) -> Scorer:
        """See `Selection.build`."""
        return StreamingScorer()
