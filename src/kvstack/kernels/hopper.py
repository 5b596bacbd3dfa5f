"""Decode attention over pages on Hopper (sm_90), in Gluon: the tensor core eats the codes, memory is the only limit.

It computes what `rotate.project` and `portable.decode_pages` compute, for codebooks of E4M3 numbers: 2, 3, 4, 8 or 16 bits a side
and head sizes 64, 128, 256.

Operands are swapped: S^T = K Q^T and O^T = V^T P^T, so that the large operand is A, which Hopper's `wgmma` takes from registers. A page
is laid out so that every thread reads with 16-byte accesses exactly the codes of its fragment; one byte permutation (`prmt`) turns four
of them into four E4M3 numbers, in registers. Pages come by asynchronous copies, while others are worked on.

The small operand B has few columns: a query row takes two, for the E4M3 rounding of its numbers and, times 16, for what that rounding
left over. So q and the probabilities keep 8 bits of mantissa at no cost, since `wgmma` has 8 columns at least and there are few rows.
Neighbouring columns are in one thread, which adds them up after the product.

`wgmma` sums E4M3 products with about 13 bits. So logits, of which large ones matter most, are the fp32 sum of two products, and outputs
are added up in fp32 from page to page. Probabilities are scaled by the V scale and by 2^8 over their running maximum, which keeps them
in the normal range of E4M3. Numbers of 16 bits are taken as they are, with queries and probabilities of 16 bits and what their rounding
leaves.

`reference.attend` is its twin.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from kvstack.kernels.pages import PAGE, Format, Pages

MAX_ROWS = 16  # query rows of one program; more go to more programs, which read the page again
SHARED = 227 * 1024  # bytes of shared memory of a multiprocessor

_TWO = gl.constexpr((gl.int32,) * 2)
_FOUR = gl.constexpr((gl.int32,) * 4)

# Words of codes in, E4M3 numbers out. $n: outputs, then words, then the table.
UNPACK4 = gl.constexpr(
    """{
    .reg .b32 a, b;
    and.b32 a, $2, 0x77777777;
    prmt.b32 b, $3, $4, a;
    lop3.b32 $0, $2, 0x80808080, b, 0xEA;
    shr.u32 a, a, 16;
    prmt.b32 b, $3, $4, a;
    shl.b32 a, $2, 4;
    lop3.b32 $1, a, 0x80808080, b, 0xEA;
    }"""
)
UNPACK2 = gl.constexpr(
    """{
    .reg .b32 a;
    and.b32 a, $4, 0x33333333;
    prmt.b32 $0, $5, $5, a;
    shr.u32 a, a, 16;
    prmt.b32 $1, $5, $5, a;
    shr.u32 a, $4, 2;
    and.b32 a, a, 0x33333333;
    prmt.b32 $2, $5, $5, a;
    shr.u32 a, a, 16;
    prmt.b32 $3, $5, $5, a;
    }"""
)
# Low plane word $4, high plane word $5 shifted so that the bits of the first step stand at bit 2 of every nibble.
UNPACK3 = gl.constexpr(
    """{
    .reg .b32 a, b;
    and.b32 b, $5, 0x44444444;
    lop3.b32 a, $4, 0x33333333, b, 0xEA;
    prmt.b32 $0, $6, $7, a;
    shr.u32 a, a, 16;
    prmt.b32 $1, $6, $7, a;
    shr.u32 a, $4, 2;
    shr.u32 b, $5, 1;
    and.b32 b, b, 0x44444444;
    lop3.b32 a, a, 0x33333333, b, 0xEA;
    prmt.b32 $2, $6, $7, a;
    shr.u32 a, a, 16;
    prmt.b32 $3, $6, $7, a;
    }"""
)


@gluon.constexpr_function
def fragment(rows: int, words: int) -> Any:
    """Layout of `[rows, 4, words]` words: thread t of quad g of warp w holds rows 64 m + 16 w + 8 e + g."""
    registers = [[0, 0, 1 << i] for i in range(words.bit_length() - 1)]
    registers += [[8, 0, 0]] + [[64 << i, 0, 0] for i in range((rows // 64).bit_length() - 1)]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [rows, 4, words])


@gluon.constexpr_function
def paired(rows: int, columns: int) -> Any:
    """Layout of `[rows, columns, 2]`: the product's, with a query row's two columns as the last axis."""
    registers = [[0, 0, 1], [8, 0, 0]] + [[0, 4 << i, 0] for i in range((columns // 4).bit_length() - 1)]
    registers += [[64 << i, 0, 0] for i in range((rows // 64).bit_length() - 1)]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [rows, columns, 2])


@gluon.constexpr_function
def query_layout(rows: int, bits: int) -> Any:
    """Layout of queries `[rows, D]`: a row in one warp, and 2 bytes of what is stored of it in one thread.

    With four bytes Triton 3.6 stores by `stmatrix`, and E4M3 numbers to other places than where the product reads.
    """
    return gl.BlockedLayout([rows // 4, 1 if bits == 16 else 2], [1, 32], [4, 1], [1, 0])


@gluon.constexpr_function
def _per_warp(columns: int) -> Any:
    """Layout of `[4, columns]`, a number for every warp and query row: all warps' numbers in every thread, rows as in `paired`."""
    registers = [[1, 0], [2, 0]] + [[0, 4 << i] for i in range((columns // 4).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, [[0, 1], [0, 2], [0, 0], [0, 0], [0, 0]], [[0, 0], [0, 0]], [], [4, columns])


@gluon.jit
def exp2(x):
    """2^x, without the care for subnormals that Triton's own takes."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def log2(x):
    """The logarithm of x to the base 2, fast; see `exp2`."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def copy_words(shared, base, mask):
    """Start to copy a plane of words at `base` into `shared [words]`, 16 bytes a thread at a time."""
    L: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    offset = gl.arange(0, shared.shape[0], layout=L)
    async_copy.async_copy_global_to_shared(shared, base.to(gl.pointer_type(gl.int32), bitcast=True) + offset, mask=mask)


@gluon.jit
def _copy_page(
    k_low, k_high, v_low, v_high, scales, base, mask,
    K: gl.constexpr, V: gl.constexpr, VALUES: gl.constexpr, SCALES: gl.constexpr,
):  # fmt: skip
    """Start to copy the page at `base`. High planes are looked at with 3 bits only."""
    copy_words(k_low, base, mask)
    if K == 3:
        copy_words(k_high, base + k_low.shape[0] * 4, mask)
    copy_words(v_low, base + VALUES, mask)
    if V == 3:
        copy_words(v_high, base + VALUES + v_low.shape[0] * 4, mask)
    one = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    async_copy.async_copy_global_to_shared(scales, (base + SCALES).to(gl.pointer_type(gl.uint32), bitcast=True) + one, mask=mask)
    async_copy.commit_group()


@gluon.jit
def _read(plane, ROWS: gl.constexpr):
    """A thread's words `[ROWS, 4, W]` of a plane."""
    W: gl.constexpr = plane.shape[0] // (4 * ROWS)
    return plane.reshape((ROWS, 4, W)).load(fragment(ROWS, W))


@gluon.jit
def _bytes(w):
    """`[...]` words as `[..., 2, 2]` bytes in memory order; the compiler makes nothing of it but a change of type."""
    return gl.join(gl.join(w.to(gl.uint8), (w >> 16).to(gl.uint8)), gl.join((w >> 8).to(gl.uint8), (w >> 24).to(gl.uint8)))


@gluon.jit
def _halves(w, TYPE: gl.constexpr):
    """`[...]` words as `[..., 2]` numbers of 16 bits in memory order."""
    return gl.join(w.to(gl.int16), (w >> 16).to(gl.int16)).to(TYPE, bitcast=True)


@gluon.jit
def numbers(low, high, t0, t1, BITS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, TYPE: gl.constexpr):
    """The packed matrix `[ROWS, COLUMNS]` in planes `low` and, with 3 bits, `high`, as numbers of `TYPE` in the order of memory,
    `[ROWS, t, s, h, i]`, see `pages`; the last four axes are of size 4, COLUMNS / 32, 2 and 4, with 16 bits 4, COLUMNS / 16, 2 and 2.

    t0, t1: the table, four levels each.
    """
    x = _read(low, ROWS)
    W: gl.constexpr = fragment(ROWS, COLUMNS // 128 if BITS == 3 else COLUMNS * BITS // 128)
    t0 = gl.convert_layout(t0, gl.SliceLayout(0, gl.SliceLayout(2, W)))[None, :, None]
    t1 = gl.convert_layout(t1, gl.SliceLayout(0, gl.SliceLayout(2, W)))[None, :, None]
    if BITS == 4:
        a, b = gl.inline_asm_elementwise(UNPACK4, "=r,=r,r,r,r", [x, t0, t1], dtype=_TWO, is_pure=True, pack=1)
        x = gl.join(a, b)
    elif BITS == 2:
        a, b, c, d = gl.inline_asm_elementwise(UNPACK2, "=r,=r,=r,=r,r,r", [x, t0], dtype=_FOUR, is_pure=True, pack=1)
        x = gl.join(gl.join(a, c), gl.join(b, d))  # [..., step, half]
    elif BITS == 3:
        bits = _read(high, ROWS)
        first, second = gl.split(x.reshape((ROWS, 4, COLUMNS // 128, 2)))
        args = [gl.convert_layout(first, W), bits << 2, t0, t1]
        a, b, c, d = gl.inline_asm_elementwise(UNPACK3, "=r,=r,=r,=r,r,r,r,r", args, dtype=_FOUR, is_pure=True, pack=1)
        x = gl.join(gl.join(a, c), gl.join(b, d))
        args = [gl.convert_layout(second, W), bits, t0, t1]
        a, b, c, d = gl.inline_asm_elementwise(UNPACK3, "=r,=r,=r,=r,r,r,r,r", args, dtype=_FOUR, is_pure=True, pack=1)
        x = gl.join(x, gl.join(gl.join(a, c), gl.join(b, d))).permute((0, 1, 2, 5, 3, 4))
    if BITS == 16:
        x = _halves(x, TYPE).reshape((ROWS, 4, COLUMNS // 16, 2, 2))
    else:
        x = _bytes(x).reshape((ROWS, 4, COLUMNS // 32, 2, 4)).to(TYPE, bitcast=True)
    return x


@gluon.jit
def _operand(low, high, t0, t1, BITS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, TYPE: gl.constexpr, L: gl.constexpr):
    """`numbers` as the operand `[ROWS, COLUMNS]` in layout `L`."""
    x = numbers(low, high, t0, t1, BITS, ROWS, COLUMNS, TYPE)
    return gl.convert_layout(x.permute((0, 2, 3, 1, 4)).reshape((ROWS, COLUMNS)), L)


@gluon.jit
def _in_halves(a, b, zero):
    """Start the products of both halves of `a [M, C]` and `b [C, N]`, E4M3 numbers."""
    C: gl.constexpr = a.shape[1] // 2
    first, second = gl.split(a.reshape((a.shape[0], 2, C)).permute((0, 2, 1)))
    first = gl.convert_layout(first, a.type.layout, assert_trivial=True)
    second = gl.convert_layout(second, a.type.layout, assert_trivial=True)
    first = warpgroup_mma(first, b.slice(0, C, 0), zero, use_acc=False, max_num_imprecise_acc=C, is_async=True)
    return first, warpgroup_mma(second, b.slice(C, C, 0), zero, use_acc=False, max_num_imprecise_acc=C, is_async=True)


@gluon.jit
def near_and_rest(x, TYPE: gl.constexpr):
    """Numbers of `TYPE` next to `x`, and 16 times what they miss."""
    near = x.to(TYPE)
    return near, ((x - near.to(gl.float32)) * 16.0).to(TYPE)


@gluon.jit
def joined(x, L: gl.constexpr):
    """`[N, R]` in layout `L` of the neighbouring columns `[N, 2 * R]`."""
    near, rest = gl.split(x.reshape((x.shape[0], x.shape[1] // 2, 2)))
    return gl.convert_layout(near, L) + gl.convert_layout(rest, L) * 0.0625


@gluon.jit
def _hadamard(x, L: gl.constexpr, R: gl.constexpr, D: gl.constexpr, LOG2_D: gl.constexpr):
    """`rotate.hadamard` of `x [R, D]` in layout `L`."""
    for _ in gl.static_range(LOG2_D):
        a, b = gl.split(gl.convert_layout(x, L).reshape((R, D // 2, 2)))
        x = gl.join(a + b, a - b).permute((0, 2, 1)).reshape((R, D))
    return gl.convert_layout(x, L)


@gluon.jit
def _greatest(x, shared, R: gl.constexpr, ROW: gl.constexpr):
    """Maximum over the tokens of `x [128, R]`, in every warp: shuffles inside a warp, shared memory `[4, R]` between them."""
    of_warp = gl.max(gl.max(x.reshape((2, 4, 16, R)), 2), 0)  # token 64 m + 16 w + ...
    shared.store(of_warp)
    gl.thread_barrier()
    return gl.convert_layout(gl.max(shared.load(_per_warp(R)), 0), ROW)


@gluon.jit(do_not_specialize=["table_stride"])  # it changes with lengths
def _decode(
    q_ptr,  # [B, Hq, T, D]
    signs_ptr,  # [D] float32
    centre_ptr,  # [H, D] float32
    pool_ptr,
    table_ptr,
    lengths_ptr,
    cum_ptr,
    k_table_ptr,  # [2, 4] int32
    v_table_ptr,
    out_ptr,
    lse_ptr,
    B,
    H,
    rows,
    T,
    stride_b,
    stride_h,
    stride_t,
    table_stride,
    factor,
    softcap,
    D: gl.constexpr,
    LOG2_D: gl.constexpr,
    K: gl.constexpr,  # bits
    V: gl.constexpr,
    R: gl.constexpr,  # query rows of this program, padded
    BATCH: gl.constexpr,  # B, padded
    ROTATE: gl.constexpr,
    CENTRE: gl.constexpr,
    SOFTCAP: gl.constexpr,
    HALF: gl.constexpr,  # type of numbers of 16 bits
    STAGES: gl.constexpr,  # pages in flight
):
    VALUES: gl.constexpr = 128 * D * K // 8
    SCALES: gl.constexpr = VALUES + 128 * D * V // 8
    NBYTES: gl.constexpr = SCALES + 512
    KT: gl.constexpr = HALF if K == 16 else gl.float8e4nv
    VT: gl.constexpr = HALF if V == 16 else gl.float8e4nv
    SM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * R, 16 if K == 16 else 32])
    OM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * R, 16 if V == 16 else 32])
    ST: gl.constexpr = gl.SliceLayout(2, paired(128, R))  # of S^T [128 tokens, R]
    OT: gl.constexpr = gl.SliceLayout(2, paired(D, R))  # of O^T [D, R]
    TOKEN: gl.constexpr = gl.SliceLayout(1, ST)
    ROW: gl.constexpr = gl.SliceLayout(0, ST)
    Q: gl.constexpr = query_layout(R, K)

    # Every thread loads its own copy, so that the tables stay in registers: what the compiler knows to be the same in all threads it
    # keeps elsewhere, and moves into place before every use.
    copy = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, fragment(128, 4))))
    kt0 = gl.load(k_table_ptr + copy)
    kt1 = gl.load(k_table_ptr + 4 + copy)
    vt0 = gl.load(v_table_ptr + copy)
    vt1 = gl.load(v_table_ptr + 4 + copy)
    program = gl.program_id(0)
    first_row = gl.program_id(1) * R
    total = gl.load(cum_ptr + B)
    share = gl.cdiv(total, gl.num_programs(0))
    tile = program * share
    stop = gl.minimum(tile + share, total)
    row_of_batch = gl.arange(0, BATCH, layout=gl.BlockedLayout([1], [32], [4], [0]))
    ends = gl.load(cum_ptr + 1 + row_of_batch, mask=row_of_batch < B, other=2147483647)
    q_shared = gl.allocate_shared_memory(KT, [2 * R, D], gl.NVMMASharedLayout(64 if D * max(K, 8) == 512 else 128, max(K, 8), rank=2))
    p_shared = gl.allocate_shared_memory(VT, [2 * R, 128], gl.NVMMASharedLayout(128, max(V, 8), rank=2))
    m_shared = gl.allocate_shared_memory(gl.float32, [4, R], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_low = gl.allocate_shared_memory(gl.int32, [STAGES, 128 * D * (K & 30) // 32], FLAT)
    v_low = gl.allocate_shared_memory(gl.int32, [STAGES, 128 * D * (V & 30) // 32], FLAT)
    k_high, v_high = k_low, v_low  # not used but with 3 bits
    if K == 3:
        k_high = gl.allocate_shared_memory(gl.int32, [STAGES, 128 * D // 32], FLAT)
    if V == 3:
        v_high = gl.allocate_shared_memory(gl.int32, [STAGES, 128 * D // 32], FLAT)
    scales_shared = gl.allocate_shared_memory(gl.uint32, [STAGES, 128], FLAT)
    token = gl.arange(0, 128, layout=TOKEN)
    row = first_row + gl.arange(0, R, layout=ROW)
    zero_s = gl.full([128, 2 * R], 0.0, gl.float32, layout=SM)
    zero_o = gl.full([D, 2 * R], 0.0, gl.float32, layout=OM)
    while tile < stop:
        b = gl.sum((ends <= tile).to(gl.int32), 0)
        start = gl.load(cum_ptr + b)
        length = gl.load(lengths_ptr + b)
        pages = gl.cdiv(length, 128)
        h = (tile - start) // pages
        page = tile - start - h * pages
        n = gl.minimum(pages - page, stop - tile)
        segment = b * H + h
        # The queries of this segment, rotated, as E4M3 numbers times a power of two.
        d = gl.arange(0, D, layout=gl.SliceLayout(0, Q))
        r = first_row + gl.arange(0, R, layout=gl.SliceLayout(1, Q))
        at = b.to(gl.int64) * stride_b + (h * (rows // T) + r // T).to(gl.int64) * stride_h + (r % T).to(gl.int64) * stride_t
        q = gl.load(q_ptr + at[:, None] + d[None, :], mask=(r < rows)[:, None], other=0.0).to(gl.float32) * factor
        bias = gl.full([R], 0.0, gl.float32, layout=ROW)
        if CENTRE:
            bias = gl.convert_layout(gl.sum(q * gl.load(centre_ptr + h * D + d)[None, :], 1), ROW)
        if ROTATE:
            q = _hadamard(q * gl.load(signs_ptr + d)[None, :], Q, R, D, LOG2_D)
        power = gl.exp2(gl.ceil(gl.log2(gl.maximum(gl.max(gl.abs(q), 1), 1e-30))) - 8.0)
        q_near, q_rest = near_and_rest(q / power[:, None], KT)
        gl.thread_barrier()  # the last segment's products have read their queries
        q_shared.store(gl.join(q_near, q_rest).permute((0, 2, 1)).reshape((2 * R, D)))
        fence_async_shared()
        q_scale = gl.convert_layout(power, ROW)
        top = gl.full([R], -1e30, gl.float32, layout=ROW)
        total_weight = gl.full([128, R], 0.0, gl.float32, layout=ST)
        acc = gl.full([D, R], 0.0, gl.float32, layout=OT)
        ids = table_ptr + b.to(gl.int64) * table_stride
        gl.thread_barrier()  # the last segment's pages have been read
        for i in gl.static_range(STAGES):
            inside = i < n
            base = pool_ptr + (gl.load(ids + page + i, mask=inside, other=0).to(gl.int64) * H + h) * NBYTES
            _copy_page(
                k_low.index(i), k_high.index(i), v_low.index(i), v_high.index(i), scales_shared.index(i),
                base, inside, K, V, VALUES, SCALES,
            )  # fmt: skip
        id_ahead = gl.load(ids + page + STAGES, mask=n > STAGES, other=0)
        async_copy.wait_group(STAGES - 1)
        gl.thread_barrier()
        stage = 0
        for i in range(n):
            k_here, v_here, scales_here = k_low.index(stage), v_low.index(stage), scales_shared.index(stage)
            scales = scales_here.load(TOKEN)
            k = _operand(k_here, k_high.index(stage), kt0, kt1, K, 128, D, KT, gl.DotOperandLayout(0, SM, 2 if K == 16 else 4))
            if K == 16:
                s = warpgroup_mma(k, q_shared.permute((1, 0)), zero_s, use_acc=False, is_async=True)
            else:
                s, s_more = _in_halves(k, q_shared.permute((1, 0)), zero_s)
            v = _operand(v_here, v_high.index(stage), vt0, vt1, V, D, 128, VT, gl.DotOperandLayout(0, OM, 2 if V == 16 else 4))
            if K == 16:
                s = warpgroup_mma_wait(0, [s])
            else:
                s, s_more = warpgroup_mma_wait(0, [s, s_more])
                s += s_more
            k_scale = (scales << 16).to(gl.float32, bitcast=True)  # bfloat16 pairs
            v_scale = (scales & 0xFFFF0000).to(gl.float32, bitcast=True)
            x = joined(s, ST) * (k_scale[:, None] * q_scale[None, :]) + bias[None, :]
            if SOFTCAP:  # tanh(y) = 1 - 2 / (1 + exp(2 y)); x is in base 2
                y = exp2(x * (2.0 / softcap))
                x = (softcap * 1.4426950408889634) * (1.0 - 2.0 / (1.0 + y))
            seen = (token < length - (page + i) * 128)[:, None]
            x = gl.where(seen, x, -1e30)
            # The scaled weight 2^(x - top) * v_scale shall stay below 2^8.
            weight_log = x + gl.maximum(log2(v_scale), -80.0)[:, None]  # a page of zeros must not make weights infinite
            new_top = gl.maximum(top, _greatest(gl.where(seen, weight_log, -1e30), m_shared, R, ROW) - 8.0)
            # All threads have read this page: its place is for the one that is STAGES pages on.
            inside = i + STAGES < n
            base = pool_ptr + (id_ahead.to(gl.int64) * H + h) * NBYTES
            id_ahead = gl.load(ids + page + i + STAGES + 1, mask=i + STAGES + 1 < n, other=0)
            _copy_page(k_here, k_high.index(stage), v_here, v_high.index(stage), scales_here, base, inside, K, V, VALUES, SCALES)
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)
            fade = exp2(top - new_top)
            top = new_top
            p = exp2(x - top[None, :])
            total_weight = total_weight * fade[None, :] + p
            p_near, p_rest = near_and_rest(gl.where(seen, p * v_scale[:, None], 0.0), VT)
            p_shared.permute((1, 0)).store(gl.join(p_near, p_rest).reshape((128, 2 * R)))
            fence_async_shared()
            async_copy.wait_group(STAGES - 1)  # the next page is here
            gl.thread_barrier()
            o = warpgroup_mma(v, p_shared.permute((1, 0)), zero_o, use_acc=False, max_num_imprecise_acc=128, is_async=True)
            o = warpgroup_mma_wait(0, [o])
            acc = acc * gl.convert_layout(fade, gl.SliceLayout(0, OT))[None, :] + joined(o, OT)
        weight = gl.sum(total_weight, 0)
        slot = (program + segment) * rows
        gl.store(lse_ptr + slot + row, top + gl.log2(weight), mask=row < rows)
        d = gl.arange(0, D, layout=gl.SliceLayout(1, OT))
        r = first_row + gl.arange(0, R, layout=gl.SliceLayout(0, OT))
        inverse = gl.convert_layout(1.0 / weight, gl.SliceLayout(0, OT))
        gl.store(out_ptr + (slot + r).to(gl.int64)[None, :] * D + d[:, None], acc * inverse[None, :], mask=(r < rows)[None, :])
        tile += n


def _padded(rows: int) -> int:
    return min(MAX_ROWS, max(4, 1 << (rows - 1).bit_length()))


def _stages(f: Format) -> int:
    """Pages in flight, and in shared memory."""
    return 2 if 2 * f.nbytes <= 200 * 1024 else 1


def occupancy(f: Format, rows: int) -> tuple[int, int]:
    """Programs that fit a multiprocessor, and the registers a thread that lets them."""
    if f.head_dim <= 128 and _padded(rows) == 4 and max(f.k, f.v) <= 4:
        return 4, 128
    fit = SHARED // (_stages(f) * f.nbytes + 4 * _padded(rows) * (f.head_dim + PAGE) + 2048)
    return (3, 168) if f.head_dim <= 128 and _padded(rows) <= 8 and fit >= 3 else (min(2, fit), 255)


def decode_pages(
    q: Tensor,
    signs: Tensor | None,
    centre: Tensor | None,
    factor: float,
    pages: Pages,
    cum: Tensor,
    k_table: Tensor,
    v_table: Tensor,
    out: Tensor,
    lse2: Tensor,
    programs: int,
    softcap: float | None,
    half: torch.dtype,
) -> None:
    """`rotate.project` and `portable.decode_pages` in one launch, with tables (`table`) for levels.

    half: type of the numbers of a side with 16 bits.
    """
    f, (b, _, t, _), rows = pages.format, q.shape, out.shape[1]
    assert q.stride(-1) == 1
    padded = _padded(rows)
    _decode[(programs, -(-rows // padded))](
        q, q if signs is None else signs, q if centre is None else centre, pages.pool, pages.table, pages.lengths, cum,
        k_table, v_table, out, lse2, b, pages.pool.shape[1], rows, t, *q.stride()[:3], pages.table.stride(0),
        factor, 1.0 if softcap is None else softcap, D=f.head_dim, LOG2_D=f.head_dim.bit_length() - 1, K=f.k, V=f.v, R=padded,
        BATCH=max(16, 1 << (b - 1).bit_length()), ROTATE=signs is not None, CENTRE=centre is not None, SOFTCAP=softcap is not None,
        HALF=gl.float16 if half == torch.float16 else gl.bfloat16, STAGES=_stages(f), num_warps=4, maxnreg=occupancy(f, rows)[1],
    )  # fmt: skip


def table(levels: Tensor, bits: int) -> Tensor:
    """`[2, 4]` int32: eight bytes in which `prmt` looks levels up, all or at 4 bits the positive ones, a copy per thread of a quad."""
    chosen = levels[8:] if bits == 4 else levels
    raw = torch.zeros(8, dtype=torch.uint8, device=levels.device)
    if bits <= 4:
        raw[: len(chosen)] = chosen.to(torch.float8_e4m3fn).view(torch.uint8)
    return raw.view(torch.int32)[:, None].repeat(1, 4)
