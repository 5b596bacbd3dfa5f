"""`random`: any tokens stay. What every other scorer must beat.

Scores are uniform, drawn on the CPU, so that they are the same on every device. What is drawn depends on the seed, on the layer, and on
how many tokens the row has seen: runs repeat, layers and evictions differ, and a row draws the same alone and in a batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvstack.checks import whole_number
from kvstack.scorers.base import Layer, Scorer, Selection, View


class RandomScorer(Scorer):
    """See the module."""

    def __init__(self, seed: int, layer: int) -> None:
        self.seed, self.layer = seed, layer

    def score(self, view: View) -> Tensor:
        """See `Scorer.score`."""
        scores = torch.zeros_like(view.key[..., 0])
        for row, valid, seen in zip(scores, view.valid, view.seen.tolist(), strict=True):
            seed = np.random.SeedSequence((self.seed, self.layer, seen)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(seed[0]))
            for head, real in zip(row, valid, strict=True):
                head[real] = torch.rand(int(real.sum()), generator=generator).to(row.device)
        return scores


@dataclass(frozen=True)
class Random(Selection):
    """Any tokens stay, by `seed` (0..2^32 - 1). Raises RecipeError beyond that."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("seed", self.seed, 0, 2**32 - 1)

    def build(self, layer: Layer) -> Scorer:
        """See `Selection.build`."""
        return RandomScorer(self.seed, layer.index)
