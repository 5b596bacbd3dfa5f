"""Attention of a decode step: few new queries over pages of codes and a few exact tokens, in three launches.

    project   rotate the queries, once                                  `rotate`
    attend    partials over pages, and over the exact tokens            `hopper` or `portable`; `exact`
    merge     one softmax over all of them, rotated back, once          `merge`

Which kernel reads the pages is decided here, by what the device can do and what the codecs are, and can be asked (`choose`). Without a
GPU the torch twin computes the same. The grid depends on shapes alone and lengths are read on the device, so a CUDA graph can replay a
step while tokens are added.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.codecs.exact import ExactCodec
from kvstack.codecs.polar import PolarCodec
from kvstack.kernels import reference
from kvstack.kernels.codes import from_page
from kvstack.kernels.device import processors
from kvstack.kernels.pages import PAGE, Pages, read
from kvstack.kernels.reference import Shape, Side

LOG2_E = math.log2(math.e)
PORTABLE_OCCUPANCY = 4  # programs a multiprocessor


@dataclass(frozen=True)
class Body:
    """Tokens in pages, with the codecs that read them. cum: `schedule` of the pages' lengths; kept by whoever changes them."""

    pages: Pages
    key: Codec
    value: Codec
    cum: Tensor

    @staticmethod
    def of(pages: Pages, key: Codec, value: Codec) -> "Body":
        """A body with the schedule of the lengths as they are now."""
        return Body(pages, key, value, schedule(pages.lengths, pages.pool.shape[1]))

    def over(self, pages: Pages, cum: Tensor) -> "Body":
        """The same codecs over other pages of the same format, with what kernels need of the codecs, which is worked out once."""
        needed = {"reference": (), "portable": ("signs", "levels"), "hopper": ("signs", "levels", "tables")}[self.path.name]
        body = Body(pages, self.key, self.value, cum)
        body.__dict__.update({name: getattr(self, name) for name in ("path", *needed)})  # where cached properties keep their values
        return body

    @cached_property
    def path(self) -> "Path":
        """The kernel that will read it."""
        return choose(self.pages.pool.device, self.key, self.value)

    @property
    def half(self) -> torch.dtype:
        """Type of the numbers of a side with 16 bits."""
        return next((c.dtype for c in (self.key, self.value) if isinstance(c, ExactCodec)), torch.bfloat16)

    def sides(self) -> tuple[Side, Side, Tensor]:
        """For the reference: unpacked codes of K and V, and which of them are there, `[B, 1, N]` bool."""
        k, v, scales = read(self.pages)
        key = Side(self.key, from_page(self.key, k, scales[..., 0]))
        value = Side(self.value, from_page(self.value, v, scales[..., 1]))
        return key, value, torch.arange(k.shape[2], device=k.device) < self.pages.lengths[:, None, None]

    @cached_property
    def signs(self) -> tuple[Tensor | None, Tensor | None]:
        """Signs `[D]` of the rotations of K and V."""
        from kvstack.kernels.rotate import signs

        return signs(self.key), signs(self.value)

    @cached_property
    def levels(self) -> tuple[Tensor, Tensor]:
        """Levels `[2 ** bits]` float32 of K and V; with 8 bits the codes are numbers, and nobody looks at levels."""
        none = self.cum.new_zeros(8, dtype=torch.float32)
        key, value = (c.levels if isinstance(c, PolarCodec) else none for c in (self.key, self.value))
        return key, value

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Hopper's byte tables of the levels of K and V."""
        from kvstack.kernels.hopper import table

        return table(self.levels[0], self.pages.format.k), table(self.levels[1], self.pages.format.v)


@dataclass(frozen=True)
class Exact:
    """Exact tokens: `k, v [B, H, S, D]` and which of them a query sees, `seen [B or 1, T or 1, S]` bool."""

    k: Tensor
    v: Tensor
    seen: Tensor


@dataclass(frozen=True)
class Path:
    """name: the kernel that reads pages. reason: why that one."""

    name: Literal["hopper", "portable", "reference"]
    reason: str


def schedule(lengths: Tensor, heads: int) -> Tensor:
    """`cum [B + 1]` int32: pages of all heads before row b, for `lengths [B]`; the last is their number."""
    cum = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum((lengths + PAGE - 1) // PAGE * heads, 0, dtype=torch.int32, out=cum[1:])
    return cum


def choose(device: torch.device, *codecs: Codec) -> Path:
    """The path for codes of these codecs on `device`."""
    if device.type != "cuda":
        return Path("reference", f"there is no kernel for {device.type} devices")
    if find_spec("triton") is None:
        return Path("reference", "Triton is not installed; `pip install triton`")
    if any(isinstance(c, ExactCodec) and c.dtype.itemsize == 4 for c in codecs):
        return Path("reference", "no kernel reads pages of 32 bits")
    if torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        if any(isinstance(c, ExactCodec) for c in codecs):
            return Path("reference", "only the kernel for Hopper GPUs (sm_90) reads pages of 16 bits")
        return Path("portable", f"{torch.cuda.get_device_name(device)} is no Hopper GPU (sm_90)")
    if any(isinstance(c, PolarCodec) and not torch.equal(c.levels.to(torch.float8_e4m3fn).float(), c.levels) for c in codecs):
        return Path("portable", "the codebook is not of E4M3 numbers; without `codebook=exact` it is faster")
    return Path("hopper", "Hopper GPU, and numbers that its tensor cores take")


def decode(
    q: Tensor, body: Body | None, exact: Exact | None, shape: Shape, sink: Tensor | None = None, path: Path | None = None
) -> Tensor:
    """Attention `[B, Hq, T, D]`, in the type of `q [B, Hq, T, D]`, over a body and exact tokens, either of which may be None.

    sink: see `reference.merge`. path: of `choose`, which is asked when it is None.
    """
    assert body is not None or exact is not None
    if path is None:
        path = choose(q.device) if body is None else body.path
    if path.name == "reference":
        return _decode_reference(q, body, exact, shape, sink)
    from kvstack.kernels import hopper, portable  # these need Triton
    from kvstack.kernels.exact import attend_exact
    from kvstack.kernels.merge import merge_partials
    from kvstack.kernels.rotate import project

    b, hq, t, d = q.shape
    parts = cum = signs = centre = None
    programs = 0
    heads = exact.k.shape[1] if exact is not None else 0
    if body is not None:
        pages, cum, heads = body.pages, body.cum, body.pages.pool.shape[1]
        segments, rows = b * heads, hq // heads * t
        query = q, body.signs[0], body.key.centre, shape.scale * LOG2_E
        programs = processors(q.device) * (hopper.occupancy(pages.format, rows)[0] if path.name == "hopper" else PORTABLE_OCCUPANCY)
        parts = (
            q.new_empty(programs + segments, rows, d, dtype=torch.float32),
            q.new_empty(programs + segments, rows, dtype=torch.float32),
        )
        if path.name == "hopper":
            hopper.decode_pages(*query, pages, cum, *body.tables, *parts, programs, shape.softcap, body.half)
        else:
            portable.decode_pages(*project(*query, heads), pages, cum, *body.levels, *parts, programs, shape.softcap)
        signs, centre = body.signs[1], body.value.centre
    near = None if exact is None else attend_exact(q, exact.k, exact.v, exact.seen, shape.scale, shape.softcap)
    out = torch.empty(b, hq, t, d, dtype=q.dtype, device=q.device)
    merge_partials(out, parts, near, cum, programs, signs, centre, sink, heads)
    return out


def _decode_reference(q: Tensor, body: Body | None, exact: Exact | None, shape: Shape, sink: Tensor | None) -> Tensor:
    parts = []
    if body is not None:
        key, value, below = body.sides()
        parts.append(reference.attend(q, key, value, below, shape))
    if exact is not None:
        key, value = (Side(ExactCodec(x.shape[-1], x.dtype), (x,)) for x in (exact.k, exact.v))
        parts.append(reference.attend(q, key, value, exact.seen, shape))
    return reference.merge(parts, sink).out.to(q.dtype)
