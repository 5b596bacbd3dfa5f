"""Decode attention over pages in plain Triton, for every target Triton has: few queries against all the tokens of their row.

Every kernel that reads pages does this, in this order:

    tiles       a tile is one page of one head. All tiles lie in one line, ordered by (row b, head h, page); `cum [B + 1]` int32 holds
                where the rows begin, cum[b] = H * (pages of the rows before b), with ceil(lengths[b] / 128) pages a row
    programs    program c takes the tiles [c * per, (c + 1) * per), per = ceil(cum[B] / programs), and walks the segments (b, h) in them
    slots       the part of segment s = b * H + h that program c has seen goes to slot c + s, which is of this pair alone

The grid is fixed and no length is read on the host, so a graph can be captured; a long row is split over programs, and rows of any
lengths share them evenly. Nothing is added up in an order that depends on time.

    q     [B * H, R, D]  float32: rotated queries times scale * log2(e); the R = G * T query rows of one KV head lie together
    bias  [B * H, R]     float32: what the centre of the keys adds to every logit, in the same unit
    out   [programs + B * H, R, D]  float32, in the latent space of V: the softmax mean over the tokens of the slot
    lse2  [programs + B * H, R]     float32: the base-2 logarithm of the sum of 2^logit; slots nobody visits keep what they held

Products are of float16 numbers, summed in float32. Codes become levels (E4M3 numbers are float16 numbers), and both scales stay in
float32 outside: that of K multiplies the logit, that of V the weight. What is left, q or weights, is divided by the largest number of
its row before it is rounded, so that neither large norms overflow nor small ones vanish.
This module does not merge slots and does not rotate.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstack.kernels.pages import PAGE, Pages

ROWS = 16  # query rows of one program, the fewest a tensor core takes; more go to more programs, which read the page again
WARPS = 4 if torch.version.hip else 8  # 256 threads hold a page's levels in registers
TINY = tl.constexpr(1e-30)  # a divisor for rows of zeros
LAST = tl.constexpr(2**31 - 1)


def decode_pages(
    q: Tensor,
    bias: Tensor,
    pages: Pages,
    cum: Tensor,
    k_levels: Tensor,
    v_levels: Tensor,
    out: Tensor,
    lse2: Tensor,
    programs: int,
    softcap: float | None,
) -> None:
    """Attention of `q [B * H, R, D]` over all tokens of `pages`, in partials: fills the slots of `out` and `lse2` that have tokens.

    k_levels, v_levels: `[2 ** bits]` float32, ascending; not read on a side with 8 bits, whose bytes are E4M3 numbers. softcap: in
    natural units. All tensors are contiguous, float32 but for the pages and `cum`. Nothing is allocated and nothing waits.
    """
    f, (segments, rows, head_dim) = pages.format, q.shape
    batch, heads = pages.table.shape[0], pages.pool.shape[1]
    assert max(f.k, f.v) <= 8, "pages of 16 bits are read by `hopper`"
    assert head_dim == f.head_dim and pages.pool.shape[-1] == f.nbytes and segments == batch * heads
    assert out.shape == (programs + segments, rows, head_dim) and lse2.shape == out.shape[:2] and bias.shape == q.shape[:2]
    floats = (q, bias, k_levels, v_levels, out, lse2)
    assert all(t.dtype == torch.float32 for t in floats) and all(t.is_contiguous() for t in (*floats, pages.pool, cum))
    assert pages.table.stride(1) == 1
    decode_kernel[(programs, triton.cdiv(rows, ROWS))](
        q, bias, pages.pool, pages.table, pages.lengths, cum, k_levels, v_levels, out, lse2,
        batch, heads, rows, pages.table.stride(0), 0.0 if softcap is None else softcap * math.log2(math.e),
        BATCH=triton.next_power_of_2(batch), M=ROWS, D=head_dim, K_BITS=f.k, V_BITS=f.v, K_BYTES=f.value_offset,
        V_BYTES=f.scale_offset - f.value_offset, PAGE=PAGE, CAPPED=softcap is not None,
        num_warps=WARPS, num_stages=1,
    )  # fmt: skip


@triton.jit
def decode_kernel(
    q, bias, pool, table, lengths, cum, k_levels, v_levels, out, lse2, batch, heads, rows, table_stride, cap,
    BATCH: tl.constexpr, M: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    K_BYTES: tl.constexpr, V_BYTES: tl.constexpr, PAGE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One program of `decode_pages`. M: query rows of a program. BATCH: rows, padded. cap: the soft cap in base 2."""
    program = tl.program_id(0)
    total = tl.load(cum + batch)
    per = tl.cdiv(total, tl.num_programs(0))
    tile = program * per
    stop = tl.minimum(tile + per, total)
    ends = tl.load(cum + 1 + tl.arange(0, BATCH), mask=tl.arange(0, BATCH) < batch, other=LAST)
    row, token = tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, PAGE)
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    while tile < stop:
        b = tl.sum((ends <= tile).to(tl.int32), 0)
        length = tl.load(lengths + b)
        pages = tl.cdiv(length, PAGE)
        position = tile - tl.load(cum + b)
        h = position // pages
        page = position % pages
        last = tl.minimum(pages, page + stop - tile)
        segment = b * heads + h

        query = tl.load(q + segment.to(tl.int64) * rows * D + at, mask=(row < rows)[:, None], other=0.0)
        shift = tl.load(bias + segment * rows + row, mask=row < rows, other=0.0)
        size = tl.maximum(tl.max(tl.abs(query), 1), TINY)
        query = (query / size[:, None]).to(tl.float16)

        top = tl.full((M,), float("-inf"), tl.float32)
        mass = tl.zeros((M,), tl.float32)
        mean = tl.zeros((M, D), tl.float32)
        for p in range(page, last):
            index = tl.load(table + b.to(tl.int64) * table_stride + p)
            base = pool + (index.to(tl.int64) * heads + h) * (K_BYTES + V_BYTES + PAGE * 4)
            k = tl.trans(matrix(base, PAGE, D, K_BITS, k_levels))  # [D, 128]
            scales = tl.load((base + K_BYTES + V_BYTES).to(tl.pointer_type(tl.uint32), bitcast=True) + token)
            k_scale = (scales << 16).to(tl.float32, bitcast=True)
            v_scale = (scales & 0xFFFF0000).to(tl.float32, bitcast=True)
            x = tl.dot(query, k)
            x = x * (size[:, None] * k_scale[None, :]) + shift[:, None]
            if CAPPED:
                x = cap * tanh(x / cap)
            # Behind the end of a row there may be NaN: only `where` keeps it out. Levels are finite whatever the codes are.
            valid = token < length - p * PAGE
            x = tl.where(valid[None, :], x, float("-inf"))
            higher = tl.maximum(top, tl.max(x, 1))
            weight = tl.exp2(x - higher[:, None])
            decay = tl.exp2(top - higher)
            top = higher
            mass = mass * decay + tl.sum(weight, 1)
            weight = weight * tl.where(valid, v_scale, 0.0)[None, :]
            largest = tl.maximum(tl.max(tl.abs(weight), 1), TINY)
            v = tl.trans(matrix(base + K_BYTES, D, PAGE, V_BITS, v_levels))  # [128, D]
            part = tl.dot((weight * (1.0 / largest)[:, None]).to(tl.float16), v)
            mean = mean * decay[:, None] + part * largest[:, None]
        slot = (program + segment).to(tl.int64) * rows
        tl.store(lse2 + slot + row, top + tl.log2(mass), mask=row < rows)
        tl.store(out + slot * D + at, mean / mass[:, None], mask=(row < rows)[:, None])
        tile += last - page


@triton.jit
def matrix(base, R: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, levels):
    """The matrix `[R, C]` of levels in float16 of the packed codes at `base`, see `pages`."""
    if BITS == 8:
        x = _e4m3(tl.load(base + tl.arange(0, R * C)))
    elif BITS == 4:
        x = tl.load(levels + _signed(base, R * C)).to(tl.float16)
    else:
        x = tl.load(levels + _planes(base, R * C, BITS)).to(tl.float16)
    x = tl.permute(tl.reshape(x, (R, 4, C // 32, 2, 4)), (0, 2, 3, 1, 4))  # column = 32 s + 16 h + 4 t + i from (t, s, h, i)
    return tl.reshape(x, (R, C))


@triton.jit
def _signed(base, N: tl.constexpr):
    """N indices of 4 bits, `[N / 8, 8]` in the order of memory. What a shift fills in from the left is masked off."""
    words = tl.load(base.to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, N // 8))[:, None]
    n = tl.arange(0, 8)[None, :]
    negative = (words >> (8 * (n % 4) + 7 - 4 * (n // 4))) & 1
    return ((words >> (4 * n)) & 7) ^ (8 - negative)  # 7 - magnitude, or 8 + magnitude


@triton.jit
def _planes(base, N: tl.constexpr, BITS: tl.constexpr):
    """N indices of 2 or 3 bits, `[N / 32, 2, 2, 8]` in the order of memory: two words of two steps; one word of the high plane."""
    words = base.to(tl.pointer_type(tl.int32), bitcast=True)
    run, word = tl.arange(0, N // 32)[:, None, None, None], tl.arange(0, 2)[None, :, None, None]
    step, n = tl.arange(0, 2)[None, None, :, None], tl.arange(0, 8)[None, None, None, :]
    index = (tl.load(words + 2 * run + word) >> (4 * n + 2 * step)) & 3
    if BITS == 3:
        index = index | (((tl.load(words + N // 16 + run) >> (4 * n + 2 * word + step)) & 1) << 2)
    return index


@triton.jit
def _e4m3(byte):
    """E4M3 bytes as float16, exactly: the same fields at another bias, subnormals too. A NaN becomes 480."""
    byte = byte.to(tl.uint16)
    return (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def tanh(x):
    """The hyperbolic tangent by what every target has: 2^x saturates to infinity or zero, which is right."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.885390081777927))  # 2 log2(e)
