"""`turboquant4`: TurboQuant as published, with its QJL stage (arXiv 2504.19874). The negative control of `polar`.

One bit of each coordinate is spent on an unbiased sketch of what the other bits left over:

    z = plain PolarQuant of x in bits - 1, rotated;  r = R x - z;  r_hat = c . |r| . S^T sign(S r);  x_hat = (z + r_hat) @ R

gaussian: S has independent N(0, 1) entries and c = sqrt(pi / 2) / D. orthogonal: S is a random rotation and c = 1 / (D E|o|), where o
is a coordinate of a uniform unit vector. Both are unbiased over S; the variance of a logit's error is pi/2 (or about pi/2 - 1) times
the distortion at bits - 1, which is more than that of `polar` at the same bits with `scale=unbiased`, which is unbiased too.

Layout: `codes [B, H, N, D * (bits - 1) / 8]` and `scale [B, H, N]` as in `polar`, `signs [B, H, N, D / 8]` uint8 (see `packing`), `norm
[B, H, N]` bfloat16 = |r|. As in the paper the query is sketched and not the cache: latents are `[z, |r| sign(S r)]`, Dl = 2 D, and the
transform is `[R; c S R]`.
"""

from dataclasses import dataclass
from functools import cache
from math import exp, lgamma, pi, sqrt
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvstack import checks
from kvstack.codecs.base import Codec, Codes, Context, Field, Precision, Side
from kvstack.codecs.packing import pack, packed_size, unpack
from kvstack.codecs.polar import PolarCodec
from kvstack.codecs.rotation import rotation

Sketch = Literal["gaussian", "orthogonal"]


@cache
@torch.inference_mode(False)
def _sketch(kind: Sketch, head_dim: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """S, and the transform `[R; c S R]` of latents."""
    s = np.random.default_rng([seed, 1]).standard_normal((head_dim, head_dim))  # [seed, 1]: another stream than the signs of R
    c = sqrt(pi / 2) / head_dim
    if kind == "orthogonal":
        s = np.linalg.qr(s)[0].T  # QR chooses the signs of its rows, which cancel in S^T sign(S r)
        c = sqrt(pi) * exp(lgamma((head_dim + 1) / 2) - lgamma(head_dim / 2)) / head_dim
    r = rotation(head_dim, seed, device)
    sketch = torch.tensor(s, dtype=torch.float32, device=device)
    return sketch, torch.cat([r, c * sketch @ r])


class TurboQuantCodec(Codec):
    """`bits - 1` bits of PolarQuant and a 1-bit sketch of the residual."""

    def __init__(self, head_dim: int, bits: int, sketch: Sketch, seed: int, device: torch.device) -> None:
        self.first = PolarCodec(rotation(head_dim, seed, device), bits - 1, "plain", "exact")
        self.sketch, self.transform = _sketch(sketch, head_dim, seed, device)
        signs = Field("signs", torch.uint8, (packed_size(head_dim, 1),))
        self.fields = (*self.first.fields, signs, Field("norm", torch.bfloat16))

    @property
    def state(self) -> tuple[Tensor, ...]:
        """See `Codec.state`."""
        return (*super().state, *self.first.state, self.sketch)

    def _encode(self, x: Tensor) -> Codes:
        codes = self.first.encode(x)
        residual = self.first.project(x) - self.first.latent(codes)
        signs = residual @ self.sketch.T >= 0
        norm = torch.linalg.vector_norm(residual, dim=-1, dtype=torch.float64)  # squares of float32 do not fit float32
        return (*codes, pack(signs.to(torch.uint8), 1), norm.bfloat16())

    def latent(self, codes: Codes) -> Tensor:
        """See `Codec.latent`."""
        *first, signs, norm = codes
        signed = unpack(signs, 1).float() * 2 - 1
        return torch.cat([self.first.latent(tuple(first)), signed * norm[..., None]], -1)


@dataclass(frozen=True)
class TurboQuant(Precision):
    """TurboQuant with `bits` (2..5), of which one is the sign of a `sketch`. seed: of rotation and sketch, below 2^32.

    Raises RecipeError beyond that.
    """

    bits: int = 4
    sketch: Sketch = "gaussian"
    seed: int = 0

    def __post_init__(self) -> None:
        checks.whole_number("bits", self.bits, 2, 5)
        checks.choice("sketch", self.sketch, ("gaussian", "orthogonal"))
        checks.whole_number("seed", self.seed, 0, 2**32 - 1)

    def build(self, side: Side, ctx: Context) -> Codec:
        """See `Precision.build`. Raises RecipeError when the head size is no multiple of 8."""
        return TurboQuantCodec(ctx.head_dim, self.bits, self.sketch, self.seed, ctx.device)
