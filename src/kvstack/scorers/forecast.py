"""`forecast`: a calibrated forecast of the greatest attention that a token will still get. The least promising leave.

When a token is written, a small network of its layer and KV head reads its key before RoPE and its value, x = [k, v], and says how the
greatest attention probability that any later query of the KV head gives to it will fall with its age t in tokens:

    h = gelu(x A + a)        (p, r) = h B + b        forecast(t) = p + r log(1 + t / 128)

a logit. Three numbers stay beside every token-head, p, r and its position / 128, and a score is a point on that line: an eviction reads
no key, and scores need no calibration of queries. They are probabilities, so they compare across heads and layers, and by default all
of them compete (heads=pooled). How the networks are trained is the business of `calibrate/forecast.py`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import gelu

from kvstack.rope import Rope
from kvstack.scorers.base import ForecastWeights, Heads, Layer, Scorer, Selection, View

SPAN = 128  # tokens in a unit of age: records are float16, and at position 4096 still exact to 2 tokens


def line(x: Tensor, weights: ForecastWeights) -> Tensor:
    """p and r `[..., H, N, 2]` of keys before RoPE and values `x [..., H, N, 2 D]` float32."""
    hidden = gelu(torch.einsum("...hnd,hdw->...hnw", x, weights.hidden) + weights.hidden_bias[:, None])
    return torch.einsum("...hnw,hwo->...hno", hidden, weights.out) + weights.out_bias[:, None]


def forecast(line: Tensor, age: Tensor) -> Tensor:
    """The logit `[...]` that a `line [..., 2]` says at an `age [...]`, in units of `SPAN` tokens."""
    return line[..., 0] + line[..., 1] * age.log1p()


class ForecastScorer(Scorer):
    """See the module. records: p, r, position / 128."""

    records = 3
    record_dtype = torch.float16
    ordered = False

    def __init__(self, weights: ForecastWeights, rope: Rope) -> None:
        self.weights, self.rope = weights, rope

    def begin(self, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
        """See `Scorer.begin`."""
        x = torch.cat([self.rope.unturn(key, position[:, None]), value.float()], -1)
        born = (position / SPAN)[:, None, :, None].expand(*x.shape[:-1], 1)
        return torch.cat([line(x, self.weights), born], -1)

    def score(self, view: View) -> Tensor:
        """See `Scorer.score`."""
        records = view.records.masked_fill(~view.valid[..., None], 0)
        age = view.seen.to(records.device)[:, None, None] / SPAN - records[..., 2]
        return forecast(records[..., :2], age.clamp_min(0))  # the place is rounded, and may lie ahead of what was seen


@dataclass(frozen=True)
class Forecast(Selection):
    """The greatest attention to come, as calibrated networks forecast it."""

    needs: ClassVar[tuple[str, ...]] = ("forecast",)
    heads: Heads = "pooled"

    def build(self, layer: Layer) -> Scorer:
        """See `Selection.build`."""
        assert layer.forecast is not None
        return ForecastScorer(layer.forecast, layer.rope)
