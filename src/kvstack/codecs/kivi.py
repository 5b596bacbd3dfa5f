"""`kivi2`: KIVI's integers, per channel for K and per token for V (arXiv 2402.02750). A peer to compare with.

Layout, with g = `group` and codes packed along D (see `packing`), each scale bfloat16 and each zero point int16 as in `minmax`:

    K   block of g tokens   codes [B, H, N/g, g, D * bits / 8]   scale, zero [B, H, N/g, D]    one pair per channel and block
    V   block of 1 token    codes [B, H, N, D * bits / 8]        scale, zero [B, H, N, D/g]    one pair per g channels of a token

The paper's residual of 128 tokens that stay exact is the recipe's window: write `kivi2(window=128)`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstack import checks
from kvstack.codecs.base import Codec, Codes, Context, Field, Precision, Side
from kvstack.codecs.minmax import dequantise, quantise
from kvstack.codecs.packing import pack, packed_size, unpack
from kvstack.errors import RecipeError


class KiviKeyCodec(Codec):
    """Per channel: a scale and a zero point for each channel over the tokens of a block."""

    def __init__(self, head_dim: int, bits: int, group: int) -> None:
        self.bits, self.block = bits, group
        self.fields = (
            Field("codes", torch.uint8, (group, packed_size(head_dim, bits))),
            Field("scale", torch.bfloat16, (head_dim,)),
            Field("zero", torch.int16, (head_dim,)),
        )

    def _encode(self, x: Tensor) -> Codes:
        codes, scale, zero = quantise(x.unflatten(-2, (x.shape[-2] // self.block, self.block)), self.bits, -2)
        return pack(codes, self.bits), scale, zero

    def latent(self, codes: Codes) -> Tensor:
        """See `Codec.latent`."""
        packed, scale, zero = codes
        return dequantise(unpack(packed, self.bits), scale, zero, -2).flatten(-3, -2)


class KiviValueCodec(Codec):
    """Per token: a scale and a zero point for each group of channels."""

    def __init__(self, head_dim: int, bits: int, group: int) -> None:
        self.bits, self.group = bits, group
        self.fields = (
            Field("codes", torch.uint8, (packed_size(head_dim, bits),)),
            Field("scale", torch.bfloat16, (head_dim // group,)),
            Field("zero", torch.int16, (head_dim // group,)),
        )

    def _encode(self, x: Tensor) -> Codes:
        codes, scale, zero = quantise(x.unflatten(-1, (-1, self.group)), self.bits, -1)
        return pack(codes.flatten(-2), self.bits), scale, zero

    def latent(self, codes: Codes) -> Tensor:
        """See `Codec.latent`."""
        packed, scale, zero = codes
        return dequantise(unpack(packed, self.bits).unflatten(-1, (-1, self.group)), scale, zero, -1).flatten(-2)


@dataclass(frozen=True)
class Kivi(Precision):
    """Integers of `bits` (2..8) in groups of `group` (2..1024) tokens for K and channels for V. Raises RecipeError beyond that."""

    bits: int = 2
    group: int = 32

    def __post_init__(self) -> None:
        checks.whole_number("bits", self.bits, 2, 8)
        checks.whole_number("group", self.group, 2, 1024)

    def build(self, side: Side, ctx: Context) -> Codec:
        """See `Precision.build`. Raises RecipeError when `group` does not divide the head size."""
        if ctx.head_dim % self.group:
            raise RecipeError(f"`group` {self.group} does not divide the head size {ctx.head_dim}. Give a group that does, such as 16.")
        return (KiviKeyCodec if side == "key" else KiviValueCodec)(ctx.head_dim, self.bits, self.group)
