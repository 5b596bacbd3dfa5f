"""Prefill over a compressed past on Hopper (sm_90), in Gluon: as fast as attention over vectors that nobody has compressed.

It computes what `prefill.prefill_pages` computes, for codebooks of E4M3 numbers, in two launches:

    fold      scales of pages as float16 numbers relative to a power of two, in the order in which they are wanted; zero behind the ends
    prefill   a program takes 128 query rows of one KV head through the pages of one split, with three groups of four warps:
              one unpacks pages into float16 matrices in shared memory, K `[128, D]` and V `[D, 128]`, several stages of them,
              and two, with 64 rows each, multiply, by `wgmma`, with weights and sums in registers

The first group's integer instructions run beside the matrix products of the others, and a group's softmax beside the other group's
products and, when a page's first product is started before the last one's second, beside its own. Registers move from the first group
to the others. Codes become E4M3 numbers in registers as in `hopper`, these become float16 numbers by one instruction per pair, and one
multiplies a pair by its scales. No thread exchanges numbers with another, and stores of eight bytes meet no bank twice.

A barrier of one slot is passed from the unpacking group to the two (full), and back (free). `prefill` is its twin.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from kvstack.kernels.hopper import UNPACK2, UNPACK3, UNPACK4, exp2, log2
from kvstack.kernels.pages import PAGE, Format, Pages
from kvstack.kernels.prefill import relative

ROWS = 128  # query rows of a program
HEADROOM = gl.constexpr(15.0)  # the largest weight is 2^15

# Four E4M3 numbers of a word as float16, times scales.
_SCALE = gl.constexpr(
    """{
    .reg .b16 l, h;
    mov.b32 {l, h}, $2;
    cvt.rn.f16x2.e4m3x2 $0, l;
    cvt.rn.f16x2.e4m3x2 $1, h;
    mul.rn.f16x2 $0, $0, $3;
    mul.rn.f16x2 $1, $1, $4;
    }"""
)
# NaN, 0x7F and 0xFF, as the number before it: a product with a scale of zero shall be zero.
_FINITE = gl.constexpr(
    """{
    .reg .b32 a;
    and.b32 a, $1, 0x7F7F7F7F;
    add.u32 a, a, 0x01010101;
    shr.u32 a, a, 7;
    and.b32 a, a, 0x01010101;
    xor.b32 $0, $1, a;
    }"""
)


@triton.jit
def fold_kernel(pool, table, lengths, folded, powers, heads, table_stride, SCALES: tl.constexpr, PAGE: tl.constexpr):
    """Scales of a page as factors of pairs of float16 numbers."""
    p, segment = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = segment // heads, segment % heads
    length = tl.load(lengths + b)
    if p * PAGE < length:
        index = tl.load(table + b * table_stride + p)
        scales = (pool + (index.to(tl.int64) * heads + h) * (SCALES + PAGE * 4) + SCALES).to(tl.pointer_type(tl.uint32), bitcast=True)
        to = segment * tl.num_programs(0) + p
        token = tl.arange(0, PAGE)
        x = tl.where(token < length - p * PAGE, tl.load(scales + token), 0)
        k, k_power = relative((x << 16).to(tl.float32, bitcast=True))
        v, v_power = relative((x & 0xFFFF0000).to(tl.float32, bitcast=True))
        k = k.to(tl.uint16, bitcast=True).to(tl.uint32)
        tl.store(folded + to * 192 + token, k | (k << 16))
        # Column c = 32 s + 16 h + 4 t + 2 j + e goes to half e of word (t, s, h, j).
        v = tl.permute(tl.reshape(v.to(tl.uint16, bitcast=True).to(tl.uint32), (4, 2, 4, 2, 2)), (2, 0, 1, 3, 4))
        low, high = tl.split(v)
        tl.store(folded + to * 192 + 128 + tl.arange(0, 64), tl.reshape(low | (high << 16), (64,)))
        tl.store(powers + to * 2, tl.exp2(k_power))
        tl.store(powers + to * 2 + 1, v_power)


@gluon.constexpr_function
def _words(rows: int, words: int) -> Any:
    """Layout of `[rows, 4, words]` words in a producer: rows in an order in which 8-byte stores of 16 threads meet all banks."""
    registers = [[0, 0, 1 << i] for i in range(words.bit_length() - 1)] + [
        [32 << i, 0, 0] for i in range((rows // 32).bit_length() - 1)
    ]
    lanes = [[0, 1, 0], [0, 2, 0], [2, 0, 0], [4, 0, 0], [1, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0, 0], [16, 0, 0]], [], [rows, 4, words])


@gluon.constexpr_function
def _steps(rows: int, steps: int) -> Any:
    """The same for words of four bytes `[rows, 4, step, half]`."""
    registers = [[0, 0, 0, 1]] + [[0, 0, 1 << i, 0] for i in range(steps.bit_length() - 1)]
    registers += [[32 << i, 0, 0, 0] for i in range((rows // 32).bit_length() - 1)]
    lanes = [[0, 1, 0, 0], [0, 2, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0], [1, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0, 0, 0], [16, 0, 0, 0]], [], [rows, 4, steps, 2])


@gluon.constexpr_function
def _columns() -> Any:
    """Layout of the 64 words of scales of V: 16 neighbours in a thread of a quad."""
    return gl.DistributedLinearLayout([[1], [2], [4], [8]], [[16], [32], [0], [0], [0]], [[0], [0]], [], [64])


@gluon.constexpr_function
def _planes(bits: int, columns: int) -> tuple[int, int]:
    """Words per thread and row in the first and in the second plane of a matrix; a plane that is not there has one."""
    return (columns // 64, columns // 128) if bits == 3 else (columns * bits // 128, 1)


@gluon.jit
def _load(base, R: gl.constexpr, W: gl.constexpr):
    """Words `[R, 4, W]` of a plane at `base`."""
    L: gl.constexpr = _words(R, W)
    r = gl.arange(0, R, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
    w = gl.arange(0, W, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
    offset = r[:, None, None] * (4 * W) + t[None, :, None] * W + w[None, None, :]
    return gl.load(base.to(gl.pointer_type(gl.int32), bitcast=True) + offset)


@gluon.jit
def _load_matrix(base, R: gl.constexpr, C: gl.constexpr, BITS: gl.constexpr):
    """Words of the planes of a packed matrix `[R, C]`; without a second plane a dummy in its place."""
    W: gl.constexpr = _planes(BITS, C)
    if BITS == 3:
        return _load(base, R, W[0]), _load(base + R * C // 4, R, W[1])
    else:
        return _load(base, R, W[0]), 0


@gluon.jit
def _e4m3(low, high, t0, t1, R: gl.constexpr, C: gl.constexpr, BITS: gl.constexpr):
    """Words of codes `[R, 4, words]` as words of four E4M3 numbers `[R, 4, step, half]`."""
    W: gl.constexpr = _words(R, C // 128 if BITS == 3 else C * BITS // 128)
    t0 = gl.convert_layout(t0, gl.SliceLayout(0, gl.SliceLayout(2, W)))[None, :, None]
    t1 = gl.convert_layout(t1, gl.SliceLayout(0, gl.SliceLayout(2, W)))[None, :, None]
    four: gl.constexpr = (gl.int32, gl.int32, gl.int32, gl.int32)
    if BITS == 8:
        x = gl.inline_asm_elementwise(_FINITE, "=r,r", [low], dtype=gl.int32, is_pure=True, pack=1)
    elif BITS == 4:
        a, b = gl.inline_asm_elementwise(UNPACK4, "=r,=r,r,r,r", [low, t0, t1], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
        x = gl.join(a, b)
    elif BITS == 2:
        a, b, c, d = gl.inline_asm_elementwise(UNPACK2, "=r,=r,=r,=r,r,r", [low, t0], dtype=four, is_pure=True, pack=1)
        x = gl.join(gl.join(a, c), gl.join(b, d))  # [..., step, half]
    else:
        first, second = gl.split(low.reshape((R, 4, C // 128, 2)))
        first, second = gl.convert_layout(first, W), gl.convert_layout(second, W)
        a, b, c, d = gl.inline_asm_elementwise(
            UNPACK3, "=r,=r,=r,=r,r,r,r,r", [first, high << 2, t0, t1], dtype=four, is_pure=True, pack=1
        )
        x = gl.join(gl.join(a, c), gl.join(b, d))
        a, b, c, d = gl.inline_asm_elementwise(UNPACK3, "=r,=r,=r,=r,r,r,r,r", [second, high, t0, t1], dtype=four, is_pure=True, pack=1)
        x = gl.join(x, gl.join(gl.join(a, c), gl.join(b, d))).permute((0, 1, 2, 5, 3, 4))
    return gl.convert_layout(x.reshape((R, 4, C // 32, 2)), _steps(R, C // 32))


@gluon.jit
def _store(shared, x, scale0, scale1, R: gl.constexpr, C: gl.constexpr):
    """Words of E4M3 numbers, times scales, to float16 `shared [R, C]`."""
    a, b = gl.inline_asm_elementwise(_SCALE, "=r,=r,r,r,r", [x, scale0, scale1], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
    pairs = shared._reinterpret(gl.int32, [R, C // 2], gl.NVMMASharedLayout(128, 32, rank=2))
    pairs.store(gl.join(a, b).permute((0, 2, 3, 1, 4)).reshape((R, C // 2)))


@gluon.jit
def _produce(
    pool, ids, folded, k_table, v_table, k_shared, v_shared, barriers, first, n, H, h,
    D: gl.constexpr, K: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Pages to float16 matrices in shared memory."""
    k_full, k_free, v_full, v_free = barriers
    VALUES: gl.constexpr = 128 * D * K // 8
    NBYTES: gl.constexpr = VALUES + 128 * D * V // 8 + 512
    COLUMN: gl.constexpr = gl.SliceLayout(0, _steps(D, 4))
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, _steps(128, D // 32))))
    if n > 0:
        copy = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, _words(128, 4))))
        kt0 = gl.load(k_table + copy)
        kt1 = gl.load(k_table + 4 + copy)
        vt0 = gl.load(v_table + copy)
        vt1 = gl.load(v_table + 4 + copy)
        row = gl.arange(0, 128, layout=ROW)
        column = 128 + gl.arange(0, 64, layout=_columns())
        last = first + n - 1
        base = pool + (gl.load(ids + first).to(gl.int64) * H + h) * NBYTES
        ahead = gl.load(ids + gl.minimum(first + 1, last))
        if AHEAD:
            k_low, k_high = _load_matrix(base, 128, D, K)
            v_low, v_high = _load_matrix(base + VALUES, D, 128, V)
            k_scale = gl.load(folded + row)
            v_scale = gl.load(folded + column)
        stage = 0
        phase = 1
        for i in range(n):
            if not AHEAD:
                k_low, k_high = _load_matrix(base, 128, D, K)
                k_scale = gl.load(folded + row)
            values = base + VALUES
            base = pool + (ahead.to(gl.int64) * H + h) * NBYTES
            ahead = gl.load(ids + gl.minimum(first + i + 2, last))
            mbarrier.wait(k_free.index(stage), phase)
            x = _e4m3(k_low, k_high, kt0, kt1, 128, D, K)
            _store(k_shared.index(stage), x, k_scale[:, None, None, None], k_scale[:, None, None, None], 128, D)
            fence_async_shared()
            mbarrier.arrive(k_full.index(stage))
            if AHEAD:
                k_low, k_high = _load_matrix(base, 128, D, K)
                k_scale = gl.load(folded + gl.where(i < n - 1, 192, 0) + row)
            else:
                v_low, v_high = _load_matrix(values, D, 128, V)
                v_scale = gl.load(folded + column)
            folded += gl.where(i < n - 1, 192, 0)
            mbarrier.wait(v_free.index(stage), phase)
            x = _e4m3(v_low, v_high, vt0, vt1, D, 128, V)
            even, odd = gl.split(v_scale.reshape((4, 4, 2, 2)))
            _store(v_shared.index(stage), x, gl.convert_layout(even, COLUMN)[None], gl.convert_layout(odd, COLUMN)[None], D, 128)
            fence_async_shared()
            mbarrier.arrive(v_full.index(stage))
            if AHEAD:
                v_low, v_high = _load_matrix(base + VALUES, D, 128, V)
                v_scale = gl.load(folded + column)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _soften(s, top, mass, factor, bias, v_power, seen, softcap, D: gl.constexpr, N: gl.constexpr, CAPPED: gl.constexpr):
    """Weights of the products `s [64, N]` as an operand, and the sums so far."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    if CAPPED:
        x = s * factor[:, None] + bias[:, None]
        y = exp2(x * (2.0 / softcap))
        s = (softcap * 1.4426950408889634) * (1.0 - 2.0 / (1.0 + y))
    if seen < N:
        token = gl.arange(0, N, layout=gl.SliceLayout(0, MMA))
        s = gl.where((token < seen)[None, :], s, float("-inf"))
    if CAPPED:
        new = gl.maximum(top, gl.max(s, 1) + (v_power - HEADROOM))
        p = exp2(s + (v_power - new)[:, None])
    else:
        new = gl.maximum(top, gl.max(s, 1) * factor + (v_power - HEADROOM))
        p = exp2(s * factor[:, None] + (v_power - new)[:, None])
    fade = exp2(top - new)
    part = gl.sum(gl.sum(p.reshape((64, N // 8, 4, 2)), 3), 1)  # of a thread
    mass = mass * gl.convert_layout(fade, gl.SliceLayout(1, mass.type.layout))[:, None] + gl.convert_layout(
        part, mass.type.layout
    ) * exp2(-v_power)
    return (
        gl.convert_layout(p.to(gl.float16), gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]), 2)),
        new,
        mass,
        fade,
    )


@gluon.jit
def _consume(
    q_ptr, bias_ptr, powers, out_ptr, lse_ptr, q_shared, k_shared, v_shared, barriers, row, rows, n, left, softcap,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, CAPPED: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """64 query rows through all pages."""
    k_full, k_free, v_full, v_free = barriers
    SM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    SR: gl.constexpr = gl.SliceLayout(1, SM)
    OR: gl.constexpr = gl.SliceLayout(1, OM)
    QL: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    MASS: gl.constexpr = gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4])
    r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, QL))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, QL))
    q = gl.load(q_ptr + r.to(gl.int64)[:, None] * D + d[None, :], mask=(r < rows)[:, None], other=0.0)
    size = exp2(gl.ceil(log2(gl.maximum(gl.max(gl.abs(q), 1), 1e-30))))
    q_shared.store((q / size[:, None]).to(gl.float16))
    fence_async_shared()
    gl.thread_barrier()
    size = gl.convert_layout(size, SR)
    r = row + gl.arange(0, 64, layout=SR)
    bias = gl.load(bias_ptr + r, mask=r < rows, other=0.0)
    top = gl.full([64], -1e30, gl.float32, layout=SR)
    mass = gl.full([64, 4], 0.0, gl.float32, layout=MASS)
    acc = gl.full([64, D], 0.0, gl.float32, layout=OM)
    zero = gl.full([64, N], 0.0, gl.float32, layout=SM)
    stage = 0
    phase = 0
    if n > 0:
        if not OVERLAP:
            k_power = gl.load(powers)
            v_power = gl.load(powers + 1)
            for i in range(n):
                powers += gl.where(i < n - 1, 2, 0)
                next_k_power = gl.load(powers)
                next_v_power = gl.load(powers + 1)
                k = k_shared.index(stage)
                v = v_shared.index(stage)
                mbarrier.wait(k_full.index(stage), phase)
                for part in gl.static_range(128 // N):
                    s = warpgroup_mma(q_shared, k.slice(part * N, N).permute((1, 0)), zero, use_acc=False, is_async=True)
                    s = warpgroup_mma_wait(0, [s])
                    if part == 128 // N - 1:
                        mbarrier.arrive(k_free.index(stage))
                    p, top, mass, fade = _soften(s, top, mass, size * k_power, bias, v_power, left, softcap, D, N, CAPPED)
                    acc = acc * gl.convert_layout(fade, OR)[:, None]
                    if part == 0:
                        mbarrier.wait(v_full.index(stage), phase)
                    o = warpgroup_mma(p, v.slice(part * N, N, 1).permute((1, 0)), acc, is_async=True)
                    acc = warpgroup_mma_wait(0, [o])
                    left -= N
                mbarrier.arrive(v_free.index(stage))
                k_power = next_k_power
                v_power = next_v_power
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
        else:
            mbarrier.wait(k_full.index(0), 0)
            s = warpgroup_mma(q_shared, k_shared.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
            k_power = gl.load(powers)
            v_power = gl.load(powers + 1)
            s = warpgroup_mma_wait(0, [s])
            mbarrier.arrive(k_free.index(0))
            p, top, mass, fade = _soften(s, top, mass, size * k_power, bias, v_power, left, softcap, D, N, CAPPED)
            k_stage = 1 % STAGES
            k_phase = 1 // STAGES
            mbarrier.wait(k_full.index(k_stage), k_phase, pred=n > 1)
            for i in range(n - 1):
                powers += 2
                left -= 128
                k_power = gl.load(powers)
                v_power = gl.load(powers + 1)
                s = warpgroup_mma(q_shared, k_shared.index(k_stage).permute((1, 0)), zero, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(stage), phase)
                o = warpgroup_mma(p, v_shared.index(stage).permute((1, 0)), acc, is_async=True)
                s = warpgroup_mma_wait(1, [s])
                mbarrier.arrive(k_free.index(k_stage))
                p_next, top, mass, fade = _soften(s, top, mass, size * k_power, bias, v_power, left, softcap, D, N, CAPPED)
                last = stage
                stage = k_stage
                phase = k_phase
                k_stage += 1
                if k_stage == STAGES:
                    k_stage = 0
                    k_phase ^= 1
                # This wait stands between the weights and the next one, which the compiler would move up to before the weights.
                mbarrier.wait(k_full.index(k_stage), k_phase, pred=i < n - 2)
                acc, _ = warpgroup_mma_wait(0, [o, p])
                mbarrier.arrive(v_free.index(last))
                acc = acc * gl.convert_layout(fade, OR)[:, None]
                p = p_next
            mbarrier.wait(v_full.index(stage), phase)
            o = warpgroup_mma(p, v_shared.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, [o])
    total = gl.convert_layout(gl.sum(mass, 1), SR)
    some = total > 0
    total = gl.where(some, total, 1.0)
    lse = top + log2(total)
    if not CAPPED:
        lse += bias
    gl.store(lse_ptr + r, gl.where(some, lse, float("-inf")), mask=r < rows)
    inverse = gl.convert_layout(1.0 / total, OR)
    r = row + gl.arange(0, 64, layout=OR)
    d = gl.arange(0, D, layout=gl.SliceLayout(0, OM))
    gl.store(out_ptr + r.to(gl.int64)[:, None] * D + d[None, :], acc * inverse[:, None], mask=(r < rows)[:, None])


@gluon.jit
def prefill_kernel(
    q, bias, pool, table, lengths, folded, powers, k_table, v_table, out, lse2, heads, rows, table_stride, columns, softcap,
    D: gl.constexpr, K: gl.constexpr, V: gl.constexpr, CAPPED: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr, AHEAD: gl.constexpr, CONSUMER: gl.constexpr, PRODUCER: gl.constexpr,
):  # fmt: skip
    """128 query rows over one split of `prefill_pages`. columns: of the table. For the constants see `configuration`."""
    segment = gl.program_id(1).to(gl.int64)
    h = (segment % heads).to(gl.int32)
    b = segment // heads
    length = gl.load(lengths + b)
    pages = gl.cdiv(length, 128)
    share = gl.cdiv(pages, gl.num_programs(2))
    first = gl.program_id(2) * share
    n = gl.maximum(gl.minimum(share, pages - first), 0)
    first = gl.where(n > 0, first, 0)
    left = length - first * 128
    row = gl.program_id(0) * 128
    F16: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_shared = gl.allocate_shared_memory(gl.float16, [2, 64, D], F16)
    k_shared = gl.allocate_shared_memory(gl.float16, [STAGES, 128, D], F16)
    v_shared = gl.allocate_shared_memory(gl.float16, [STAGES, D, 128], F16)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    q += segment * rows * D
    bias += segment * rows
    to = (segment * gl.num_programs(2) + gl.program_id(2)) * rows
    at = segment * columns + first
    powers += at * 2
    out += to * D
    lse2 += to
    barriers = (k_full, k_free, v_full, v_free)
    gl.warp_specialize(
        [
            (_consume, (q, bias, powers, out, lse2, q_shared.index(0), k_shared, v_shared, barriers, row, rows, n, left, softcap,
                        D, N, STAGES, CAPPED, OVERLAP)),
            (_consume, (q, bias, powers, out, lse2, q_shared.index(1), k_shared, v_shared, barriers, row + 64, rows, n, left, softcap,
                        D, N, STAGES, CAPPED, OVERLAP)),
            (_produce, (pool, table + b * table_stride, folded + at * 192, k_table, v_table, k_shared, v_shared, barriers, first, n,
                        heads, h, D, K, V, STAGES, AHEAD)),
        ],
        [4, 4],
        [CONSUMER, PRODUCER],
    )  # fmt: skip


def configuration(f: Format) -> dict[str, Any]:
    """What suits a format.

    N: tokens of a product. STAGES: pages in shared memory. OVERLAP: the next page's first product starts before this one's second.
    AHEAD: a page's words are loaded a page ahead. CONSUMER, PRODUCER: registers of their threads.
    """
    if f.head_dim == 256:
        return dict(N=64, STAGES=1, OVERLAP=False, AHEAD=False, CONSUMER=216, PRODUCER=72)
    return dict(N=128, STAGES=2, OVERLAP=True, AHEAD=max(f.k, f.v) < 8, CONSUMER=216, PRODUCER=72)


def prefill_pages(
    q: Tensor,
    bias: Tensor,
    pages: Pages,
    k_table: Tensor,
    v_table: Tensor,
    out: Tensor,
    lse2: Tensor,
    softcap: float | None,
) -> None:
    """`prefill.prefill_pages` with tables (`hopper.table`) for levels. Allocates 3/2 of the scales of the pages, for a while."""
    f, (segments, rows, head_dim), splits = pages.format, q.shape, out.shape[1]
    heads, columns = pages.pool.shape[1], pages.table.shape[1]
    assert max(f.k, f.v) <= 8 and head_dim == f.head_dim and out.shape == (segments, splits, rows, head_dim)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in (q, bias, out, lse2)) and pages.table.stride(1) == 1
    folded = torch.empty(segments, columns, 192, dtype=torch.int32, device=q.device)
    powers = torch.empty(segments, columns, 2, dtype=torch.float32, device=q.device)
    if columns:
        fold_kernel[(columns, segments)](
            pages.pool, pages.table, pages.lengths, folded, powers, heads, pages.table.stride(0),
            SCALES=f.scale_offset, PAGE=PAGE, num_warps=1,
        )  # fmt: skip
    prefill_kernel[(-(-rows // ROWS), segments, splits)](
        q, bias, pages.pool, pages.table, pages.lengths, folded, powers, k_table, v_table, out, lse2,
        heads, rows, pages.table.stride(0), columns, 1.0 if softcap is None else softcap,
        D=head_dim, K=f.k, V=f.v, CAPPED=softcap is not None, **configuration(f), num_warps=4,
    )  # fmt: skip
