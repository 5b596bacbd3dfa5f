"""`polar4`: PolarQuant. Direction and length apart: a rotated direction in a Lloyd-Max codebook, and one 16-bit scale.

    r = x - centre;  y = sqrt(D) . R r / |r|;  index_j = nearest level to y_j;  x_hat = scale . levels[index] @ R + centre

R is a signed Hadamard rotation (`rotation`), after which every coordinate of nearly any vector looks like N(0, 1), so that one codebook
(`lloyd`) serves all.

Layout: `codes [B, H, N, D * bits / 8]` uint8 (indices of ascending levels, see `packing`), `scale [B, H, N]` bfloat16, which holds |r|,
1/sqrt(D) and the scale rule. 4 bits at D = 128 are 66 bytes. bfloat16 and not float16, because the scale must hold norms from 1e-6 to
1e4 and beyond; its rounding adds a relative error of 2.7e-6 to a distortion of at least 0.002.

Scale rules, with u = R r / |r|, z = levels[index] / sqrt(D), and E the distortion of the codebook:

    plain      |r| (with search, the least-squares scale)     mean of <u, u_hat> = 1 - E
    matched    |r| / |z|, so that |x_hat - centre| = |r|      mean of <u, u_hat> = sqrt(1 - E), nearly
    unbiased   |r| / <u, z>                                   <u, u_hat> = 1; a random logit's error has variance E / (1 - E)
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvstack import checks
from kvstack.codecs import lloyd
from kvstack.codecs.base import Codec, Codes, Context, Field, Precision, Side
from kvstack.codecs.packing import pack, packed_size, unpack
from kvstack.codecs.rotation import rotation
from kvstack.errors import RecipeError

ScaleRule = Literal["matched", "plain", "unbiased"]
CodebookKind = Literal["exact", "e4m3"]

# Input scales that the search tries.
_CANDIDATES = tuple(1 + 0.0375 * i for i in range(-4, 5))


class PolarCodec(Codec):
    """Rotated vectors in a scalar codebook, with one scale each. levels: the codebook, ascending, `[2 ** bits]` float32."""

    def __init__(
        self,
        transform: Tensor,
        bits: int,
        scale: ScaleRule = "matched",
        codebook: CodebookKind = "e4m3",
        search: bool = False,
        centre: Tensor | None = None,
    ) -> None:
        head_dim = transform.shape[-1]
        self.fields = (Field("codes", torch.uint8, (packed_size(head_dim, bits),)), Field("scale", torch.bfloat16))
        self.transform, self.centre, self.bits, self.search = transform, centre, bits, search
        self.scale: ScaleRule = scale
        book = (lloyd.e4m3 if codebook == "e4m3" and bits <= 4 else lloyd.lloyd_max)(bits, head_dim)
        self.gain = book.gain
        self.levels = torch.tensor(book.levels, dtype=torch.float32, device=transform.device)
        self._edges = (self.levels[1:] + self.levels[:-1]) / 2 * book.gain

    @property
    def state(self) -> tuple[Tensor, ...]:
        """See `Codec.state`."""
        return (*super().state, self.levels, self._edges)

    def _encode(self, x: Tensor) -> Codes:
        x = x.float()
        if self.centre is not None:
            x = x - self.centre[:, None]
        y, rms = self._normalise(x)
        index = self._search(y) if self.search else torch.bucketize(y, self._edges, out_int32=True)
        return pack(index, self.bits), (rms * self._factor(y, self._look_up(index))).bfloat16()

    def latent(self, codes: Codes) -> Tensor:
        """See `Codec.latent`."""
        packed, scale = codes
        return self._look_up(unpack(packed, self.bits).int()) * scale[..., None]

    def _look_up(self, index: Tensor) -> Tensor:
        return self.levels.index_select(0, index.flatten()).view(index.shape)

    def _normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated vectors with mean square 1 (or 0), and the root of their mean square `[B, H, N]`."""
        assert self.transform is not None
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)  # squares of float32 do not fit float32
        rms = (norm / x.shape[-1] ** 0.5).float()
        return x / rms.clamp(min=torch.finfo(torch.float32).tiny)[..., None] @ self.transform.T, rms

    def _search(self, y: Tensor) -> Tensor:
        """Indices of the candidate scale with the greatest cosine, which is the best one under every scale rule."""
        best = torch.full(y.shape[:-1], -1.0, device=y.device)
        index = torch.zeros_like(y, dtype=torch.int32)
        for candidate in _CANDIDATES:
            trial = torch.bucketize(y * candidate, self._edges, out_int32=True)
            z = self._look_up(trial)
            cosine = (y * z).sum(-1) / torch.linalg.vector_norm(z, dim=-1)
            index = torch.where((cosine > best)[..., None], trial, index)
            best = torch.maximum(best, cosine)
        return index

    def _factor(self, y: Tensor, z: Tensor) -> Tensor:
        """What the scale rule multiplies `rms` with, `[B, H, N]`, for coordinates `y` coded as levels `z`."""
        if self.scale == "matched":
            return (y.shape[-1] / z.square().sum(-1)).sqrt()
        dot = (y * z).sum(-1)
        if self.scale == "unbiased":
            return y.shape[-1] / dot.clamp(min=0.5)  # never below 0.7 (some |y_j| is 1 or more) unless x is zero
        return dot / z.square().sum(-1) if self.search else torch.full_like(dot, self.gain)


@dataclass(frozen=True)
class Polar(Precision):
    """PolarQuant with `k` bits (1..5) for K and `v` bits for V.

    scale: the scale rule. codebook: "exact" for Lloyd-Max levels, "e4m3" for such as an FP8 tensor core takes, with 1 % more
    distortion; it has none of 5 bits, and takes the exact ones. search: try nine input scales per vector (slower, better). centre:
    subtract the profile's mean per head before encoding. seed: of the rotation, below 2^32. Raises RecipeError beyond that.
    """

    k: int = 4
    v: int = 4
    scale: ScaleRule = "matched"
    codebook: CodebookKind = "e4m3"
    search: bool = False
    centre: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        checks.whole_number("k", self.k, 1, 5)
        checks.whole_number("v", self.v, 1, 5)
        checks.choice("scale", self.scale, ("matched", "plain", "unbiased"))
        checks.choice("codebook", self.codebook, ("exact", "e4m3"))
        checks.whole_number("seed", self.seed, 0, 2**32 - 1)

    def build(self, side: Side, ctx: Context) -> Codec:
        """See `Precision.build`. Raises RecipeError when `centre` is asked for and the context has none."""
        centre = None
        if self.centre:
            if ctx.centre is None:
                raise RecipeError(
                    "`centre` needs a profile. Make one with `kvstack.calibrate.calibrate(model, batches)`, or leave it out."
                )
            centre = ctx.centre.to(ctx.device, torch.float32)
        bits = self.k if side == "key" else self.v
        transform = rotation(ctx.head_dim, self.seed, ctx.device)
        return PolarCodec(transform, bits, self.scale, self.codebook, self.search, centre)
