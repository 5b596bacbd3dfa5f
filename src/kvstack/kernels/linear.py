"""Scores that are linear in keys and in the lengths of their bands, over pages, in plain Triton: what `score.score_linear` says.

A program takes one page of one head of one row, for all query heads of it, and leaves at once when its page lies behind the row's end:

    x = numbers of the page                    [128, D], in 16 bits, without their scales
    re, im = x @ basis                         the rotation back, its columns in the order of the real parts and of the imaginary ones
    k = scale * (re, im) + centre              in float32
    out = scale * x @ latent^T + bias + |k| @ c^T

The product with w needs no rotation back: latent = w turned as keys were, and bias = <w, centre>. Lengths do, in chunks of bands, for
all of them would not fit the registers. A codec that does not rotate has the identity for a rotation, and the same product puts its
numbers in order. What is not x or basis is divided by the largest number of its row and rounded to float16, sums are of float32:
relative errors of about 2^-12, as long as squares of keys are numbers of float32. V is not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.codecs.exact import ExactCodec
from kvstack.codecs.polar import PolarCodec
from kvstack.kernels.pages import PAGE, Pages
from kvstack.kernels.portable import ROWS, TINY, WARPS, matrix
from kvstack.rope import Rope

CHUNK = 32  # bands that a program works on at once: with their keys and its page they fit the registers


def score_pages(pages: Pages, key: Codec, rope: Rope, w: Tensor, c: Tensor) -> Tensor:
    """`score.score_linear` on a GPU."""
    f, (batch, heads, groups, head_dim), slots = pages.format, w.shape, pages.table.shape[1]
    assert groups <= ROWS and c.shape[-3:] == (heads, groups, head_dim // 2) and w.is_contiguous() and c.is_contiguous()
    assert w.dtype == c.dtype == torch.float32 and head_dim == f.head_dim and pages.pool.shape[1:] == (heads, f.nbytes)
    assert pages.table.shape[0] == batch and pages.table.stride(1) == 1 and pages.pool.is_contiguous()
    order = rope.pairs.to(w.device).flatten()
    rotation = torch.eye(head_dim, device=w.device) if key.transform is None else key.transform
    basis = rotation.index_select(1, order).to(key.dtype if isinstance(key, ExactCodec) else torch.float16)
    levels = w  # with 8 and 16 bits nobody looks at levels
    if isinstance(key, PolarCodec):
        levels = _pairs(key.levels) if key.bits == 4 else key.levels
    centre, bias = w, w
    if key.centre is not None:
        centre, bias = key.centre.index_select(1, order), torch.einsum("bhgd,hd->bhg", w, key.centre).contiguous()
    out = w.new_zeros(batch, heads, groups, slots * PAGE)
    if out.numel():
        linear_kernel[(batch * heads, slots)](
            key.project(w).contiguous(), bias, c, basis, centre, levels,
            pages.pool, pages.table, pages.lengths, out, heads, groups, pages.table.stride(0), c.numel() // (groups * (head_dim // 2)),
            D=head_dim, BITS=f.k, SCALES_AT=f.scale_offset, PAGE_BYTES=f.nbytes, PAGE=PAGE, M=ROWS,
            CHUNK=CHUNK, CENTRE=key.centre is not None, num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return out


def _pairs(levels: Tensor) -> Tensor:
    """Two levels in float16 for every byte of two codes as `_fours` makes it, `[256, 2]`."""
    code = torch.arange(16, device=levels.device)
    level = levels[torch.where(code < 8, 8 + code, 15 - code)].half()  # the highest bit is a sign, the rest a magnitude
    return torch.stack([level.repeat(16), level.repeat_interleave(16)], 1)


@triton.jit(do_not_specialize=["table_stride", "c_segments"])  # they change with rows and lengths
def linear_kernel(
    latent, bias, c, basis, centre, levels, pool, table, lengths, out, heads, groups, table_stride, c_segments,
    D: tl.constexpr, BITS: tl.constexpr, SCALES_AT: tl.constexpr, PAGE_BYTES: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr,
    CHUNK: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """One page of one head of one row. M: query heads, padded. basis, centre: `[D, D]` and `[H, D]`, columns (re, im)."""
    segment, page = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = segment // heads, segment % heads
    left = tl.load(lengths + b) - page * PAGE
    if left <= 0:
        return
    F: tl.constexpr = D // 2
    index = tl.load(table + b * table_stride + page)
    base = pool + (index.to(tl.int64) * heads + h) * PAGE_BYTES
    token, d, g = tl.arange(0, PAGE), tl.arange(0, D)[:, None], tl.arange(0, M)
    valid = token < left  # behind the end of a row there may be NaN
    scales = tl.load((base + SCALES_AT).to(tl.pointer_type(tl.uint32), bitcast=True) + token, mask=valid, other=0)
    scale = (scales << 16).to(tl.float32, bitcast=True)[:, None]
    if BITS == 16:
        x = _halves(base.to(tl.pointer_type(basis.dtype.element_ty), bitcast=True), PAGE, D)
    elif BITS == 4:
        x = _fours(base, levels, PAGE, D)
    else:
        x = matrix(base, PAGE, D, BITS, levels)
    if BITS != 4:  # with 16, there may be NaN; with others, Triton 3.6 does not compile for sm_100 with nothing here
        x = tl.where(valid[:, None], x, 0.0)
    real = (g < groups)[:, None]
    w = tl.load(latent + (segment * groups + g)[:, None] * D + tl.trans(d), mask=real, other=0.0)
    w_most = _most(w)
    w = w * (1.0 / w_most)
    high = w.to(x.dtype)
    # x comes second here: as first operand of a product with 16 columns, Triton 3.6 reads it from beyond shared memory on sm_90.
    part = tl.dot(high, tl.trans(x))
    if x.dtype == tl.bfloat16:  # the digits that it has not
        part = tl.dot((w - high).to(x.dtype), tl.trans(x), acc=part)
    score = tl.trans(part) * (scale * tl.trans(w_most))
    if CENTRE:
        score += tl.load(bias + segment * groups + g, mask=g < groups, other=0.0)[None, :]
    c += (segment % c_segments * groups + g)[:, None] * F  # of all rows, or the same for each
    for at in range(0, F, CHUNK):
        f = at + tl.arange(0, CHUNK)[None, :]
        re = tl.dot(x, tl.load(basis + d * D + f)) * scale
        im = tl.dot(x, tl.load(basis + d * D + F + f)) * scale
        if CENTRE:
            re += tl.load(centre + h * D + f)
            im += tl.load(centre + h * D + F + f)
        size, factor = tl.sqrt(re * re + im * im), tl.load(c + f, mask=real, other=0.0)
        most, c_most = _most(size), _most(factor)
        score += tl.dot(_over(size, most), tl.trans(_over(factor, c_most))) * (most * tl.trans(c_most))
    to = out + ((segment * groups + g) * tl.num_programs(1))[None, :] * PAGE + page * PAGE + token[:, None]
    tl.store(to, score, mask=valid[:, None] & tl.trans(real))


@triton.jit
def _most(x):
    """The largest absolute value of every row, or for rows of zeros something to divide by."""
    return tl.maximum(tl.max(tl.abs(x), 1), TINY)[:, None]


@triton.jit
def _over(x, most):
    """`x` over the largest number of its row, in float16."""
    return (x * (1.0 / most)).to(tl.float16)


@triton.jit
def _halves(base, R: tl.constexpr, C: tl.constexpr):
    """The matrix `[R, C]` of numbers of 16 bits at `base`, see `pages`."""
    x = tl.reshape(tl.load(base + tl.arange(0, R * C)), (R, 4, C // 16, 2, 2))
    return tl.reshape(tl.permute(x, (0, 2, 3, 1, 4)), (R, C))  # column = 16 s + 8 h + 2 t + i from (t, s, h, i)


@triton.jit
def _fours(base, pairs, R: tl.constexpr, C: tl.constexpr):
    """The matrix `[R, C]` of levels of the codes of 4 bits at `base`, see `pages`, two at a time by a table of all pairs."""
    words = tl.load(base.to(tl.pointer_type(tl.uint32), bitcast=True) + tl.arange(0, R * C // 8))[:, None]
    p = tl.arange(0, 4)[None, :]  # codes 2 p and 2 p + 1 of a word, whose signs are 8 bits apart
    signs = words >> (16 * (p % 2) + 4 - 4 * (p // 2))
    byte = ((words >> (8 * p)) & 0x77) | (signs & 0x8) | ((signs >> 4) & 0x80)
    x = tl.load(pairs + 2 * byte[:, :, None] + tl.arange(0, 2)[None, None, :])
    x = tl.permute(tl.reshape(x, (R, 4, C // 32, 2, 4)), (0, 2, 3, 1, 4))  # column = 32 s + 16 h + 4 t + i from (t, s, h, i)
    return tl.reshape(x, (R, C))
