"""Tokens that stay move to the front of their row, in place and bit for bit: what `compact` does, inside pages, in plain Triton.

A program moves 32 coordinates of one head of one row: of all its tokens, as many words of every row of K as K has bits, and 32 rows of
V. The first program of a head moves the scales, too. Each goes through the pages that it writes in turn, and plane by plane: a plane is
a matrix of words that hold one token each (K, scales), or fields of 2 to 32 tokens (V), each of which may come from another word. Of a
plane it reads all that a page shall get, and only then writes.

Nothing is read after it was overwritten. Programs, planes and heads share no words. Inside a plane, indices ascend, so that token n
comes from a token s(n) >= n. For a page that gets the tokens n of [f, f + 128):

    its own reads    come before its writes, for a barrier is between them
    later reads      are of tokens s(n) >= n >= f + 128, which lie in later pages than all that was written
    earlier reads    all threads have done before they passed an earlier barrier

Words that belong to this row in part keep the rest. The grid depends on shapes alone and no length is read on the host.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvstack.kernels.pages import PAGE, Pages

SPAN = 32  # coordinates of a program


def move(pages: Pages, keep: Tensor, counts: Tensor) -> None:
    """`compact.compact` on a GPU. All tensors are contiguous, but the table's rows may lie apart. Nothing is allocated or waits."""
    f, (batch, heads, most) = pages.format, keep.shape
    assert pages.table.shape[0] == batch and pages.table.stride(1) == 1 and pages.pool.shape[1:] == (heads, f.nbytes)
    assert pages.pool.is_contiguous() and keep.is_contiguous()
    if keep.numel():
        move_kernel[(batch * heads, f.head_dim // SPAN)](
            pages.pool, pages.table, keep, counts, heads, most, pages.table.stride(0),
            D=f.head_dim, K_BITS=f.k, V_BITS=f.v, VALUES_AT=f.value_offset, SCALES_AT=f.scale_offset, PAGE_BYTES=f.nbytes,
            PAGE=PAGE, SPAN=SPAN, num_warps=4, num_stages=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["most", "table_stride"])  # they change with the length of a row
def move_kernel(
    pool, table, keep, counts, heads, most, table_stride,
    D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, VALUES_AT: tl.constexpr, SCALES_AT: tl.constexpr,
    PAGE_BYTES: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One span of coordinates of one head of one row. Offsets and strides are in words of 32 bits from here on."""
    segment, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b = segment // heads
    count = tl.load(counts + b)
    keep += segment * most
    table += b * table_stride
    stride = heads * (PAGE_BYTES // 4)
    keys = pool.to(tl.pointer_type(tl.uint32), bitcast=True) + segment % heads * (PAGE_BYTES // 4)
    values, scales = keys + VALUES_AT // 4, keys + SCALES_AT // 4
    K_LOW: tl.constexpr = 2 if K_BITS == 3 else K_BITS
    V_LOW: tl.constexpr = 2 if V_BITS == 3 else V_BITS
    for first in range(0, count, PAGE):
        last = tl.minimum(first + PAGE, count) - 1
        if tl.load(keep + last) != last:  # else all tokens of this page stay where they are, for indices ascend
            _rows(keys, table, keep, first, count, stride, D // 32 * K_LOW, part, SPAN // 32 * K_LOW, PAGE)
            if K_BITS == 3:
                _rows(keys + PAGE * D // 16, table, keep, first, count, stride, D // 32, part, SPAN // 32, PAGE)
            _columns(values, table, keep, first, count, stride, part, V_LOW, PAGE, SPAN)
            if V_BITS == 3:
                _columns(values + PAGE * D // 16, table, keep, first, count, stride, part, 1, PAGE, SPAN)
            if part == 0:
                _rows(scales, table, keep, first, count, stride, 1, 0, 1, PAGE)


@triton.jit
def _rows(plane, table, keep, first, count, stride, WIDTH: tl.constexpr, part, N: tl.constexpr, PAGE: tl.constexpr):
    """Move N words, from word `part * N` on, of rows of WIDTH words that hold one token each, to the page of token `first`."""
    token = tl.arange(0, PAGE)
    page, row, ours = _sources(table, keep, first + token, count, PAGE)
    word = (part * N + tl.arange(0, N))[None, :]
    found = tl.load(plane + (page * stride + row * WIDTH)[:, None] + word, mask=ours[:, None])
    here = plane + tl.load(table + first // PAGE).to(tl.int64) * stride
    tl.debug_barrier()
    tl.store(here + token[:, None] * WIDTH + word, found, mask=ours[:, None])


@triton.jit
def _columns(plane, table, keep, first, count, stride, part, BITS: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr):
    """Move the fields of BITS bits of SPAN rows of words that tokens share, to the page of token `first`.

    A thread takes all rows of a token, and a warp reads neighbouring tokens at once: tokens are first in `[fields of a word, W, SPAN]`.
    """
    word = tl.arange(0, PAGE * BITS // 32)
    row = (part * SPAN + tl.arange(0, SPAN)) * (PAGE * BITS // 32)
    token = _tokens(word[None, :], tl.arange(0, 32 // BITS)[:, None], BITS)
    page, column, ours = _sources(table, keep, first + token, count, PAGE)
    from_word, _ = _place(column, BITS)
    found = tl.load(plane + (page * stride + from_word)[:, :, None] + row[None, None, :], mask=ours[:, :, None])
    moved = tl.sum(_moved(found, column[:, :, None], token[:, :, None], BITS), 0)  # fields share no bits
    mine = tl.sum(_moved(tl.where(ours, 0xFFFFFFFF, 0).to(tl.uint32), column, token, BITS), 0)[:, None]
    here = plane + tl.load(table + first // PAGE).to(tl.int64) * stride + row[None, :] + word[:, None]
    old = tl.load(here, mask=(mine != 0) & (mine != 0xFFFFFFFF), other=0)
    tl.debug_barrier()
    tl.store(here, old ^ ((old ^ moved) & mine), mask=mine != 0)


@triton.jit
def _sources(table, keep, token, count, PAGE: tl.constexpr):
    """Where tokens come from: pages of the pool, places in them, and whether there are such tokens."""
    ours = token < count
    source = tl.load(keep + token, mask=ours, other=0).to(tl.uint32)  # unsigned, quotient and rest are a shift and a mask
    page = tl.load(table + source // PAGE, mask=ours, other=0).to(tl.int64)
    return page, source % PAGE, ours


@triton.jit
def _tokens(word, field, BITS: tl.constexpr):
    """The token of a page whose field is number `field` of word `word` of a row; the inverse of `_place`."""
    if BITS == 16:
        return word // 2 % 8 * 16 + word % 2 * 8 + word // 16 * 2 + field
    if BITS == 8:
        return word // 2 % 4 * 32 + word % 2 * 16 + word // 8 * 4 + field
    return (word % BITS * (4 // BITS) + field // 8) * 32 + field // 4 % 2 * 16 + word // BITS * 4 + field % 4


@triton.jit
def _place(token, BITS: tl.constexpr):
    """The word of its row and the lowest bit in it where the field of a token of a page is, see `pages`."""
    if BITS == 16:
        return token // 2 % 4 * 16 + token // 16 * 2 + token // 8 % 2, token % 2 * 16
    thread, step, half, i = token // 4 % 4, token // 32, token // 16 % 2, token % 4
    if BITS == 8:
        return thread * 8 + step * 2 + half, i * 8
    return thread * BITS + step * BITS // 4, half * 16 + i * 4 + step * BITS % 4


@triton.jit
def _sign(token):
    """The bit of its word where the sign of a field of 4 bits is."""
    return 8 * (token % 4) + 7 - token // 16 % 2 * 4


@triton.jit
def _moved(words, source, token, BITS: tl.constexpr):
    """The fields of tokens `source`, out of their words, where those of `token` are, and nothing else."""
    _, before = _place(source, BITS)
    _, after = _place(token, BITS)
    if BITS == 4:
        sign = _turn(words, _sign(token) - _sign(source)) & (1 << _sign(token)).to(tl.uint32)
        return sign | (_turn(words, after - before) & (7 << after).to(tl.uint32))
    return _turn(words, after - before) & ((2**BITS - 1) << after).to(tl.uint32)


@triton.jit
def _turn(words, by):
    """Words turned to the left, bits that leave coming back on the right: one instruction."""
    return (words << (by & 31)) | (words >> ((32 - by) & 31))
