"""Tokens that stay move to the front of their row, in place and bit for bit: what `compact` does, inside pages, in plain Triton.

A program moves up to 128 coordinates of one head of one row: of all tokens that move, the words of K that hold them, and as many rows
of V. The first program of a head moves the scales, too. Each goes through the pages that it writes in turn, and plane by plane: a plane
is a matrix of words that hold one token each (K, scales), or fields of 2 to 32 tokens (V), each of which may come from another word. Of
a plane it reads all that a page shall get, and only then writes. A page that gets few tokens gets them one after the other, into
registers that hold its rows of V.

Nothing is read after it was overwritten. Programs, planes and heads share no words. Inside a plane, token n comes from a token
s(n) >= n. For a page that gets the tokens n of [f, f + 128):

    its own reads    come before its writes, for a barrier is between them
    later reads      are of tokens s(n) >= n >= f + 128, which lie in later pages than all that was written
    earlier reads    all threads have done before they passed an earlier barrier

Words that belong to this row in part keep the rest. The grid depends on shapes alone and no length is read on the host.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvstack.kernels.pages import PAGE, Pages

SPAN = 128  # coordinates of a program
FEW = 24  # tokens that a page gets one after the other, at most; where tokens keep no order, all come like this


def move(pages: Pages, keep: Tensor, counts: Tensor, ordered: bool) -> None:
    """`compact.compact` on a GPU. All tensors are contiguous, but the table's rows may lie apart. Nothing is allocated or waits."""
    f, (batch, heads, most) = pages.format, keep.shape
    assert pages.table.shape[0] == batch and pages.table.stride(1) == 1 and pages.pool.shape[1:] == (heads, f.nbytes)
    assert pages.pool.is_contiguous() and keep.is_contiguous()
    span = min(SPAN, f.head_dim)
    if keep.numel():
        move_kernel[(batch * heads, f.head_dim // span)](
            pages.pool, pages.table, keep, counts, heads, most, pages.table.stride(0),
            D=f.head_dim, K_BITS=f.k, V_BITS=f.v, VALUES_AT=f.value_offset, SCALES_AT=f.scale_offset, PAGE_BYTES=f.nbytes,
            PAGE=PAGE, SPAN=span, FEW=FEW if ordered else PAGE, num_warps=4, num_stages=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["most", "table_stride"])  # they change with the length of a row
def move_kernel(
    pool, table, keep, counts, heads, most, table_stride,
    D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, VALUES_AT: tl.constexpr, SCALES_AT: tl.constexpr,
    PAGE_BYTES: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr, FEW: tl.constexpr,
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
    for first in range(0, count, PAGE):
        token = first + tl.arange(0, PAGE)
        source = tl.load(keep + token, mask=token < count, other=0)
        moving = tl.sum((source > token).to(tl.int32), 0)
        planes = keys, values, scales
        if FEW == PAGE:  # what is not compiled takes no registers
            if moving > 0:
                _few(planes, table, keep, source, first, moving, stride, part, D, K_BITS, V_BITS, PAGE, SPAN)
        elif moving > FEW:
            _many(planes, table, keep, first, count, stride, part, D, K_BITS, V_BITS, PAGE, SPAN)
        elif moving > 0:
            _few(planes, table, keep, source, first, moving, stride, part, D, K_BITS, V_BITS, PAGE, SPAN)


@triton.jit
def _many(
    planes, table, keep, first, count, stride, part,
    D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Move all that comes to the page of token `first`, plane by plane."""
    keys, values, scales = planes
    K_LOW: tl.constexpr = 2 if K_BITS == 3 else K_BITS
    V_LOW: tl.constexpr = 2 if V_BITS == 3 else V_BITS
    _rows(keys, table, keep, first, count, stride, D // 32 * K_LOW, part, SPAN // 32 * K_LOW, PAGE)
    if K_BITS == 3:
        _rows(keys + PAGE * D // 16, table, keep, first, count, stride, D // 32, part, SPAN // 32, PAGE)
    _columns(values, table, keep, first, count, stride, part, V_LOW, PAGE, SPAN)
    if V_BITS == 3:
        _columns(values + PAGE * D // 16, table, keep, first, count, stride, part, 1, PAGE, SPAN)
    if part == 0:
        _rows(scales, table, keep, first, count, stride, 1, 0, 1, PAGE)


@triton.jit
def _few(
    planes, table, keep, source, first, moving, stride, part,
    D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Move the tokens `source [PAGE]` that come to the page of token `first` from elsewhere, `moving` of them, one after the other."""
    keys, values, scales = planes
    K_LOW: tl.constexpr = 2 if K_BITS == 3 else K_BITS
    V_LOW: tl.constexpr = 2 if V_BITS == 3 else V_BITS
    HIGH: tl.constexpr = PAGE * D // 16  # where the second plane of 3 bits is
    token = first + tl.arange(0, PAGE)
    here = tl.load(table + first // PAGE).to(tl.int64) * stride
    low = tl.load(_words(values + here, part, V_LOW, PAGE, SPAN))
    high = low
    if V_BITS == 3:
        high = tl.load(_words(values + here + HIGH, part, 1, PAGE, SPAN))
    to = first - 1
    for _ in range(moving):
        to = tl.min(tl.where((source > token) & (token > to), token, 2**31 - 1), 0)
        comes = tl.load(keep + to).to(tl.uint32)
        there = tl.load(table + comes // PAGE).to(tl.int64) * stride
        row, place = comes % PAGE, (to % PAGE).to(tl.uint32)
        tl.debug_barrier()  # all threads have the token before, whose place may be overwritten now
        _row(keys + here, keys + there, place, row, D // 32 * K_LOW, part, SPAN // 32 * K_LOW)
        if K_BITS == 3:
            _row(keys + here + HIGH, keys + there + HIGH, place, row, D // 32, part, SPAN // 32)
        low = _field(low, values + there, place, row, part, V_LOW, PAGE, SPAN)
        if V_BITS == 3:
            high = _field(high, values + there + HIGH, place, row, part, 1, PAGE, SPAN)
        if part == 0:
            _row(scales + here, scales + there, place, row, 1, 0, 1)
    tl.debug_barrier()
    tl.store(_words(values + here, part, V_LOW, PAGE, SPAN), low)
    if V_BITS == 3:
        tl.store(_words(values + here + HIGH, part, 1, PAGE, SPAN), high)


@triton.jit
def _words(plane, part, BITS: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr):
    """Pointers to SPAN rows `[SPAN, W]` of a page's plane of words that tokens share."""
    row = part * SPAN + tl.arange(0, SPAN)
    return plane + row[:, None] * (PAGE * BITS // 32) + tl.arange(0, PAGE * BITS // 32)[None, :]


@triton.jit
def _row(here, there, token, source, WIDTH: tl.constexpr, part, N: tl.constexpr):
    """Copy N words, from word `part * N` on, of row `source` of a page's plane to row `token` of another's."""
    word = part * N + tl.arange(0, N)
    tl.store(here + token * WIDTH + word, tl.load(there + source * WIDTH + word))


@triton.jit
def _field(words, there, token, source, part, BITS: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr):
    """`words [SPAN, W]` of a page with the fields of token `source` of another one where those of `token` are."""
    W: tl.constexpr = PAGE * BITS // 32
    from_word, _ = _place(source, BITS)
    to_word, _ = _place(token, BITS)
    found = tl.load(there + (part * SPAN + tl.arange(0, SPAN)) * W + from_word)
    moved = _moved(found, source, token, BITS)[:, None]
    mine = _moved(tl.full((1,), 0xFFFFFFFF, tl.uint32), source, token, BITS)[:, None]
    here = (tl.arange(0, W) == to_word)[None, :]
    return tl.where(here, words ^ ((words ^ moved) & mine), words)


@triton.jit
def _rows(plane, table, keep, first, count, stride, WIDTH: tl.constexpr, part, N: tl.constexpr, PAGE: tl.constexpr):
    """Move N words, from word `part * N` on, of rows of WIDTH words that hold one token each, to the page of token `first`."""
    token = tl.arange(0, PAGE)
    page, row, moves = _sources(table, keep, first + token, count, PAGE)
    word = (part * N + tl.arange(0, N))[None, :]
    found = tl.load(plane + (page * stride + row * WIDTH)[:, None] + word, mask=moves[:, None])
    here = plane + tl.load(table + first // PAGE).to(tl.int64) * stride
    tl.debug_barrier()
    tl.store(here + token[:, None] * WIDTH + word, found, mask=moves[:, None])


@triton.jit
def _columns(plane, table, keep, first, count, stride, part, BITS: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr):
    """Move the fields of BITS bits of SPAN rows of words that tokens share, to the page of token `first`.

    A thread takes all rows of a token, and a warp reads neighbouring tokens at once: tokens are first in `[fields of a word, W, SPAN]`.
    """
    word = tl.arange(0, PAGE * BITS // 32)
    row = (part * SPAN + tl.arange(0, SPAN)) * (PAGE * BITS // 32)
    token = _tokens(word[None, :], tl.arange(0, 32 // BITS)[:, None], BITS)
    page, column, moves = _sources(table, keep, first + token, count, PAGE)
    from_word, _ = _place(column, BITS)
    found = tl.load(plane + (page * stride + from_word)[:, :, None] + row[None, None, :], mask=moves[:, :, None])
    moved = tl.sum(_moved(found, column[:, :, None], token[:, :, None], BITS), 0)  # fields share no bits
    mine = tl.sum(_moved(tl.where(moves, 0xFFFFFFFF, 0).to(tl.uint32), column, token, BITS), 0)[:, None]
    here = plane + tl.load(table + first // PAGE).to(tl.int64) * stride + row[None, :] + word[:, None]
    old = tl.load(here, mask=(mine != 0) & (mine != 0xFFFFFFFF), other=0)
    tl.debug_barrier()
    tl.store(here, old ^ ((old ^ moved) & mine), mask=mine != 0)


@triton.jit
def _sources(table, keep, token, count, PAGE: tl.constexpr):
    """Where tokens come from: pages of the pool, places in them, and whether there are such tokens that move."""
    source = tl.load(keep + token, mask=token < count, other=0)
    moves = source > token
    source = source.to(tl.uint32)  # unsigned, quotient and rest are a shift and a mask
    page = tl.load(table + source // PAGE, mask=moves, other=0).to(tl.int64)
    return page, source % PAGE, moves


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
