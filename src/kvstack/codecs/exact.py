"""Vectors stored as they are: `exact` in the model's own dtype (lossless), `bf16` and `fp16` rounded to 16 bits.

Layout: one field, `x [B, H, N, D]`. These are also the codecs of the sinks and of the recent window.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvstack import checks
from kvstack.codecs.base import Codec, Codes, Context, Field, Precision, Side

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ExactCodec(Codec):
    """Stores `x` in `dtype`; lossless when that is the model's dtype. Raises BadInputError when a number does not fit."""

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.fields = (Field("x", dtype, (head_dim,)),)

    def _encode(self, x: Tensor) -> Codes:
        stored = x.to(self.dtype)
        if x.dtype != self.dtype:
            checks.finite(stored, f"Some are beyond the range of {self.dtype}: use `bf16` or `exact`.")
        return (stored,)

    def latent(self, codes: Codes) -> Tensor:
        """See `Codec.latent`."""
        return codes[0].float()


@dataclass(frozen=True)
class Exact(Precision):
    """16-bit or lossless storage. dtype: "model" keeps the model's own dtype, whatever it is. Raises RecipeError for other words."""

    dtype: Literal["model", "bf16", "fp16"] = "model"

    def __post_init__(self) -> None:
        checks.choice("dtype", self.dtype, ("model", *_DTYPES))

    def build(self, side: Side, ctx: Context) -> Codec:
        """See `Precision.build`."""
        return ExactCodec(ctx.head_dim, _DTYPES.get(self.dtype, ctx.dtype))
