"""`int4` and its like: plain integers between the minimum and the maximum of each vector; no rotation. A peer to compare with.

Layout: `codes [B, H, N, D * bits / 8]` uint8 (see `packing`), `scale [B, H, N]` bfloat16, `zero [B, H, N]` int16; x_hat = scale *
(codes + zero). The zero point is a whole number of steps, which is exact; a minimum stored in 16-bit floating point would be off by
many steps where the mean of a vector is large. The scale is bfloat16 because float16 underflows below norms of 1e-5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstack import checks
from kvstack.codecs.base import Codec, Codes, Context, Field, Precision, Side
from kvstack.codecs.packing import pack, packed_size, unpack

# The least scale is max|x| / _STEPS, so that the zero point fits int16 also where all numbers are (nearly) the same.
_STEPS = 32_000


def quantise(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8, shaped as `x`), scale (bfloat16) and zero point (int16), both shaped as `x` without `dim`."""
    x, top = x.float(), 2**bits - 1
    low, high = x.aminmax(dim=dim, keepdim=True)
    step = torch.maximum(high / top - low / top, torch.maximum(high, -low) / _STEPS)
    scale = step.clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    zero = (low / scale).round()
    codes = ((x / scale).round() - zero).clamp(0, top)
    return codes.to(torch.uint8), scale.squeeze(dim), zero.to(torch.int16).squeeze(dim)


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor, dim: int) -> Tensor:
    """The numbers, float32, that `quantise` coded."""
    return (codes + zero.unsqueeze(dim)) * scale.float().unsqueeze(dim)


class MinMaxCodec(Codec):
    """Uniform levels from the minimum to the maximum of each vector."""

    def __init__(self, head_dim: int, bits: int) -> None:
        self.bits = bits
        self.fields = (
            Field("codes", torch.uint8, (packed_size(head_dim, bits),)),
            Field("scale", torch.bfloat16),
            Field("zero", torch.int16),
        )

    def _encode(self, x: Tensor) -> Codes:
        codes, scale, zero = quantise(x, self.bits, -1)
        return pack(codes, self.bits), scale, zero

    def latent(self, codes: Codes) -> Tensor:
        """See `Codec.latent`."""
        packed, scale, zero = codes
        return dequantise(unpack(packed, self.bits), scale, zero, -1)


@dataclass(frozen=True)
class MinMax(Precision):
    """Integers of `bits` (2..8) with a scale and a zero point per token-head. Raises RecipeError for other numbers of bits."""

    bits: int = 4

    def __post_init__(self) -> None:
        checks.whole_number("bits", self.bits, 2, 8)

    def build(self, side: Side, ctx: Context) -> Codec:
        """See `Precision.build`. Raises RecipeError when the head size is no multiple of 8."""
        return MinMaxCodec(ctx.head_dim, self.bits)
