"""Scores that are linear in keys and in the lengths of their bands, over pages, in plain Triton: what `score.score_linear` says.

A program takes one page of one head of one row, for all query heads of it, and leaves at once when its page lies behind the row's end:

    x = numbers of the page                    [128, D], in 16 bits, without their scales
    re, im = x @ basis                         the rotation back, its columns in the order of the real parts and of the imaginary ones
    k = scale * (re, im) + centre              in float32
    out = re @ w_re^T + im @ w_im^T + |k| @ c^T

in chunks of bands, for all of them would not fit the registers. A codec that does not rotate has the identity for a rotation, and the
same product puts its numbers in order. Factors of the last line are divided by the largest number of their row and rounded to float16,
sums are of float32: relative errors of about 2^-12, as long as squares of keys are numbers of float32. V is not read.
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
    assert groups <= ROWS and c.shape == (heads, groups, head_dim // 2) and w.is_contiguous() and c.is_contiguous()
    assert w.dtype == c.dtype == torch.float32 and head_dim == f.head_dim and pages.pool.shape[1:] == (heads, f.nbytes)
    assert pages.table.shape[0] == batch and pages.table.stride(1) == 1 and pages.pool.is_contiguous()
    pairs = rope.pairs.to(w.device).contiguous()
    rotation = torch.eye(head_dim, device=w.device) if key.transform is None else key.transform
    basis = rotation.index_select(1, pairs.flatten()).to(key.dtype if isinstance(key, ExactCodec) else torch.float16)
    levels = key.levels if isinstance(key, PolarCodec) else w  # with 8 and 16 bits nobody looks at levels
    centre = w if key.centre is None else key.centre.contiguous()
    out = w.new_zeros(batch, heads, groups, slots * PAGE)
    if out.numel():
        linear_kernel[(batch * heads, slots)](
            w, c, pairs, basis, centre, levels, pages.pool, pages.table, pages.lengths, out, heads, groups, pages.table.stride(0),
            D=head_dim, BITS=f.k, SCALES_AT=f.scale_offset, PAGE_BYTES=f.nbytes, PAGE=PAGE, M=ROWS,
            CHUNK=CHUNK, CENTRE=key.centre is not None, num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["table_stride"])  # it changes with the length of a row
def linear_kernel(
    w, c, pairs, basis, centre, levels, pool, table, lengths, out, heads, groups, table_stride,
    D: tl.constexpr, BITS: tl.constexpr, SCALES_AT: tl.constexpr, PAGE_BYTES: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr,
    CHUNK: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """One page of one head of one row. M: query heads, padded. basis: `[D, D]`, columns (re, im)."""
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
    else:
        x = matrix(base, PAGE, D, BITS, levels)
    x = tl.where(valid[:, None], x, 0.0)  # with nothing between layout and product, Triton 3.6 does not compile for sm_100
    real = (g < groups)[:, None]
    w += (segment * groups + g)[:, None] * D
    c += (h * groups + g)[:, None] * F
    score = tl.zeros((PAGE, M), tl.float32)
    for at in range(0, F, CHUNK):
        f = at + tl.arange(0, CHUNK)
        first, second = tl.load(pairs + f)[None, :], tl.load(pairs + F + f)[None, :]
        re = tl.dot(x, tl.load(basis + d * D + f[None, :])) * scale
        im = tl.dot(x, tl.load(basis + d * D + F + f[None, :])) * scale
        if CENTRE:
            re += tl.load(centre + h * D + first)
            im += tl.load(centre + h * D + second)
        size = tl.sqrt(re * re + im * im)
        w_re, w_im = tl.load(w + first, mask=real, other=0.0), tl.load(w + second, mask=real, other=0.0)
        w_size = tl.load(c + f[None, :], mask=real, other=0.0)
        k_most = tl.maximum(tl.max(size, 1), TINY)[:, None]
        w_most = tl.maximum(tl.max(tl.maximum(tl.maximum(tl.abs(w_re), tl.abs(w_im)), tl.abs(w_size)), 1), TINY)[:, None]
        part = tl.dot(_over(re, k_most), tl.trans(_over(w_re, w_most)))
        part = tl.dot(_over(im, k_most), tl.trans(_over(w_im, w_most)), acc=part)
        part = tl.dot(_over(size, k_most), tl.trans(_over(w_size, w_most)), acc=part)
        score += part * k_most * tl.trans(w_most)
    to = out + ((segment * groups + g) * tl.num_programs(1))[None, :] * PAGE + page * PAGE + token[:, None]
    tl.store(to, score, mask=valid[:, None] & tl.trans(real))


@triton.jit
def _over(x, most):
    """`x` over the largest number of its row, in float16."""
    return (x * (1.0 / most)).to(tl.float16)


@triton.jit
def _halves(base, R: tl.constexpr, C: tl.constexpr):
    """The matrix `[R, C]` of numbers of 16 bits at `base`, see `pages`."""
    x = tl.reshape(tl.load(base + tl.arange(0, R * C)), (R, 4, C // 16, 2, 2))
    return tl.reshape(tl.permute(x, (0, 2, 3, 1, 4)), (R, C))  # column = 16 s + 8 h + 2 t + i from (t, s, h, i)
