"""`encode` on Hopper (sm_90), in Gluon, for many tokens of 16 bits and codebooks of 2, 3 and 4 bits: memory is the limit.

A program is one warpgroup and walks the pages of its span, in two tiles of 64 tokens each. Nothing but the arrival and the departure
of a tile needs a barrier: the product y = x @ M' leaves all that is to become one word of K in one thread, and all that is to become a
word of V in one warp. M is the signed Hadamard matrix without its 1 / sqrt(D), with its rows, the columns of y, in the order of
`_order`; its halves of 64 rows differ in a sign, so that half of it does, with sums and differences, and leaves room for four programs.
Those of K come first, then those of V: each kind has the instruction cache to itself.

    quantise    t = y * factor + 1/2 is clamped to 0..1 by the multiplication. Of 32 cells of t, each holds at most one edge, so that
                16 t plus a number of the cell is 16 plus the index of the level and a fraction (`book.cells`). A thread holds the
                number of one cell, and a shuffle brings the one it needs: four instructions, exact for every codebook
    pack        the index is now in the high bits of the mantissa; eight of them make a word by byte permutations
    scale       `prmt` looks four squared levels up at once, `dp4a` adds them up
    K           words go to the page as they are: 16 bytes of a row to a thread
    V           a word holds eight coordinates of a token. `movmatrix` transposes halves of words between the threads of a warp, and
                each warp has the tokens of one run of the page (`_token`), so that nibbles are all that is left to transpose

It writes what `encode_kernel` writes, up to coordinates on an edge. For what it does not do see `fits`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from kvstack.codecs.base import Codec
from kvstack.codecs.polar import PolarCodec
from kvstack.kernels import book
from kvstack.kernels.device import processors
from kvstack.kernels.pages import PAGE, Pages

PROGRAMS = {64: 6, 128: 4}  # of a multiprocessor, for every head size
REGISTERS = {64: 80, 128: 128}  # of a thread, for that many programs
MAGIC = gl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it is rounded to an integer, in the low bits
TINY = gl.constexpr(1e-36)  # squared norms are not taken for less


def _span(pages: int, head_dim: int, processors: int) -> int:
    """Tokens of a row that a program walks, for `pages` pages of K and as many of V: one wave of programs for each of them."""
    return -(-pages // (processors * PROGRAMS[head_dim])) * PAGE


def fits(k: Tensor, v: Tensor, key: Codec, value: Codec) -> bool:
    """Whether `launch` can encode them: a page or more of vectors of 64 or 128 numbers of 16 bits, at addresses that are multiples of
    16 bytes, by polar codecs of 2, 3 or 4 bits without search whose scale is no inner product."""
    aligned = all(x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:3]) for x in (k, v))
    known = all(isinstance(c, PolarCodec) and c.bits <= 4 and not c.search and c.scale != "unbiased" for c in (key, value))
    return aligned and known and k.dtype.itemsize == 2 and k.shape[3] in PROGRAMS and k.shape[2] >= PAGE


def launch(k: Tensor, v: Tensor, key: Codec, value: Codec, pages: Pages, starts: Tensor, counts: Tensor) -> None:
    """`encode.encode` of what `fits`."""
    batch, heads, n, head_dim = k.shape
    f, k_tables, v_tables = pages.format, _tables(key, k), _tables(value, v)
    assert (k_tables.cells.bits, v_tables.cells.bits) == (f.k, f.v), "codecs of other widths than the pages"
    span = _span(batch * heads * -(-n // PAGE), head_dim, processors(k.device))
    spans = (n - 2) // span + 2  # of the row's grid that n tokens touch, at most
    encode_kernel[(batch * heads * spans, 2)](
        k, v, k_tables.matrix, v_tables.matrix, k_tables.shift, v_tables.shift, k_tables.table, v_tables.table,
        pages.pool, pages.table, starts, counts, heads, span, spans, *k.stride()[:3], *v.stride()[:3], pages.table.stride(0),
        D=head_dim, KEY=k_tables.cells, VALUE=v_tables.cells, VALUES_AT=f.value_offset, SCALES_AT=f.scale_offset,
        PAGE_BYTES=f.nbytes, num_warps=4, maxnreg=REGISTERS[head_dim],
    )  # fmt: skip


@dataclass(frozen=True)
class _Tables:
    """matrix: `[64, D]`, the first rows of M. shift: the centre after that, `[H, D]` float32; anything without a centre.
    table: of `book.cells`."""

    cells: book.Cells
    matrix: Tensor
    shift: Tensor
    table: Tensor


@book.once
def _tables(codec: Codec, x: Tensor) -> _Tables:
    assert isinstance(codec, PolarCodec)
    matrix, shift = book.signs(codec)
    order = _order(x.shape[3]).to(x.device)
    cells, table = book.cells(codec)
    matrix = matrix[order].to(x.dtype)
    assert torch.equal(matrix[64:], torch.cat([matrix[:64, :64], -matrix[:64, 64:]], 1)[: len(matrix) - 64])
    matrix = matrix[:64].contiguous()
    shift = matrix if shift is None else shift[:, order].contiguous()
    return _Tables(cells, matrix, shift, torch.from_numpy(table).to(x.device))


def _order(head_dim: int) -> Tensor:
    """The page's columns in the order of y, `[D]`: column 32 s + 16 h + 4 t + 2 i1 + i0 at 32 s + 16 h + 8 i1 + 2 t + i0.

    A thread of the product holds columns 8 j + 2 t + i0 for all j, and so all (h, i1, i0) of words.
    """
    return torch.arange(head_dim).view(head_dim // 16, 4, 2, 2).transpose(1, 2).flatten()


# --- the kernel ---

_CLAMPED = gl.constexpr("fma.rn.sat.f32 $0, $1, $2, 0f3F000000;")  # $1 * $2 + 1/2, in 0..1
_SHUFFLE = gl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 31, -1;")  # $1 of lane $2 mod 32
_TRANSPOSE = gl.constexpr("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;")  # [row, half of word] to [half of word, row]

# Bits 22..19 of $1 ... $8 as nibbles of a word.
_PACK = gl.constexpr(
    """{
    .reg .b32 a, b, c, d;
    prmt.b32 a, $1, $5, 0x7632;
    prmt.b32 b, $2, $6, 0x7632;
    prmt.b32 c, $3, $7, 0x7632;
    prmt.b32 d, $4, $8, 0x7632;
    shr.u32 a, a, 3;
    shl.b32 b, b, 1;
    shl.b32 c, c, 5;
    shl.b32 d, d, 9;
    lop3.b32 a, a, b, 0x000F000F, 0xE4;
    lop3.b32 c, c, d, 0x0F000F00, 0xE4;
    lop3.b32 $0, a, c, 0x00FF00FF, 0xE4;
    }"""
)
# Sum of the squares of the bytes that the nibbles of $1 select of $2, $3.
_SQUARES = gl.constexpr(
    """{
    .reg .b32 a, b;
    prmt.b32 a, $2, $3, $1;
    shr.u32 b, $1, 16;
    prmt.b32 b, $2, $3, b;
    dp4a.u32.u32 a, a, a, 0;
    dp4a.u32.u32 $0, b, b, a;
    }"""
)
# Sum of the bytes that the nibbles of $1 select of $2, $3, and 256 times those of $4, $5.
_SUMS = gl.constexpr(
    """{
    .reg .b32 a, b, c;
    shr.u32 c, $1, 16;
    prmt.b32 a, $4, $5, $1;
    prmt.b32 b, $4, $5, c;
    dp4a.u32.u32 a, a, 0x01010101, 0;
    dp4a.u32.u32 a, b, 0x01010101, a;
    shl.b32 a, a, 8;
    prmt.b32 b, $2, $3, $1;
    prmt.b32 c, $2, $3, c;
    dp4a.u32.u32 a, b, 0x01010101, a;
    dp4a.u32.u32 $0, c, 0x01010101, a;
    }"""
)


@gluon.constexpr_function
def _lanes(columns: int) -> Any:
    """Layout of `[warp, 2, quad, columns / 8, thread, 2]`, the accumulator of 64 rows."""
    registers = [[0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0]] + [[0, 0, 0, 1 << i, 0, 0] for i in range((columns // 8).bit_length() - 1)]
    lanes = [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 2, 0], [0, 0, 1, 0, 0, 0], [0, 0, 2, 0, 0, 0], [0, 0, 4, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[1, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]], [], [4, 2, 8, columns // 8, 4, 2])


@gluon.constexpr_function
def _words(steps: int) -> Any:
    """Layout of `[64, 4 (thread), steps]` words of rows."""
    registers = [[0, 0, 1 << i] for i in range(steps.bit_length() - 1)] + [[8, 0, 0]]
    return gl.DistributedLinearLayout(
        registers, [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]], [[16, 0, 0], [32, 0, 0]], [], [64, 4, steps]
    )


@gluon.constexpr_function
def _columns(steps: int, run: int) -> Any:
    """Layout of `[steps, 8 (half of word), 4 (nibble), 4 (warp), run]` words of V, a run's in neighbouring threads."""
    registers = [[0, 0, 1, 0, 0], [0, 0, 2, 0, 0]] + [[1 << i, 0, 0, 0, 0] for i in range(steps.bit_length() - 1)]
    lanes = [[0, 0, 0, 0, i * run // 4] for i in (1, 2)] + [[0, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 4, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0]], [], [steps, 8, 4, 4, run])


@gluon.jit
def _token(r, tile, TRANSPOSE: gl.constexpr):
    """The token of the page that row `r` of a tile holds.

    For V, the tile is the half h of every step, and row 16 w + 8 i1 + 2 s + i0 the token 32 s + 16 h + 4 w + 2 i1 + i0.
    """
    if TRANSPOSE:
        return (r & 1) + (r >> 1 & 3) * 32 + (r >> 3) * 2 + tile * 16
    else:
        return r + tile * 64


@gluon.jit
def _fetch(shared, x_ptr, stride, row, count, tile, TRANSPOSE: gl.constexpr):
    """Start to copy a tile of the page that begins at row `row` of `x`, where these are in 0 .. count - 1."""
    HALVES: gl.constexpr = shared.shape[0]
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    near, far = _token(r & 15, tile, TRANSPOSE), _token(r & 48, 0, TRANSPOSE)  # of the thread, of its registers
    pointer = x_ptr + row.to(gl.int64) * stride + (near * stride)[:, None] + gl.arange(0, 64, layout=gl.SliceLayout(0, L))[None, :]
    pointer += (far * stride)[:, None]
    rows = row + near + far
    if (row >= 0) & (row + 128 <= count):
        for a in gl.static_range(HALVES):
            async_copy.async_copy_global_to_shared(shared.index(a), pointer + 64 * a)
    else:
        ours = ((rows >= 0) & (rows < count))[:, None]
        for a in gl.static_range(HALVES):
            async_copy.async_copy_global_to_shared(shared.index(a), pointer + 64 * a, mask=ours)
    async_copy.commit_group()


@gluon.jit
def _quantise(y, factor, cells, D: gl.constexpr):
    """Words `[64, 4 (thread), D / 32]` of ascending indices, a nibble each, of the columns of `y [64, D]`, times `factor [64]`."""
    L: gl.constexpr = _lanes(D)
    t = gl.inline_asm_elementwise(_CLAMPED, "=f,f,f", [y, factor[:, None]], dtype=gl.float32, is_pure=True, pack=1)
    t = gl.convert_layout(t.reshape((4, 2, 8, D // 8, 4, 2)), L, assert_trivial=True)
    cell = gl.fma(t, 31.0, MAGIC)
    number = gl.inline_asm_elementwise(_SHUFFLE, "=f,f,f", [cells, cell], dtype=gl.float32, is_pure=True, pack=1)
    p = gl.fma(t, 16.0, number).reshape((64, D // 32, 2, 2, 4, 2))  # [row, step, h, i1, thread, i0]
    low, high = gl.split(p.permute((0, 4, 1, 3, 5, 2)))
    low0, low1 = gl.split(low)
    high0, high1 = gl.split(high)
    p0, p2 = gl.split(low0)
    p1, p3 = gl.split(low1)
    p4, p6 = gl.split(high0)
    p5, p7 = gl.split(high1)
    args = [p0, p1, p2, p3, p4, p5, p6, p7]
    words = gl.inline_asm_elementwise(_PACK, "=r,f,f,f,f,f,f,f,f", args, dtype=gl.uint32, is_pure=True, pack=1)
    return gl.convert_layout(words, _words(D // 32), assert_trivial=True)


@gluon.jit
def _encode_tile(y, shift, cells, squares, BOOK: gl.constexpr):
    """Words of indices `[64, 4, D / 32]` of `y [64, D]`, and scales."""
    D: gl.constexpr = y.shape[1]
    MMA: gl.constexpr = y.type.layout
    if BOOK.centred:
        y -= gl.load(shift + gl.arange(0, D, layout=gl.SliceLayout(0, MMA)))[None, :]
    parts = gl.sum((y * y).reshape((64, D // 8, 8)), 1)  # chains that do not wait for each other
    square = gl.convert_layout(gl.sum(parts, 1), gl.SliceLayout(1, MMA))
    safe = gl.maximum(square, TINY) * (1 / D)
    words = _quantise(y, gl.rsqrt(safe) * BOOK.factor, cells, D)
    if BOOK.rule == "matched":
        total = gl.sum(gl.sum(_squares(words, squares, BOOK), 2), 1)
        total = gl.convert_layout(total, gl.SliceLayout(1, MMA)).to(gl.float32)
        scale = gl.sqrt(square) * gl.rsqrt(total * (D / BOOK.unit))
    else:
        scale = gl.sqrt(square) * (BOOK.gain / D)
    return words, scale.to(gl.bfloat16)


@gluon.jit
def _squares(words, table, BOOK: gl.constexpr):
    """Sums of the squared levels of the nibbles of words, in units."""
    s0, s1, s2, s3 = table
    nibbles = words
    if BOOK.bits == 4:
        nibbles = _magnitude(words)
    if BOOK.whole:
        return gl.inline_asm_elementwise(_SQUARES, "=r,r,r,r", [nibbles, s0, s1], dtype=gl.int32, is_pure=True, pack=1)
    else:
        return gl.inline_asm_elementwise(_SUMS, "=r,r,r,r,r,r", [nibbles, s0, s1, s2, s3], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _magnitude(words):
    """Magnitudes, counted from zero outwards, of nibbles of ascending indices 0..15."""
    return ~(words ^ (words >> 3 & 0x11111111) * 7) & 0x77777777


@gluon.jit
def _signed(words):
    """Words of 4-bit codes as the page has them, of ascending indices: code (h, i) has its sign in bit 8 i + 7 - 4 h."""
    # Bytes 2, 0, 3, 1 have nibbles 4, 5, 0, 1, 6, 7, 2, 3; the page has the signs of 4, 0, 5, 1, 6, 2, 7, 3.
    s = gl.inline_asm_elementwise("prmt.b32 $0, $1, $1, 0x1302;", "=r,r", [words], dtype=gl.uint32, is_pure=True, pack=1)
    positive = (s & 0x80088008) | (s << 4 & 0x08000800) | (s >> 4 & 0x00800080)
    return _magnitude(words) | (positive ^ 0x88888888)


@gluon.constexpr_function
def _axis(layout: Any, axis: int, rank: int) -> Any:
    """Layout of that axis of a tensor of that layout."""
    for i in range(rank - 1, -1, -1):
        layout = layout if i == axis else gl.SliceLayout(i, layout)
    return layout


@gluon.jit
def _plane(words, low, SHAPE: gl.constexpr):
    """Fields of 4 / STEPS bits, from bit `low`, of nibbles `[..., S]`, beside those of the next steps.

    SHAPE: `[..., S / STEPS, STEPS]`.
    """
    LAST: gl.constexpr = len(SHAPE) - 1
    WIDTH: gl.constexpr = 4 // SHAPE[LAST]
    fields = (words >> low & (0x11111111 * (2**WIDTH - 1))).reshape(SHAPE)
    step = gl.arange(0, SHAPE[LAST], layout=_axis(fields.type.layout, LAST, LAST + 1)).to(gl.uint32)
    for i in gl.static_range(LAST):
        step = gl.expand_dims(step, i)
    return gl.sum(fields << step * WIDTH, LAST)


# --- K ---


@gluon.jit
def _put_rows(codes, words, row, start, end, BOOK: gl.constexpr):
    """Store words of indices `[64, 4, D / 32]` of the tokens `row` and up of the page, which are ours from `start` to `end`."""
    S: gl.constexpr = words.shape[2]
    if BOOK.bits == 4:
        _put(codes, _signed(words), row, start, end)
    else:
        _put(codes, _plane(words, 0, (64, 4, S // 2, 2)), row, start, end)
        if BOOK.bits == 3:
            _put(codes + 256 * S, _plane(words, 2, (64, 4, S // 4, 4)), row, start, end)


@gluon.jit
def _put(codes, words, row, start, end):
    W: gl.constexpr = words.shape[2]
    L: gl.constexpr = _words(W)
    words = gl.convert_layout(words, L, assert_trivial=True)
    r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
    w = gl.arange(0, W, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
    at = codes + r[:, None, None] * (4 * W) + t[None, :, None] * W + w[None, None, :]
    gl.store(at, words, mask=((r >= start) & (r < end))[:, None, None])


# --- V ---


@gluon.jit
def _halves(words):
    """Even and odd bytes `[4 (warp), 8 (half of word), 4 (thread), D / 32]`: two tokens of a coordinate each.

    words: of eight coordinates of a token. Byte 2 e + j has tokens 2 i1 + i0 = 2 e, 2 e + 1 of coordinate 2 j or, odd, 2 j + 1.
    """
    S: gl.constexpr = words.shape[2]
    x = gl.inline_asm_elementwise(_TRANSPOSE, "=r,r", [words], dtype=gl.uint32, is_pure=True, pack=1)
    a, b = gl.split(x.reshape((4, 2, 8, 4, S)).permute((0, 2, 3, 4, 1)))
    first = _permute(a, b, 0x5410)
    second = _permute(a, b, 0x7632)
    return (first & 0x0F0F0F0F) | (second << 4 & 0xF0F0F0F0), (first >> 4 & 0x0F0F0F0F) | (second & 0xF0F0F0F0)


@gluon.constexpr_function
def _prmt(order: int) -> str:
    return f"prmt.b32 $0, $1, $2, {order};"


@gluon.jit
def _permute(a, b, ORDER: gl.constexpr):
    """Bytes of two words."""
    return gl.inline_asm_elementwise(_prmt(ORDER), "=r,r,r", [a, b], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def _columns_of(even0, odd0, even1, odd1):
    """Words `[D / 32, 8, 4, 4 (warp), 4 (thread)]` of eight tokens of a coordinate, of the `_halves` of two tiles."""
    S: gl.constexpr = even0.shape[3]
    n0, n1 = _permute(even0, even1, 0x6420), _permute(odd0, odd1, 0x6420)
    n2, n3 = _permute(even0, even1, 0x7531), _permute(odd0, odd1, 0x7531)
    x = gl.join(gl.join(n0, n2), gl.join(n1, n3)).reshape((4, 8, 4, S, 4))  # [warp, half of word, thread, step, nibble]
    return gl.convert_layout(x.permute((3, 1, 4, 0, 2)), _columns(S, 4), assert_trivial=True)


@gluon.jit
def _put_columns(codes, words, start, end, BOOK: gl.constexpr):
    """Store words of indices `[D / 32, 8, 4, 4, 4]` of eight tokens each, of the page's tokens `start` to `end`."""
    S: gl.constexpr = words.shape[0]
    if BOOK.bits == 4:
        _merge(codes, _signed(words), start, end, 4, 4)
    else:
        _merge(codes, _plane(words, 0, (S, 8, 4, 4, 2, 2)), start, end, BOOK.bits, 2)
        if BOOK.bits == 3:
            _merge(codes + 256 * S, _plane(words, 2, (S, 8, 4, 4, 1, 4)), start, end, BOOK.bits, 1)


@gluon.constexpr_function
def _field(h: int, i: int, step: int, bits: int, run: int) -> int:
    """The bits of a word of a run that belong to code (h, i) of one of the word's steps."""
    nibble = 4 * (4 * h + i)
    return 7 << nibble | 1 << 8 * i + 7 - 4 * h if bits == 4 else (2**run - 1) << nibble + run * step


@gluon.jit
def _merge(codes, words, start, end, BITS: gl.constexpr, RUN: gl.constexpr):
    """Store words `[D / 32, 8, 4, 4, RUN]` of columns of the page, and keep the bits of other tokens than `start` to `end`."""
    S: gl.constexpr = words.shape[0]
    L: gl.constexpr = _columns(S, RUN)
    words = gl.convert_layout(words, L, assert_trivial=True)
    s = gl.arange(0, S, layout=_axis(L, 0, 5))[:, None, None, None, None]
    u = gl.arange(0, 8, layout=_axis(L, 1, 5))[None, :, None, None, None]
    i = gl.arange(0, 4, layout=_axis(L, 2, 5))[None, None, :, None, None]
    warp = gl.arange(0, 4, layout=_axis(L, 3, 5))[None, None, None, :, None]
    run = gl.arange(0, RUN, layout=_axis(L, 4, 5))[None, None, None, None, :]
    d = s * 32 + (u & 1) * 16 + (u >> 1) * 4 + i
    at = codes + d * (4 * RUN) + warp * RUN + run
    if (start <= 0) & (end >= 128):
        gl.store(at, words)
    else:
        STEPS: gl.constexpr = 4 // RUN
        mine = (warp + run).to(gl.uint32) * 0
        for step in gl.static_range(STEPS):
            for h in gl.static_range(2):
                for i0 in gl.static_range(4):
                    token = (run * STEPS + step) * 32 + 16 * h + 4 * warp + i0
                    inside = (token >= start) & (token < end)
                    mine |= gl.where(inside, _field(h, i0, step, BITS, RUN), 0).to(gl.uint32)
        old = gl.load(at, mask=(mine != 0) & (mine != 0xFFFFFFFF), other=0)
        gl.store(at, old ^ ((old ^ words) & mine), mask=mine != 0)


# --- the walk ---


@gluon.jit
def _side(
    x_ptr, stride, matrix_ptr, shift, table_ptr, x_shared, matrix, pool, H, table, first, last, start, end,
    BOOK: gl.constexpr, TRANSPOSE: gl.constexpr, CODES_AT: gl.constexpr, SCALES_AT: gl.constexpr, PAGE_BYTES: gl.constexpr,
):  # fmt: skip
    """The pages from token `first` to token `last` of K, or with TRANSPOSE of V; `x_ptr` is token `start`."""
    HALVES: gl.constexpr = matrix.shape[0]
    D: gl.constexpr = HALVES * 64
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    n = gl.arange(0, 64, layout=gl.SliceLayout(1, COPY))
    d = gl.arange(0, 64, layout=gl.SliceLayout(0, COPY))
    for a in gl.static_range(HALVES):
        async_copy.async_copy_global_to_shared(matrix.index(a), matrix_ptr + n[:, None] * D + d[None, :] + 64 * a)
    stop = (last + 127) // 128 * 128  # both tiles of a page of V have some of its first tokens
    _fetch(x_shared, x_ptr, stride, first - start, end - start, 0, TRANSPOSE)
    # Every thread loads its own copies, so that they stay in registers.
    L: gl.constexpr = _lanes(D)
    quad = gl.arange(0, 8, layout=_axis(L, 2, 6))[None, None, :, None, None, None]
    thread = gl.arange(0, 4, layout=_axis(L, 4, 6))[None, None, None, None, :, None]
    cells = gl.load(table_ptr.to(gl.pointer_type(gl.float32), bitcast=True) + quad * 4 + thread)
    copies = table_ptr + 32 + gl.arange(0, 4, layout=_axis(_words(D // 32), 1, 3))[None, :, None]
    squares = (gl.load(copies), gl.load(copies + 4), gl.load(copies + 8), gl.load(copies + 12))
    index = gl.load(table + first // 128)
    if TRANSPOSE:
        even0, odd0 = _halves(gl.full([64, 4, D // 32], 0, gl.uint32, layout=_words(D // 32)))
    for at in range(first, stop, 64):
        tile = at % 128 // 64
        origin = at - tile * 64  # the page's first token
        page = pool + index.to(gl.int64) * (H * PAGE_BYTES)
        index = gl.load(table + gl.minimum(at + 64, last - 1) // 128)
        codes = (page + CODES_AT).to(gl.pointer_type(gl.uint32), bitcast=True)
        scales = (page + SCALES_AT).to(gl.pointer_type(gl.bfloat16), bitcast=True)
        low, high = start - origin, end - origin  # tokens of the page that are ours
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()  # the tile is here
        y = _rotate(x_shared, matrix)
        gl.thread_barrier()  # all have read it
        following = at + 64
        if following < stop:
            _fetch(x_shared, x_ptr, stride, following // 128 * 128 - start, end - start, 1 - tile, TRANSPOSE)
        words, scale = _encode_tile(y, shift, cells, squares, BOOK)
        token = _token(gl.arange(0, 64, layout=gl.SliceLayout(1, MMA)), tile, TRANSPOSE)
        gl.store(scales + token * 2, scale, mask=(token >= low) & (token < high))
        if TRANSPOSE:
            even, odd = _halves(words)
            if tile == 1:
                _put_columns(codes, _columns_of(even0, odd0, even, odd), low, high, BOOK)
            even0, odd0 = even, odd
        else:
            _put_rows(codes, words, 64 * tile, low, high, BOOK)


@gluon.jit
def _rotate(x, matrix):
    """y `[64, D]` of a tile in shared memory: sums and differences of the products of its halves of 64 columns."""
    zero = gl.full([64, 64], 0.0, gl.float32, layout=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
    y = warpgroup_mma(x.index(0), matrix.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    if matrix.shape[0] == 1:
        return warpgroup_mma_wait(0, [y])
    else:
        z = warpgroup_mma(x.index(1), matrix.index(1).permute((1, 0)), zero, use_acc=False, is_async=True)
        y, z = warpgroup_mma_wait(0, [y, z])
        both = gl.join(y + z, y - z).permute((0, 2, 1)).reshape((64, 128))
        return gl.convert_layout(both, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]), assert_trivial=True)


# One variant for all rows and lengths, and for all places in a batch.
@gluon.jit(do_not_specialize=["span", "spans", "table_b"], do_not_specialize_on_alignment=["table", "starts", "counts"])
def encode_kernel(
    k_ptr, v_ptr, k_matrix, v_matrix, k_shift, v_shift, k_table, v_table, pool, table, starts, counts,
    H, span, spans, k_b, k_h, k_n, v_b, v_h, v_n, table_b,
    D: gl.constexpr, KEY: gl.constexpr, VALUE: gl.constexpr, VALUES_AT: gl.constexpr, SCALES_AT: gl.constexpr,
    PAGE_BYTES: gl.constexpr,
):  # fmt: skip
    """One span, a multiple of 128 tokens, of K or V of one head of one row."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    x_shared = gl.allocate_shared_memory(k_ptr.dtype.element_ty, [D // 64, 64, 64], SHARED)
    matrix = gl.allocate_shared_memory(k_ptr.dtype.element_ty, [D // 64, 64, 64], SHARED)
    pid = gl.program_id(0)
    segment = pid // spans
    b, h = segment // H, segment % H
    start = gl.load(starts + b)
    end = start + gl.load(counts + b)
    low = (start // span + pid % spans) * span
    first = gl.maximum(low, start // 128 * 128)
    last = gl.minimum(low + span, end)
    if (first < last) & (start < end):
        table += b.to(gl.int64) * table_b
        pool += h.to(gl.int64) * PAGE_BYTES
        if gl.program_id(1) == 0:
            k_ptr += b.to(gl.int64) * k_b + h.to(gl.int64) * k_h
            _side(
                k_ptr, k_n, k_matrix, k_shift + h * D, k_table, x_shared, matrix, pool, H, table, first, last, start, end,
                KEY, False, 0, SCALES_AT, PAGE_BYTES,
            )  # fmt: skip
        else:
            v_ptr += b.to(gl.int64) * v_b + h.to(gl.int64) * v_h
            _side(
                v_ptr, v_n, v_matrix, v_shift + h * D, v_table, x_shared, matrix, pool, H, table, first, last, start, end,
                VALUE, True, VALUES_AT, SCALES_AT + 2, PAGE_BYTES,
            )  # fmt: skip
