"""Vectors into pages: what `PolarCodec` and `Fp8Codec` encode and `pages.write` stores, in one kernel for K and V.

Its time goes into instructions per element, so that is what it is built around. For a tile of tokens x `[T, D]`:

    rotate      y = x @ M' on the matrix units. M is the signed Hadamard matrix without its 1 / sqrt(D), +-1 and so exact in 16 bits;
                for 8-bit codes it is the identity. Columns of y come in an order in which one thread holds the codes of a 32-bit word
                of the page, so that packing exchanges nothing (`_order`)
    quantise    magnitude = round(P(min(|y| / |x|, cap))), with a polynomial P that counts the edges below its argument (`book`)
    pack        P ends with the addition of a large number, which leaves the rounded magnitude in the low bits. Eight of them make a
                word by a Horner scheme in integers, eight signs are shifted in from the top: one instruction each
    scale       the sum of the squared levels is a weighted sum of counts of bits of those words (`book`)
    transpose   words of K go to the page as they are. Words of V hold eight coordinates of one token; those of eight tokens are
                transposed, nibble by nibble, into words of eight tokens of one coordinate

A nibble is a magnitude, counted from zero outwards, with the sign in bit 3 (1 is negative).

Every word of V belongs to one program: to its span of a multiple of 128 tokens, which it walks tile by tile. So neighbours' bits are
kept without atomics; words without neighbours are not read. The grid depends on shapes alone.

Codes differ from the codec's only where a coordinate lies on an edge up to float32 rounding (a zero counts as positive), which small
and large tiles may round differently. Norms below 1e-18 or above 1e18 leave the range where squares fit float32. A vector with a NaN
or an Inf gets codes and a scale that mean nothing; other vectors do not notice. Looking for those is the caller's.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.codecs.fp8 import Fp8Codec
from kvstack.codecs.polar import PolarCodec
from kvstack.kernels import book
from kvstack.kernels.book import Book
from kvstack.kernels.pages import PAGE, Pages

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it is rounded to an integer, in the low bits
TINY = tl.constexpr(1e-36)  # squared norms are not taken for less
UNIT = tl.constexpr(book.UNIT)
BIAS = tl.constexpr(0x4B400000 * 0x11111111 % 2**32)  # what eight of its bit patterns add up to in a Horner scheme of nibbles


@dataclass(frozen=True)
class Config:
    """tile: tokens that are encoded at once, 32 or 128. span: tokens of a row that one program walks, a multiple of 128. chunk:
    coordinates that are multiplied at once; below D the matrix is not kept, but read for every tile. registers: of a thread, at most;
    None is what the compiler likes. fragment: see `_order`."""

    tile: int
    span: int
    chunk: int
    warps: int
    registers: int | None
    fragment: str


@dataclass(frozen=True)
class Machine:
    """shared: bytes of shared memory that a program may have. kind: of matrix units: mma (NVIDIA), wgmma (from Hopper), mfma (AMD).
    hopper: whether it is one."""

    shared: int
    kind: str
    hopper: bool = False


def config(n: int, head_dim: int, dtype: torch.dtype, machine: Machine) -> Config:
    """How `n` tokens are encoded.

    Many: whole pages, four of them to a program, which reads the matrix once. A thread of 8 warps holds 64 numbers of `y`, and two such
    programs fill the registers of a multiprocessor. Few: small tiles.
    """
    many = n > 32 and dtype.itemsize == 2
    tile, span, warps = (PAGE, 4 * PAGE, head_dim // 16) if many else (32, PAGE, head_dim // 32)
    whole = dtype.itemsize == 2 and (tile + head_dim) * head_dim * 2 <= machine.shared
    fragment = "mma" if machine.kind == "wgmma" and not many else machine.kind  # 32 rows are too few for wgmma
    return Config(tile, span, head_dim if whole else 32, max(warps, 4), 128 if many and machine.kind != "mfma" else None, fragment)


@cache
def _machine(device: torch.device) -> Machine:
    if device.type != "cuda":  # the interpreter
        return Machine(2**31, "mma")
    shared = int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 2**16))
    if torch.version.hip:
        return Machine(shared, "mfma")
    capability = torch.cuda.get_device_capability(device)
    return Machine(shared, "wgmma" if capability in ((9, 0), (10, 0), (10, 3)) else "mma", capability == (9, 0))


def encode(k: Tensor, v: Tensor, key: Codec, value: Codec, pages: Pages, starts: Tensor, counts: Tensor) -> None:
    """Encode the first `counts[b]` tokens of row b of `k, v [B, H, n, D]` and put them at token `starts[b]` of row b of `pages`.

    k, v: float16, bfloat16 or float32 with unit stride in D. key, value: a PolarCodec of 2, 3 or 4 bits or an Fp8Codec, as the page's
    format says. starts, counts: `[B]` int32 on the device, not read on the host; the table must have pages for what is written. The
    lengths are the caller's. The first call with a codec waits for its tables; later ones wait for nothing and can be captured.

    On Hopper `encode_hopper` does the same for many tokens of 16 bits, in 60 % of the time.
    """
    batch, heads, n, head_dim = k.shape
    f, pool, table = pages.format, pages.pool, pages.table
    assert v.shape == k.shape and k.stride(3) == v.stride(3) == 1 and k.dtype == v.dtype
    assert head_dim == f.head_dim and table.shape[0] == batch and table.stride(1) == 1
    assert pool.shape[1:] == (heads, f.nbytes) and pool.is_contiguous()
    machine = _machine(k.device)
    if machine.hopper:
        from kvstack.kernels import encode_hopper  # other GPUs do without Gluon

        if encode_hopper.fits(k, v, key, value):
            encode_hopper.launch(k, v, key, value, pages, starts, counts)
            return
    if k.numel():
        launch(k, v, key, value, pages, starts, counts, config(n, head_dim, k.dtype, machine))


def launch(k: Tensor, v: Tensor, key: Codec, value: Codec, pages: Pages, starts: Tensor, counts: Tensor, how: Config) -> None:
    """`encode` by the kernel below, in a given configuration."""
    batch, heads, n, head_dim = k.shape
    f, key_tables, value_tables = pages.format, _tables(key, k), _tables(value, v)
    assert (key_tables.book.bits, value_tables.book.bits) == (f.k, f.v), "codecs of other widths than the pages"
    spans = 1 if n == 1 else (n - 2) // how.span + 2  # of the row's grid that n tokens touch, at most
    encode_kernel[(batch * heads * 2 * spans,)](
        k,
        v,
        key_tables.matrix,
        value_tables.matrix,
        key_tables.shift,
        value_tables.shift,
        pages.pool,
        pages.table,
        starts,
        counts,
        heads,
        spans,
        *k.stride()[:3],
        *v.stride()[:3],
        pages.table.stride(0),
        D=head_dim,
        KEY=key_tables.book,
        VALUE=value_tables.book,
        VALUES_AT=f.value_offset,
        SCALES_AT=f.scale_offset,
        PAGE_BYTES=f.nbytes,
        TILE=how.tile,
        SPAN=how.span,
        CHUNK=how.chunk,
        FRAGMENT=how.fragment,
        PRECISION="ieee" if torch.version.hip else "tf32x3",  # of float32 operands: 22 bits of x, and +-1 is exact
        num_warps=how.warps,
        num_stages=1,  # two programs hide each other's loads; more buffers would leave room for one
        **({} if how.registers is None else {"maxnreg": how.registers}),
    )


@dataclass(frozen=True)
class _Tables:
    """matrix: `[D, D]`, x is multiplied with its rows. shift: the centre after that, `[H, D]` float32; anything without a centre."""

    book: Book
    matrix: Tensor
    shift: Tensor


@book.once
def _tables(codec: Codec, x: Tensor) -> _Tables:
    """What the kernel needs of a codec to encode `x`."""
    if isinstance(codec, Fp8Codec):
        identity = torch.eye(x.shape[3], dtype=x.dtype, device=x.device)
        return _Tables(Book(8), identity, identity)
    assert isinstance(codec, PolarCodec)
    matrix, shift = book.signs(codec)
    matrix = matrix.to(x.dtype)
    return _Tables(book.book(codec), matrix, matrix if shift is None else shift.contiguous())


# --- the kernel ---


@triton.jit(do_not_specialize=["spans", "table_b"])  # they change with the length of a prompt
def encode_kernel(
    k_ptr,
    v_ptr,
    k_matrix,
    v_matrix,
    k_shift,
    v_shift,
    pool,
    table,
    starts,
    counts,
    H,
    spans,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    table_b,
    D: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    VALUES_AT: tl.constexpr,
    SCALES_AT: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    FRAGMENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One span of K or V of one head of one row."""
    pid = tl.program_id(0)
    segment = pid // (2 * spans)
    b, h = segment // H, segment % H
    start = tl.load(starts + b)
    end = start + tl.load(counts + b)
    low = (start // SPAN + pid % spans) * SPAN
    first = tl.maximum(low, start // TILE * TILE)
    last = tl.minimum(low + SPAN, end)
    if (first < last) & (start < end):
        table += b.to(tl.int64) * table_b
        pool += h.to(tl.int64) * PAGE_BYTES
        if pid // spans % 2 == 0:
            k_ptr += b.to(tl.int64) * k_b + h.to(tl.int64) * k_h
            _side(
                k_ptr, k_n, k_matrix, k_shift + h * D, pool, H, table, first, last, start, end,
                D, KEY, False, 0, SCALES_AT, PAGE_BYTES, TILE, CHUNK, FRAGMENT, PRECISION,
            )  # fmt: skip
        else:
            v_ptr += b.to(tl.int64) * v_b + h.to(tl.int64) * v_h
            _side(
                v_ptr, v_n, v_matrix, v_shift + h * D, pool, H, table, first, last, start, end,
                D, VALUE, True, VALUES_AT, SCALES_AT + 2, PAGE_BYTES, TILE, CHUNK, FRAGMENT, PRECISION,
            )  # fmt: skip


@triton.jit
def _side(
    x_ptr, stride, matrix, shift, pool, H, table, first, last, start, end,
    D: tl.constexpr, BOOK: tl.constexpr, TRANSPOSE: tl.constexpr, CODES_AT: tl.constexpr, SCALES_AT: tl.constexpr,
    PAGE_BYTES: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, FRAGMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles from token `first` to token `last` of K, or with TRANSPOSE of V; `x_ptr` is token `start`."""
    c = tl.arange(0, D)
    column = _order(c, D // 32, FRAGMENT)
    if CHUNK == D:
        m = tl.load(matrix + c[:, None] + column[None, :] * D)
    for tile in tl.range(first, last, TILE):
        token = tile + tl.arange(0, TILE)
        ours = (token >= start) & (token < end)
        row = tl.minimum(tl.maximum(token - start, 0), end - start - 1).to(tl.uint32)  # what others give is not stored
        rows = x_ptr + (row.to(tl.uint64) * tl.cast(stride, tl.uint32).to(tl.uint64))[:, None]  # 32 by 32 bits: one instruction
        if CHUNK == D:
            y = tl.dot(tl.load(rows + c[None, :]), m)
        else:
            y = tl.zeros([TILE, D], tl.float32)
            for at in range(0, D, CHUNK):
                d = at + tl.arange(0, CHUNK)
                x = tl.load(rows + d[None, :])
                y = tl.dot(x, tl.load(matrix + d[:, None] + column[None, :] * D), y, input_precision=PRECISION)
        if BOOK.centred:
            y -= tl.load(shift + column)[None, :]
        page = pool + tl.load(table + tile // 128).to(tl.int64) * (H * PAGE_BYTES)
        if BOOK.bits == 8:
            words, scale = _bytes(y, FRAGMENT, TILE, D)
        else:
            words, scale = _nibbles(y, BOOK, TRANSPOSE, FRAGMENT, TILE, D)
        place = tile % 128 + tl.arange(0, TILE)
        scales = (page + SCALES_AT).to(tl.pointer_type(tl.uint16))
        tl.store(scales + place * 2, _bfloat16(scale), mask=ours)
        codes = (page + CODES_AT).to(tl.pointer_type(tl.uint32))
        if TRANSPOSE:
            _put_columns(codes, words, tile, start, end, BOOK, TILE, D)
        else:
            _put_rows(codes, words, place, ours, BOOK, TILE, D)


# --- from y to nibbles and scales ---


@triton.jit
def _nibbles(y, BOOK: tl.constexpr, TRANSPOSE: tl.constexpr, FRAGMENT: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """Words `[T, D / 32, 4]` of the nibbles of `y [T, D]`, with signs in the page's places for 4-bit K, and scales `[T]`."""
    S: tl.constexpr = D // 32
    square = tl.sum(y * y, 1)
    safe = tl.maximum(square, TINY) * (1 / D)
    inverse = tl.rsqrt(safe)  # of |x|, for |y| = sqrt(D) |x|
    norm = safe * inverse
    factor = inverse
    if BOOK.trials > 0:
        best = tl.full([T], -1.0, tl.float32)
        for i in range(BOOK.trials):
            candidate = BOOK.first + BOOK.step * i
            z = _level(_rank(y, inverse * candidate, norm / candidate, BOOK), BOOK)
            cosine = tl.sum(tl.abs(y) * z, 1) * inverse * tl.rsqrt(tl.sum(z * z, 1))
            factor = tl.where(cosine > best, inverse * candidate, factor)
            best = tl.maximum(cosine, best)
        norm = 1 / factor
    rank = _rank(y, factor, norm, BOOK)
    m0, m1, m2, m3, m4, m5, m6, m7 = _split8(_threads(rank.to(tl.uint32, bitcast=True), T, S, FRAGMENT))
    magnitude = ((((((m7 * 16 + m6) * 16 + m5) * 16 + m4) * 16 + m3) * 16 + m2) * 16 + m1) * 16 + m0 - BIAS
    s0, s1, s2, s3, s4, s5, s6, s7 = _split8(_threads(y.to(tl.uint32, bitcast=True), T, S, FRAGMENT))
    if BOOK.bits == 4 and not TRANSPOSE:
        sign = _top(_top(_top(_top(_top(_top(_top(s3 >> 28, s7), s2), s6), s1), s5), s0), s4)
    else:
        sign = _top(_top(_top(_top(_top(_top(_top(s7 >> 28, s6), s5), s4), s3), s2), s1), s0)
    if BOOK.rule == "matched":
        scale = tl.sqrt(square) * tl.rsqrt(_squares(magnitude, BOOK, S, T))
    elif BOOK.rule == "plain" and BOOK.trials == 0:
        scale = tl.sqrt(square) * (BOOK.gain / D)
    else:
        z = _level(rank, BOOK)
        dot = tl.sum(tl.abs(y) * z, 1) * inverse
        scale = tl.sqrt(square) * (1 / tl.maximum(dot, 0.5) if BOOK.rule == "unbiased" else dot / (tl.sum(z * z, 1) * D))
    return (magnitude & 0x77777777) | (sign & 0x88888888), scale


@triton.jit
def _rank(y, factor, norm, BOOK: tl.constexpr):
    """MAGIC plus the magnitude of `y`, for the rows' factors and their inverses."""
    u = tl.minimum(tl.abs(y), (norm * BOOK.cap)[:, None]) * factor[:, None] - BOOK.origin
    p = u * BOOK.ladder[0]
    for i in tl.static_range(1, len(BOOK.ladder) - 1):
        p = (p + BOOK.ladder[i]) * u
    return p + (BOOK.ladder[len(BOOK.ladder) - 1] + MAGIC)


@triton.jit
def _level(rank, BOOK: tl.constexpr):
    """Level of the magnitude of `_rank`."""
    u = rank - (MAGIC + 3)
    p = u * BOOK.levels[0] + BOOK.levels[1]
    for i in tl.static_range(2, len(BOOK.levels)):
        p = p * u + BOOK.levels[i]
    return p


@triton.jit
def _squares(words, BOOK: tl.constexpr, S: tl.constexpr, T: tl.constexpr):
    """D times the sums `[T]` of the squared levels of the magnitudes in `words [T, S, 4]`."""
    if S == 2:
        w0, w1 = tl.split(tl.permute(words, [0, 2, 1]))
        b0, b1, b2 = (_bit(w0, w1, 0), _bit(w0, w1, 1), _bit(w0, w1, 2))
    else:
        w0, w1, w2, w3 = _split4(tl.permute(tl.reshape(words, [T, S // 4, 2, 2, 4]), [0, 1, 4, 2, 3]))
        b0 = _bit(w0, w1, 0) | _bit(w2, w3, 0) << 2
        b1 = _bit(w0, w1, 1) | _bit(w2, w3, 1) << 2
        b2 = _bit(w0, w1, 2) | _bit(w2, w3, 2) << 2
    total = _count(b0) * BOOK.squares[1]
    if BOOK.bits > 2:
        total += _count(b1) * BOOK.squares[2] + _count(b0 & b1) * BOOK.squares[3]
    if BOOK.bits > 3:
        total += _count(b2) * BOOK.squares[4] + _count(b0 & b2) * BOOK.squares[5]
        total += _count(b1 & b2) * BOOK.squares[6] + _count(b0 & b1 & b2) * BOOK.squares[7]
    if S == 8:
        total = tl.sum(total, 1)
    total = tl.sum(tl.reshape(total, [T, 4]), 1) + 32 * S * BOOK.squares[0]
    return total.to(tl.float32) * (32 * S / UNIT)


@triton.jit
def _bit(a, b, BIT: tl.constexpr):
    """Bit `BIT` of the nibbles of two words, beside each other."""
    return (a >> BIT & 0x11111111) | (b >> BIT & 0x11111111) << 1


@triton.jit
def _count(x):
    """Number of bits, as compilers recognise it."""
    x = x - (x >> 1 & 0x55555555)
    x = (x & 0x33333333) + (x >> 2 & 0x33333333)
    return ((x + (x >> 4) & 0x0F0F0F0F) * 0x01010101 >> 24).to(tl.int32)


@triton.jit
def _top(word, x):
    """`word` shifted to the left by a nibble, with the top nibble of `x` behind it."""
    return word << 4 | x >> 28


@triton.jit
def _bytes(y, FRAGMENT: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """Words `[T, D / 32, 2 (h), 4 (t)]` of four E4M3 numbers of `y [T, D]`, and the scale of every vector `[T]`."""
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(y), 1), 448.0), 1.1754943508222875e-38)  # the least normal number
    scale = (_bfloat16(scale).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    inverse = (1 / scale)[:, None]
    q = y * inverse
    q = tl.fma(tl.fma(-q, scale[:, None], y), inverse, q)  # a quotient that is a tie must be exact
    bits = q.to(tl.uint32, bitcast=True)
    size = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), 448.0)
    small = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000  # multiples of 2^-9, rounded to the nearest even
    size = size.to(tl.uint32, bitcast=True)
    normal = (size + 0x7FFFF + (size >> 20 & 1) >> 20) - (120 << 3)
    code = tl.where(size < 0x3C800000, small, normal) | (bits >> 24 & 0x80)
    q0, q1, q2, q3 = _split4(tl.permute(_threads(code, T, D // 32, FRAGMENT), [0, 1, 3, 2, 4, 5]))
    return q0 | q1 << 8 | q2 << 16 | q3 << 24, scale


@triton.jit
def _bfloat16(x):
    """Bits `uint16` of bfloat16 numbers, rounded to the nearest even."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(x == x, bits + 0x7FFF + (bits >> 16 & 1) >> 16, 0x7FC0).to(tl.uint16)


# --- from nibbles to the page ---


@triton.jit
def _put_rows(codes, words, place, ours, BOOK: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """Store the words of K in the rows `place [T]`, where `ours`."""
    if BOOK.bits == 8:
        _put(codes, tl.reshape(tl.permute(words, [0, 3, 1, 2]), [T, D // 4]), place, ours)
    else:
        words = tl.reshape(tl.permute(words, [0, 2, 1]), [T, D // 8])
        if BOOK.bits == 4:
            _put(codes, words, place, ours)
        else:
            _put(codes, _plane(_low(words, BOOK), 2, 0), place, ours)
            if BOOK.bits == 3:
                _put(codes + D * 8, _plane(_high(words), 4, 0), place, ours)


@triton.jit
def _put(codes, words, place, ours):
    """Words `[T, 4 W]` of whole rows."""
    W: tl.constexpr = words.shape[1]
    tl.store(codes + place[:, None] * W + tl.arange(0, W)[None, :], words, mask=ours[:, None])


@triton.jit
def _put_columns(codes, words, tile, start, end, BOOK: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """Store the words of V, eight coordinates (or four, with 8 bits) of one token each, as words of tokens."""
    S: tl.constexpr = T // 32
    SD: tl.constexpr = D // 32
    token = tile + tl.arange(0, T)
    s = 0 if T == 128 else tile % 128 // 32  # the step of the page where the tile begins
    ours = tl.reshape(((token >= start) & (token < end)).to(tl.uint32), [S, 2, 4, 4])
    h, i = tl.arange(0, 2)[None, :, None, None], tl.arange(0, 4)[None, None, None, :]
    if BOOK.bits == 8:
        mine = tl.reshape(tl.permute(tl.sum(ours * 255 << 8 * i, 3), [2, 0, 1]), [1, 8 * S])  # [1, (t, s, h)]
        a = tl.reshape(words, [S, 2, 4, 2, 2, SD * 8])
        a0, a1, a2, a3 = _split4(tl.reshape(tl.permute(a, [5, 2, 0, 1, 3, 4]), [SD * 8, 8 * S, 2, 2]))
        b0, b1, b2, b3 = _bytes_across(a0, a1, a2, a3)
        row = tl.arange(0, SD * 8) * 4
        _merge(codes, b0, mine, row, 8, 2 * s)
        _merge(codes, b1, mine, row + 1, 8, 2 * s)
        _merge(codes, b2, mine, row + 2, 8, 2 * s)
        _merge(codes, b3, mine, row + 3, 8, 2 * s)
    else:
        bits = (ours * 7 << 16 * h + 4 * i) | (ours * 8 << (8 * i + 4 - 4 * h if BOOK.bits == 4 else 16 * h + 4 * i))
        mine = tl.reshape(tl.permute(tl.sum(tl.sum(bits, 3), 1), [1, 0]), [1, 4 * S])  # [1, (t, s)]
        a = tl.reshape(words, [S, 2, 4, 2, 2, SD * 4])
        a0, a1, a2, a3, a4, a5, a6, a7 = _split8(tl.reshape(tl.permute(a, [5, 2, 0, 1, 3, 4]), [SD * 4, 4 * S, 2, 2, 2]))
        if BOOK.bits == 4:
            even0, odd0 = _pair(a0, a1, a4, a0)
            even1, odd1 = _pair(a2, a3, a5, a1)
            even2, odd2 = _pair(a4, a5, a6, a2)
            even3, odd3 = _pair(a6, a7, a7, a3)
        else:
            even0, odd0 = _pair(a0, a1, a0, a1)
            even1, odd1 = _pair(a2, a3, a2, a3)
            even2, odd2 = _pair(a4, a5, a4, a5)
            even3, odd3 = _pair(a6, a7, a6, a7)
        n0, n2, n4, n6 = _bytes_across(even0, even1, even2, even3)
        n1, n3, n5, n7 = _bytes_across(odd0, odd1, odd2, odd3)
        row = tl.arange(0, SD * 4)
        row = row // 4 * 32 + row % 4 * 4
        _put_column(codes, n0, mine, row, s, BOOK, D, S)
        _put_column(codes, n1, mine, row + 1, s, BOOK, D, S)
        _put_column(codes, n2, mine, row + 2, s, BOOK, D, S)
        _put_column(codes, n3, mine, row + 3, s, BOOK, D, S)
        _put_column(codes, n4, mine, row + 16, s, BOOK, D, S)
        _put_column(codes, n5, mine, row + 17, s, BOOK, D, S)
        _put_column(codes, n6, mine, row + 18, s, BOOK, D, S)
        _put_column(codes, n7, mine, row + 19, s, BOOK, D, S)


@triton.jit
def _put_column(codes, words, mine, row, s, BOOK: tl.constexpr, D: tl.constexpr, S: tl.constexpr):
    """Store nibbles `words [D / 8, 4 S]` of eight tokens each in the rows `row [D / 8]` of V, in what is `mine [1, 4 S]`."""
    if BOOK.bits == 4:
        _merge(codes, words, mine, row, 4, s)
    else:
        _merge(codes, _plane(_low(words, BOOK), 2, s), _plane(mine & 0x33333333, 2, s), row, 2, s // 2)
        if BOOK.bits == 3:
            _merge(codes + D * 8, _plane(_high(words), 4, s), _plane(mine & 0x11111111, 4, s), row, 1, s // 4)


@triton.jit
def _merge(codes, words, mine, row, RUN: tl.constexpr, at):
    """Put the bits `mine [1, 4 W]` of `words [R, 4 W]` at word `at` of the run of every thread. Reads words that are mine in part."""
    W: tl.constexpr = words.shape[1] // 4
    i = tl.arange(0, 4 * W)
    where = codes + row[:, None] * (4 * RUN) + (i if W == RUN else i // W * RUN + at + i % W)[None, :]
    old = tl.load(where, mask=(mine != 0) & (mine != 0xFFFFFFFF), other=0)
    tl.store(where, old ^ ((old ^ words) & mine), mask=mine != 0)


@triton.jit
def _pair(a, b, sign_a, sign_b):
    """The even and the odd nibbles of `a` and `b`: bytes whose low nibble is of a, whose high nibble is of b, with signs of others."""
    even = _choose(_choose(a, b << 4, 0x07070707), _choose(sign_a, sign_b << 4, 0x08080808), 0x77777777)
    odd = _choose(_choose(a >> 4, b, 0x07070707), _choose(sign_a >> 4, sign_b, 0x08080808), 0x77777777)
    return even, odd


@triton.jit
def _choose(a, b, MASK: tl.constexpr):
    """Bits of `a` where the mask is set, of `b` elsewhere."""
    return (a & MASK) | (b & (MASK ^ 0xFFFFFFFF))


@triton.jit
def _bytes_across(a, b, c, d):
    """Word j of the bytes j of four words."""
    ab0, ab1 = _choose(a, b << 8, 0x00FF00FF), _choose(a >> 8, b, 0x00FF00FF)
    cd0, cd1 = _choose(c, d << 8, 0x00FF00FF), _choose(c >> 8, d, 0x00FF00FF)
    w0, w1 = _choose(ab0, cd0 << 16, 0x0000FFFF), _choose(ab1, cd1 << 16, 0x0000FFFF)
    return w0, w1, _choose(ab0 >> 16, cd0, 0x0000FFFF), _choose(ab1 >> 16, cd1, 0x0000FFFF)


@triton.jit
def _low(words, BOOK: tl.constexpr):
    """The low two bits of the ascending indices of nibbles: the magnitude counts from -1/2 downwards and from 1/2 upwards."""
    negative = words >> 3 & 0x11111111
    if BOOK.bits == 2:
        return ((words ^ negative) & 0x11111111) | ((negative ^ 0x11111111) << 1)
    return (words ^ negative ^ negative << 1) & 0x33333333


@triton.jit
def _high(words):
    """The third bit of the ascending indices of nibbles: whether the coordinate is positive."""
    return (words >> 3 & 0x11111111) ^ 0x11111111


@triton.jit
def _plane(fields, STEPS: tl.constexpr, s):
    """Fields of 4 / STEPS bits in nibbles `[R, 4 S]` beside those of the next steps: `[R, 4 S / STEPS]`; s is the first step."""
    WIDTH: tl.constexpr = 4 // STEPS
    if fields.shape[1] >= 4 * STEPS:
        fields = tl.reshape(fields, [fields.shape[0], fields.shape[1] // STEPS, STEPS])
        return tl.sum(fields << WIDTH * tl.arange(0, STEPS)[None, None, :], 2)
    else:
        return fields << WIDTH * (s % STEPS)


@triton.jit
def _order(c, S: tl.constexpr, FRAGMENT: tl.constexpr):
    """The page's columns `c [D]` in the order of y.

    A thread should hold all (h, i1, i0) of a word. In an accumulator, the lowest bit of the column and the bits above the four threads
    t are registers; warps that share the columns differ in the lowest bits above t ("mma") or in the highest ("wgmma"), so these are
    bits of s. Threads of an AMD accumulator ("mfma") hold four neighbours.
    """
    if FRAGMENT == "mfma":
        return c
    else:
        high: tl.constexpr = 2 if FRAGMENT == "wgmma" else 1
        c = tl.reshape(c, [high, S // high, 2, 4, 2, 2])  # s, s, h, t, i1, i0
        return tl.reshape(tl.permute(c, [0, 2, 4, 1, 3, 5]), [32 * S])


@triton.jit
def _threads(x, T: tl.constexpr, S: tl.constexpr, FRAGMENT: tl.constexpr):
    """Columns of `x [T, D]`, which are in the order of `_order`, by the words that they belong to: `[T, s, t, h, i1, i0]`."""
    if FRAGMENT == "mfma":
        return tl.permute(tl.reshape(x, [T, S, 2, 4, 2, 2]), [0, 1, 3, 2, 4, 5])
    else:
        high: tl.constexpr = 2 if FRAGMENT == "wgmma" else 1
        x = tl.permute(tl.reshape(x, [T, high, 2, 2, S // high, 4, 2]), [0, 1, 4, 5, 2, 3, 6])
        return tl.reshape(x, [T, S, 4, 2, 2, 2])


@triton.jit
def _split4(x):
    """Four parts of `x [..., 2, 2]`."""
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _split8(x):
    """Eight parts of `x [..., 2, 2, 2]`."""
    even, odd = tl.split(x)
    x0, x2, x4, x6 = _split4(even)
    x1, x3, x5, x7 = _split4(odd)
    return x0, x1, x2, x3, x4, x5, x6, x7
