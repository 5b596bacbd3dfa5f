"""Vectors into pages: what `PolarCodec` and `Fp8Codec` encode and `pages.write` stores, in one kernel for K and V.

Its time goes into instructions per element, so that is what it is built around. For a tile of tokens x `[T, D]`:

    rotate      y = x @ M' on the matrix units. M is the signed Hadamard matrix without its 1 / sqrt(D), +-1 and so exact in 16 bits;
                for 8-bit codes it is the identity
    quantise    words of codes, and scales (`quantise`)
    transpose   words of K go to the page as they are. Words of V hold eight coordinates of one token; those of eight tokens are
                transposed, nibble by nibble, into words of eight tokens of one coordinate

Every word of V belongs to one program: to its span of a multiple of 128 tokens, which it walks tile by tile. So neighbours' bits are
kept without atomics; words without neighbours are not read. The grid depends on shapes alone.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.kernels import encode_step
from kvstack.kernels.pages import PAGE, Pages
from kvstack.kernels.quantise import bfloat16, e4m3, high_bit, low_bits, nibbles, order, plane, put_rows, split4, split8, tables


@dataclass(frozen=True)
class Config:
    """tile: tokens that are encoded at once, 32 or 128. span: tokens of a row that one program walks, a multiple of 128. chunk:
    coordinates that are multiplied at once; below D the matrix is not kept, but read for every tile. registers: of a thread, at most;
    None is what the compiler likes. fragment: see `order`."""

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

    A few tokens of each row are the business of `encode_step`. On Hopper `encode_hopper` does the same for many tokens of 16 bits, in
    60 % of the time.
    """
    batch, heads, n, head_dim = k.shape
    f, pool, table = pages.format, pages.pool, pages.table
    assert v.shape == k.shape and k.stride(3) == v.stride(3) == 1 and k.dtype == v.dtype
    assert head_dim == f.head_dim and table.shape[0] == batch and table.stride(1) == 1
    assert pool.shape[1:] == (heads, f.nbytes) and pool.is_contiguous()
    if n <= encode_step.TOKENS:
        if k.numel():
            encode_step.launch(k, v, key, value, pages, starts, counts)
        return
    machine = _machine(k.device)
    if machine.hopper:
        from kvstack.kernels import encode_hopper  # other GPUs do without Gluon

        if encode_hopper.fits(k, v, key, value):
            encode_hopper.launch(k, v, key, value, pages, starts, counts)
            return
    if batch * heads:
        launch(k, v, key, value, pages, starts, counts, config(n, head_dim, k.dtype, machine))


def launch(k: Tensor, v: Tensor, key: Codec, value: Codec, pages: Pages, starts: Tensor, counts: Tensor, how: Config) -> None:
    """`encode` by the kernel below, in a given configuration."""
    batch, heads, n, head_dim = k.shape
    f, key_tables, value_tables = pages.format, tables(key, k), tables(value, v)
    assert (key_tables.book.bits, value_tables.book.bits) == (f.k, f.v), "codecs of other widths than the pages"
    spans = (n - 2) // how.span + 2  # of the row's grid that n tokens touch, at most
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


# --- the kernel ---


# One variant for all rows and lengths, and for all places in a batch.
@triton.jit(do_not_specialize=["spans", "table_b"], do_not_specialize_on_alignment=["table", "starts", "counts"])
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
    column = order(c, D // 32, FRAGMENT)
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
            words, scale = e4m3(y, FRAGMENT, TILE, D)
        else:
            words, scale = nibbles(y, BOOK, TRANSPOSE, FRAGMENT, TILE, D)
        place = tile % 128 + tl.arange(0, TILE)
        scales = (page + SCALES_AT).to(tl.pointer_type(tl.uint16))
        tl.store(scales + place * 2, bfloat16(scale), mask=ours)
        codes = (page + CODES_AT).to(tl.pointer_type(tl.uint32))
        if TRANSPOSE:
            _put_columns(codes, words, tile, start, end, BOOK, TILE, D)
        else:
            put_rows(codes, words, place, ours, BOOK, TILE, D)


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
        a0, a1, a2, a3 = split4(tl.reshape(tl.permute(a, [5, 2, 0, 1, 3, 4]), [SD * 8, 8 * S, 2, 2]))
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
        a0, a1, a2, a3, a4, a5, a6, a7 = split8(tl.reshape(tl.permute(a, [5, 2, 0, 1, 3, 4]), [SD * 4, 4 * S, 2, 2, 2]))
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
        _merge(codes, plane(low_bits(words, BOOK), 2, s), plane(mine & 0x33333333, 2, s), row, 2, s // 2)
        if BOOK.bits == 3:
            _merge(codes + D * 8, plane(high_bit(words), 4, s), plane(mine & 0x11111111, 4, s), row, 1, s // 4)


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
