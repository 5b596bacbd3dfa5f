"""From rotated vectors to words of codes and to scales, in plain Triton: what kernels that encode share.

Columns of y come in an order in which one thread holds the codes of a 32-bit word of the page, so that packing exchanges nothing
(`order`). A nibble is a magnitude, counted from zero outwards, with the sign in bit 3 (1 is negative).

    quantise    magnitude = round(P(min(|y| / |x|, cap))), with a polynomial P that counts the edges below its argument (`book`)
    pack        P ends with the addition of a large number, which leaves the rounded magnitude in the low bits. Eight of them make a
                word by a Horner scheme in integers, eight signs are shifted in from the top: one instruction each
    scale       the sum of the squared levels is a weighted sum of counts of bits of those words (`book`)

Codes differ from the codec's only where a coordinate lies on an edge up to float32 rounding (a zero counts as positive), which small
and large tiles may round differently. Norms below 1e-18 or above 1e18 leave the range where squares fit float32. A vector with a NaN
or an Inf gets codes and a scale that mean nothing; other vectors do not notice. Looking for those is the caller's.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.codecs.fp8 import Fp8Codec
from kvstack.codecs.polar import PolarCodec
from kvstack.kernels import book
from kvstack.kernels.book import Book

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it is rounded to an integer, in the low bits
TINY = tl.constexpr(1e-36)  # squared norms are not taken for less
UNIT = tl.constexpr(book.UNIT)
BIAS = tl.constexpr(0x4B400000 * 0x11111111 % 2**32)  # what eight of its bit patterns add up to in a Horner scheme of nibbles


@dataclass(frozen=True)
class Tables:
    """matrix: `[D, D]`, x is multiplied with its rows. shift: the centre after that, `[H, D]` float32; anything without a centre."""

    book: Book
    matrix: Tensor
    shift: Tensor


@book.once
def tables(codec: Codec, x: Tensor) -> Tables:
    """What the kernel needs of a codec to encode `x`."""
    if isinstance(codec, Fp8Codec):
        identity = torch.eye(x.shape[3], dtype=x.dtype, device=x.device)
        return Tables(Book(8), identity, identity)
    assert isinstance(codec, PolarCodec)
    matrix, shift = book.signs(codec)
    matrix = matrix.to(x.dtype)
    return Tables(book.book(codec), matrix, matrix if shift is None else shift.contiguous())


@triton.jit
def nibbles(y, BOOK: tl.constexpr, TRANSPOSE: tl.constexpr, FRAGMENT: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
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
    m0, m1, m2, m3, m4, m5, m6, m7 = split8(threads(rank.to(tl.uint32, bitcast=True), T, S, FRAGMENT))
    magnitude = ((((((m7 * 16 + m6) * 16 + m5) * 16 + m4) * 16 + m3) * 16 + m2) * 16 + m1) * 16 + m0 - BIAS
    s0, s1, s2, s3, s4, s5, s6, s7 = split8(threads(y.to(tl.uint32, bitcast=True), T, S, FRAGMENT))
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
        w0, w1, w2, w3 = split4(tl.permute(tl.reshape(words, [T, S // 4, 2, 2, 4]), [0, 1, 4, 2, 3]))
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
def e4m3(y, FRAGMENT: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """Words `[T, D / 32, 2 (h), 4 (t)]` of four E4M3 numbers of `y [T, D]`, and the scale of every vector `[T]`."""
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(y), 1), 448.0), 1.1754943508222875e-38)  # the least normal number
    scale = (bfloat16(scale).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    inverse = (1 / scale)[:, None]
    q = y * inverse
    q = tl.fma(tl.fma(-q, scale[:, None], y), inverse, q)  # a quotient that is a tie must be exact
    bits = q.to(tl.uint32, bitcast=True)
    size = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), 448.0)
    small = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000  # multiples of 2^-9, rounded to the nearest even
    size = size.to(tl.uint32, bitcast=True)
    normal = (size + 0x7FFFF + (size >> 20 & 1) >> 20) - (120 << 3)
    code = tl.where(size < 0x3C800000, small, normal) | (bits >> 24 & 0x80)
    q0, q1, q2, q3 = split4(tl.permute(threads(code, T, D // 32, FRAGMENT), [0, 1, 3, 2, 4, 5]))
    return q0 | q1 << 8 | q2 << 16 | q3 << 24, scale


@triton.jit
def bfloat16(x):
    """Bits `uint16` of bfloat16 numbers, rounded to the nearest even."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(x == x, bits + 0x7FFF + (bits >> 16 & 1) >> 16, 0x7FC0).to(tl.uint16)


@triton.jit
def put_rows(codes, words, place, ours, BOOK: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """Store the words of K in the rows `place [T]`, where `ours`."""
    if BOOK.bits == 8:
        _put(codes, tl.reshape(tl.permute(words, [0, 3, 1, 2]), [T, D // 4]), place, ours)
    else:
        words = tl.reshape(tl.permute(words, [0, 2, 1]), [T, D // 8])
        if BOOK.bits == 4:
            _put(codes, words, place, ours)
        else:
            _put(codes, plane(low_bits(words, BOOK), 2, 0), place, ours)
            if BOOK.bits == 3:
                _put(codes + D * 8, plane(high_bit(words), 4, 0), place, ours)


@triton.jit
def _put(codes, words, place, ours):
    """Words `[T, 4 W]` of whole rows."""
    W: tl.constexpr = words.shape[1]
    tl.store(codes + place[:, None] * W + tl.arange(0, W)[None, :], words, mask=ours[:, None])


@triton.jit
def low_bits(words, BOOK: tl.constexpr):
    """The low two bits of the ascending indices of nibbles: the magnitude counts from -1/2 downwards and from 1/2 upwards."""
    negative = words >> 3 & 0x11111111
    if BOOK.bits == 2:
        return ((words ^ negative) & 0x11111111) | ((negative ^ 0x11111111) << 1)
    return (words ^ negative ^ negative << 1) & 0x33333333


@triton.jit
def high_bit(words):
    """The third bit of the ascending indices of nibbles: whether the coordinate is positive."""
    return (words >> 3 & 0x11111111) ^ 0x11111111


@triton.jit
def plane(fields, STEPS: tl.constexpr, s):
    """Fields of 4 / STEPS bits in nibbles `[R, 4 S]` beside those of the next steps: `[R, 4 S / STEPS]`; s is the first step."""
    WIDTH: tl.constexpr = 4 // STEPS
    if fields.shape[1] >= 4 * STEPS:
        fields = tl.reshape(fields, [fields.shape[0], fields.shape[1] // STEPS, STEPS])
        return tl.sum(fields << WIDTH * tl.arange(0, STEPS)[None, None, :], 2)
    else:
        return fields << WIDTH * (s % STEPS)


@triton.jit
def order(c, S: tl.constexpr, FRAGMENT: tl.constexpr):
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
def threads(x, T: tl.constexpr, S: tl.constexpr, FRAGMENT: tl.constexpr):
    """Columns of `x [T, D]`, which are in the order of `order`, by the words that they belong to: `[T, s, t, h, i1, i0]`."""
    if FRAGMENT == "mfma":
        return tl.permute(tl.reshape(x, [T, S, 2, 4, 2, 2]), [0, 1, 3, 2, 4, 5])
    else:
        high: tl.constexpr = 2 if FRAGMENT == "wgmma" else 1
        x = tl.permute(tl.reshape(x, [T, high, 2, 2, S // high, 4, 2]), [0, 1, 4, 5, 2, 3, 6])
        return tl.reshape(x, [T, S, 4, 2, 2, 2])


@triton.jit
def split4(x):
    """Four parts of `x [..., 2, 2]`."""
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def split8(x):
    """Eight parts of `x [..., 2, 2, 2]`."""
    even, odd = tl.split(x)
    x0, x2, x4, x6 = split4(even)
    x1, x3, x5, x7 = split4(odd)
    return x0, x1, x2, x3, x4, x5, x6, x7
