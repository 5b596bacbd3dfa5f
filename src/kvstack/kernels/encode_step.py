"""A few new tokens of many rows into pages: what `encode` does, for decode steps.

A tile of `encode` is of tokens of one row and head, and would be empty but for one. Here it is of 16 rows and heads, pairs, with a
token of each, one token after the other. Rotation, codes and scales are those of `encode`; only the way into the page is another one:

    K      the words of a token are its own
    V      every word of 2 to 4 bits has one number of a token, and those of its neighbours, which are read and kept

Pairs share no words, and a pair's tokens are written by the same threads, in turn. The grid depends on shapes alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.kernels.pages import Pages
from kvstack.kernels.quantise import bfloat16, e4m3, high_bit, low_bits, nibbles, order, put_rows, tables

TOKENS = 8  # of a row, at most: more are better off with tiles of their own
PAIRS = 16  # the fewest rows of a product
WARPS = 4


def launch(k: Tensor, v: Tensor, key: Codec, value: Codec, pages: Pages, starts: Tensor, counts: Tensor) -> None:
    """`encode.encode` for at most `TOKENS` tokens of a row."""
    batch, heads, n, head_dim = k.shape
    f, key_tables, value_tables = pages.format, tables(key, k), tables(value, v)
    assert (key_tables.book.bits, value_tables.book.bits) == (f.k, f.v), "codecs of other widths than the pages"
    step_kernel[(triton.cdiv(batch * heads, PAIRS), 2)](
        k, v, key_tables.matrix, value_tables.matrix, key_tables.shift, value_tables.shift, pages.pool, pages.table, starts, counts,
        batch * heads, heads, n, *k.stride()[:3], *v.stride()[:3], pages.table.stride(0),
        D=head_dim, KEY=key_tables.book, VALUE=value_tables.book, VALUES_AT=f.value_offset, SCALES_AT=f.scale_offset,
        PAGE_BYTES=f.nbytes, PAIRS=PAIRS, CHUNK=chunk(head_dim, k.dtype), PRECISION="ieee" if torch.version.hip else "tf32x3",
        num_warps=WARPS, num_stages=1,
    )  # fmt: skip


def chunk(head_dim: int, dtype: torch.dtype) -> int:
    """Coordinates that are multiplied at once: what fits the shared memory of every GPU."""
    return min(head_dim, 128) if dtype.itemsize == 2 else 32


# One variant for all rows and lengths, and for all places in a batch.
@triton.jit(do_not_specialize=["pairs", "n", "table_b"], do_not_specialize_on_alignment=["table", "starts", "counts"])
def step_kernel(
    k_ptr, v_ptr, k_matrix, v_matrix, k_shift, v_shift, pool, table, starts, counts, pairs, H, n,
    k_b, k_h, k_n, v_b, v_h, v_n, table_b,
    D: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, VALUES_AT: tl.constexpr, SCALES_AT: tl.constexpr,
    PAGE_BYTES: tl.constexpr, PAIRS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K or V of the new tokens of some pairs."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    real = pair < pairs
    b, h = pair // H, pair % H
    start = tl.load(starts + b, mask=real, other=0)
    count = tl.load(counts + b, mask=real, other=0)
    table += b.to(tl.int64) * table_b
    pool += h.to(tl.int64) * PAGE_BYTES
    if tl.program_id(1) == 0:
        rows = k_ptr + b.to(tl.int64) * k_b + h.to(tl.int64) * k_h
        _side(
            rows, k_n, k_matrix, k_shift, pool, H, h, table, start, count, n,
            D, KEY, False, 0, SCALES_AT, PAGE_BYTES, PAIRS, CHUNK, PRECISION,
        )  # fmt: skip
    else:
        rows = v_ptr + b.to(tl.int64) * v_b + h.to(tl.int64) * v_h
        _side(
            rows, v_n, v_matrix, v_shift, pool, H, h, table, start, count, n,
            D, VALUE, True, VALUES_AT, SCALES_AT + 2, PAGE_BYTES, PAIRS, CHUNK, PRECISION,
        )  # fmt: skip


@triton.jit
def _side(
    rows, stride, matrix, shift, pool, H, h, table, start, count, n,
    D: tl.constexpr, BOOK: tl.constexpr, TRANSPOSE: tl.constexpr, CODES_AT: tl.constexpr, SCALES_AT: tl.constexpr,
    PAGE_BYTES: tl.constexpr, PAIRS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens of K, or with TRANSPOSE of V; `rows [PAIRS]` are their first ones."""
    column = order(tl.arange(0, D), D // 32, "mma")
    for i in range(n):
        ours = i < count
        y = tl.zeros([PAIRS, D], tl.float32)
        for at in tl.static_range(0, D, CHUNK):
            d = at + tl.arange(0, CHUNK)
            x = tl.load(rows[:, None] + i * tl.cast(stride, tl.int64) + d[None, :], mask=ours[:, None], other=0.0)
            y = tl.dot(x, tl.load(matrix + d[:, None] + column[None, :] * D), y, input_precision=PRECISION)
        if BOOK.centred:
            y -= tl.load(shift + h[:, None] * D + column[None, :])
        if BOOK.bits == 8:
            words, scale = e4m3(y, "mma", PAIRS, D)
        else:
            words, scale = nibbles(y, BOOK, TRANSPOSE, "mma", PAIRS, D)
        place = (start + i) % 128
        page = pool + tl.load(table + (start + i) // 128, mask=ours, other=0).to(tl.int64) * (H * PAGE_BYTES)
        tl.store((page + SCALES_AT).to(tl.pointer_type(tl.uint16), bitcast=True) + place * 2, bfloat16(scale), mask=ours)
        codes = page + CODES_AT
        if TRANSPOSE:
            _put_column(codes, words, place, ours, BOOK, PAIRS, D)
        else:
            put_rows(codes.to(tl.pointer_type(tl.uint32), bitcast=True)[:, None], words, place, ours, BOOK, PAIRS, D)


@triton.jit
def _put_column(codes, words, place, ours, BOOK: tl.constexpr, PAIRS: tl.constexpr, D: tl.constexpr):
    """Put the numbers in `words`, of one token of every pair, into the column `place [PAIRS]` of V, where `ours`.

    Token 32 s + 16 h + 4 t + i has its bits in the words of thread t, at step s, at nibble 4 h + i.
    """
    S: tl.constexpr = D // 32
    s, t, at = place // 32, place // 4 % 4, place // 16 % 2 * 4 + place % 4
    if BOOK.bits == 8:
        where = (t * 8 + s * 2) * 4 + place // 16 % 2 * 4 + place % 4
        coordinate = tl.reshape(tl.arange(0, D), [S, 2, 4, 4])[None, :, :, :, :]
        byte = words[:, :, :, :, None] >> 8 * tl.arange(0, 4)[None, None, None, None, :]
        to = codes[:, None, None, None, None] + coordinate * 128 + where[:, None, None, None, None]
        tl.store(to, byte.to(tl.uint8), mask=ours[:, None, None, None, None])
    elif BOOK.bits == 4:
        number = _single(words, PAIRS, S)
        at = at[:, None, None, None]
        sign = place % 4 * 8 + 7 - place // 16 % 2 * 4
        sign = sign[:, None, None, None]
        bits = (number & 7) << 4 * at | (number >> 3) << sign
        _replace(codes, bits, 7 << 4 * at | 1 << sign, t * 4 + s, ours, 16, S)
    else:
        shift = 4 * at + s % 2 * 2
        shift = shift[:, None, None, None]
        _replace(codes, _single(low_bits(words, BOOK), PAIRS, S) << shift, 3 << shift, t * 2 + s // 2, ours, 8, S)
        if BOOK.bits == 3:
            shift = 4 * at + s
            shift = shift[:, None, None, None]
            _replace(codes + D * 32, _single(high_bit(words), PAIRS, S) << shift, 1 << shift, t, ours, 4, S)


@triton.jit
def _single(words, PAIRS: tl.constexpr, S: tl.constexpr):
    """The nibbles of `words [PAIRS, S, 4]`, `[PAIRS, S, 4, 8]`: of coordinate 32 s + 16 h + 4 t + i at (s, t, 4 h + i)."""
    return words[:, :, :, None] >> 4 * tl.arange(0, 8)[None, None, None, :] & 15


@triton.jit
def _replace(codes, bits, mask, at, ours, WORDS: tl.constexpr, S: tl.constexpr):
    """Put `bits [PAIRS, S, 4, 8]` in place of those of `mask [PAIRS, 1, 1, 1]`, in word `at` of the WORDS of every coordinate."""
    s, t, i = tl.arange(0, S)[:, None, None], tl.arange(0, 4)[None, :, None], tl.arange(0, 8)[None, None, :]
    coordinate = s * 32 + i // 4 * 16 + t * 4 + i % 4
    words = codes.to(tl.pointer_type(tl.uint32), bitcast=True)[:, None, None, None]
    where = words + coordinate[None, :, :, :] * WORDS + at[:, None, None, None]
    real = ours[:, None, None, None]
    old = tl.load(where, mask=real, other=0)
    tl.store(where, old ^ ((old ^ bits) & mask.to(tl.uint32, bitcast=True)), mask=real)
