"""Prefill over a compressed past in plain Triton: many new queries against all tokens of their row in pages, which lie before them all.

The causal part, the new tokens among themselves, and whatever else is exact is somebody else's; partials merge by their log sums.

    q     [B * H, R, D]     float32: rotated queries times scale * log2(e); the R = G * T query rows (g, t) of one KV head lie together
    bias  [B * H, R]        float32: what the centre of the keys adds to every logit, in the same unit
    out   [B * H, E, R, D]  float32, in the latent space of V: the softmax mean over the tokens of a split, zero without tokens
    lse2  [B * H, E, R]     float32: the base-2 logarithm of the sum of 2^logit, -inf without tokens

A row's pages are shared out among E splits, for few query rows over a long past; with E = 1, `out` is `[B, Hq, T, D]` as it lies in
memory. A program takes one block of query rows of one KV head through the pages of one split.

A page becomes float16 matrices once per block of query rows, so scales belong there rather than in logits and weights: those of a page
are divided by a power of two next to the largest, and multiply the levels. A level (4 bits of mantissa) times a scale (8 bits) is
nearly exact in float16. The power of K multiplies the logits, that of V is added to them as its logarithm: a weight is
2^(logit + power - top), where `top` is near the largest exponent so far, as always in an online softmax. Weights are at most 2^15,
about what float16 has, so that those 2^-29 of the largest are still rounded to 11 bits. Sums are in float32.
`prefill_hopper` is the same by Hopper's means. This module does not merge splits and does not rotate.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstack.kernels.pages import PAGE, Pages
from kvstack.kernels.portable import TINY, matrix, tanh

WARPS = 8
HEADROOM = tl.constexpr(15.0)  # the largest weight is 2^15
SPAN = tl.constexpr(32.0)  # the largest scale of a page: times 448, the largest E4M3 number, it is a number of float16
LEAST = tl.constexpr(1e-18)  # the largest scale of pages of zeros, whose sums of weights shall not overflow


def prefill_pages(
    q: Tensor,
    bias: Tensor,
    pages: Pages,
    k_levels: Tensor,
    v_levels: Tensor,
    out: Tensor,
    lse2: Tensor,
    softcap: float | None,
) -> None:
    """Attention of `q [B * H, R, D]` over all tokens of `pages`: fills the partials `out [B * H, E, R, D]` and `lse2 [B * H, E, R]`.

    k_levels, v_levels: `[2 ** bits]` float32, ascending; not read on a side with 8 bits, whose bytes are E4M3 numbers. softcap: in
    natural units. All tensors are contiguous, float32 but for the pages. Nothing is allocated and nothing waits.
    """
    f, (segments, rows, head_dim), splits = pages.format, q.shape, out.shape[1]
    assert max(f.k, f.v) <= 8
    batch, heads = pages.table.shape[0], pages.pool.shape[1]
    assert head_dim == f.head_dim and pages.pool.shape[-1] == f.nbytes and segments == batch * heads and bias.shape == q.shape[:2]
    assert out.shape == (segments, splits, rows, head_dim) and lse2.shape == out.shape[:3]
    floats = (q, bias, k_levels, v_levels, out, lse2)
    assert all(t.dtype == torch.float32 for t in floats) and all(t.is_contiguous() for t in (*floats, pages.pool))
    assert pages.table.stride(1) == 1
    m = block(rows, head_dim)
    prefill_kernel[(triton.cdiv(rows, m), segments, splits)](
        q, bias, pages.pool, pages.table, pages.lengths, k_levels, v_levels, out, lse2,
        heads, rows, pages.table.stride(0), 0.0 if softcap is None else softcap * math.log2(math.e),
        M=m, D=head_dim, K_BITS=f.k, V_BITS=f.v, K_BYTES=f.value_offset, V_BYTES=f.scale_offset - f.value_offset,
        PAGE=PAGE, CAPPED=softcap is not None, num_warps=WARPS, num_stages=1,
    )  # fmt: skip


def block(rows: int, head_dim: int) -> int:
    """Query rows of a program: more would not fit its registers beside a page, fewer than 16 no tensor core."""
    return min(32 if head_dim == 256 else 64, max(16, 1 << (rows - 1).bit_length()))


# One variant for all rows and lengths, and for all places in a batch.
@triton.jit(do_not_specialize=["rows", "table_stride"], do_not_specialize_on_alignment=["table", "lengths"])
def prefill_kernel(
    q, bias, pool, table, lengths, k_levels, v_levels, out, lse2, heads, rows, table_stride, cap,
    M: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_BYTES: tl.constexpr, V_BYTES: tl.constexpr,
    PAGE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One block of M query rows over one split of `prefill_pages`. cap: the soft cap in base 2."""
    segment = tl.program_id(1).to(tl.int64)
    b, h = segment // heads, segment % heads
    length = tl.load(lengths + b)
    pages = tl.cdiv(length, PAGE)
    share = tl.cdiv(pages, tl.num_programs(2))
    first = tl.program_id(2) * share
    row, token = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, PAGE)
    at = row.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    real = row < rows

    query = tl.load(q + segment * rows * D + at, mask=real[:, None], other=0.0)
    shift = tl.load(bias + segment * rows + row, mask=real, other=0.0)
    size = tl.maximum(tl.max(tl.abs(query), 1), TINY)
    query = (query / size[:, None]).to(tl.float16)
    top = tl.full((M,), -1e30, tl.float32)
    mass = tl.zeros((M,), tl.float32)
    mean = tl.zeros((M, D), tl.float32)
    for p in range(first, tl.minimum(first + share, pages)):
        index = tl.load(table + b * table_stride + p)
        base = pool + (index.to(tl.int64) * heads + h) * (K_BYTES + V_BYTES + PAGE * 4)
        # Behind the end of a row there may be NaN: only `where` keeps it out. Levels are finite whatever the codes are.
        valid = token < length - p * PAGE
        scales = tl.where(valid, tl.load((base + K_BYTES + V_BYTES).to(tl.pointer_type(tl.uint32), bitcast=True) + token), 0)
        k_scale, k_power = relative((scales << 16).to(tl.float32, bitcast=True))
        v_scale, v_power = relative((scales & 0xFFFF0000).to(tl.float32, bitcast=True))
        k = matrix(base, PAGE, D, K_BITS, k_levels) * k_scale[:, None]
        x = tl.dot(query, tl.trans(k)) * (size * tl.exp2(k_power))[:, None] + shift[:, None]
        if CAPPED:
            x = cap * tanh(x / cap)
        x = tl.where(valid[None, :], x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 1) + (v_power - HEADROOM))
        weight = tl.exp2(x - (higher - v_power)[:, None])
        decay = tl.exp2(top - higher)
        top = higher
        mass = mass * decay + tl.sum(weight, 1) * tl.exp2(-v_power)
        v = matrix(base + K_BYTES, D, PAGE, V_BITS, v_levels) * v_scale[None, :]
        mean = tl.dot(weight.to(tl.float16), tl.trans(v), acc=mean * decay[:, None])
    some = mass > 0
    mass = tl.where(some, mass, 1.0)
    to = (segment * tl.num_programs(2) + tl.program_id(2)) * rows
    tl.store(lse2 + to + row, tl.where(some, top + tl.log2(mass), float("-inf")), mask=real)
    tl.store(out + to * D + at, mean / mass[:, None], mask=real[:, None])


@triton.jit
def relative(scale):
    """Scales over a power of two next to the largest, times `SPAN`, in float16, and the logarithm of what they were divided by."""
    power = tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(scale), 0), LEAST))) - tl.log2(SPAN)
    return (scale * tl.exp2(-power)).to(tl.float16), power
