"""`fp8`: E4M3 numbers with one scale per token-head.

Layout: `codes [B, H, N, D]` float8_e4m3fn, `scale [B, H, N]` bfloat16 = max|x| / 448; x_hat = scale * codes. The scale is bfloat16
and not float16 because it must hold norms from 1e-6 to 1e4 and beyond; its rounding costs nothing, since codes are made with the
rounded scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstack.codecs.base import Codec, Codes, Context, Field, Precision, Side

_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448


class Fp8Codec(Codec):
    """E4M3 with one scale per vector."""

    def __init__(self, head_dim: int) -> None:
        self.fields = (Field("codes", torch.float8_e4m3fn, (head_dim,)), Field("scale", torch.bfloat16))

    def _encode(self, x: Tensor) -> Codes:
        x = x.float()
        scale = (x.abs().amax(-1) / _MAX).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        return (x / scale[..., None]).to(torch.float8_e4m3fn), scale  # at most 448 (1 + 2^-8), which rounds to 448

    def latent(self, codes: Codes) -> Tensor:
        """See `Codec.latent`."""
        numbers, scale = codes
        return numbers.float() * scale[..., None]


@dataclass(frozen=True)
class Fp8(Precision):
    """8-bit floating point, the default of serving engines."""

    def build(self, side: Side, ctx: Context) -> Codec:
        """See `Precision.build`."""
        return Fp8Codec(ctx.head_dim)
