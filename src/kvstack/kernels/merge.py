"""Partial results of a decode step into its output: what one softmax over all tiers gives.

Partials over pages are in the rotated space of the V codec, in slots of the schedule (`schedule.py`); they are merged first and rotated
back once. Partials over exact tokens are in the plain space. One program a query row; nothing is written but the output.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvstack.kernels.rotate import hadamard


@triton.jit
def _add(acc, weight, top, part, lse):
    """Sums `acc [D]` and `weight`, relative to 2^top, with those of partials `part [n, D]` and `lse [n]`."""
    new_top = tl.maximum(top, tl.max(lse, 0))
    w = tl.exp2(lse - new_top)
    fade = tl.exp2(top - new_top)
    return acc * fade + tl.sum(part * w[:, None], 0), weight * fade + tl.sum(w, 0), new_top


@triton.jit
def _merge(
    body_ptr,  # [C + B * H, R, D] float32
    body_lse_ptr,  # [C + B * H, R]
    cum_ptr,  # [B + 1] int32
    signs_ptr,  # [D]
    centre_ptr,  # [H, D]
    exact_ptr,  # [B * H, E, R, D] float32
    exact_lse_ptr,  # [B * H, E, R]
    sink_ptr,  # [Hq]
    out_ptr,  # [B * H, R, D]
    B,
    H,
    R,
    T,
    E,
    programs,
    D: tl.constexpr,
    LOG2_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BODY: tl.constexpr,
    ROTATE: tl.constexpr,
    CENTRE: tl.constexpr,
    EXACT: tl.constexpr,
    SINK: tl.constexpr,
):
    segment = tl.program_id(0) // R
    r = tl.program_id(0) % R
    b, h = segment // H, segment % H
    d = tl.arange(0, D)
    one = tl.arange(0, BLOCK)
    top = -1e30  # a floor: where nothing is seen, all weights are zero and not NaN
    weight = 0.0
    acc = tl.zeros([D], tl.float32)
    if BODY:
        start = tl.load(cum_ptr + b)
        pages = (tl.load(cum_ptr + b + 1) - start) // H
        start += h * pages
        share = tl.cdiv(tl.load(cum_ptr + B), programs)
        first = start // tl.maximum(share, 1)
        count = tl.where(pages > 0, (start + pages - 1) // tl.maximum(share, 1) - first + 1, 0)
        for i in range(0, count, BLOCK):
            slot = (first + segment + i + one).to(tl.int64) * R + r
            there = i + one < count
            lse = tl.load(body_lse_ptr + slot, mask=there, other=float("-inf"))
            part = tl.load(body_ptr + slot[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
            acc, weight, top = _add(acc, weight, top, part, lse)
        if ROTATE:
            x = hadamard(tl.reshape(acc, [1, D]), 1, D, LOG2_D)
            acc = tl.reshape(x, [D]) * tl.load(signs_ptr + d)
        if CENTRE:
            acc += weight * tl.load(centre_ptr + h * D + d)
    if EXACT:
        for i in range(0, E, BLOCK):
            there = i + one < E
            at = (segment * E + i + one).to(tl.int64) * R + r
            lse = tl.load(exact_lse_ptr + at, mask=there, other=float("-inf"))
            part = tl.load(exact_ptr + at[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
            acc, weight, top = _add(acc, weight, top, part, lse)
    if SINK:
        lse = tl.load(sink_ptr + h * (R // T) + r // T).to(tl.float32) * 1.4426950408889634
        new_top = tl.maximum(top, lse)
        fade = tl.exp2(top - new_top)
        acc = acc * fade
        weight = weight * fade + tl.exp2(lse - new_top)
    out = acc / tl.where(weight > 0, weight, 1.0)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * D + d, out.to(out_ptr.dtype.element_ty))


def merge_partials(
    out: Tensor,
    body: tuple[Tensor, Tensor] | None,
    exact: tuple[Tensor, Tensor] | None,
    cum: Tensor | None,
    programs: int,
    signs: Tensor | None,
    centre: Tensor | None,
    sink: Tensor | None,
    heads: int,
) -> None:
    """Write `out [B, Hq, T, D]` (contiguous) from partials over pages and over exact tokens, either of which may be None.

    body: out and lse2 in slots, with the `cum` and `programs` that they were made with. exact: `[B * H, E, R, D]` and `[B * H, E, R]`.
    sink: an extra logit per query head `[Hq]` that takes weight and gives nothing. Where nothing is seen the output is zero.
    """
    b, hq, t, d = out.shape
    rows = hq // heads * t
    none, splits = out, 0 if exact is None else exact[1].shape[1]
    expected = programs // (b * heads) + 2  # partials of a segment over pages
    block, warps = (4, 1) if expected <= 4 else (16, 4) if expected <= 16 else (64, 4)
    _merge[(b * hq * t,)](
        *(body or (none, none)), none if cum is None else cum, none if signs is None else signs, none if centre is None else centre,
        *(exact or (none, none)), none if sink is None else sink, out, b, heads, rows, t, splits, programs,
        D=d, LOG2_D=d.bit_length() - 1, BLOCK=block, BODY=body is not None, ROTATE=signs is not None, CENTRE=centre is not None,
        EXACT=exact is not None, SINK=sink is not None, num_warps=warps,
    )  # fmt: skip
