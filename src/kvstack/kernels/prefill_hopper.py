"""Prefill over a compressed past on Hopper (sm_90), in Gluon: about as fast as attention over vectors that nobody has compressed.

It does what `rotate.project`, `prefill.prefill_pages` and a rotation back do, for codebooks of E4M3 numbers, in two launches:

    fold      scales of pages as float16 numbers relative to a power of two, in the order in which they are wanted; zero behind the ends
    attend    a program takes 128 query rows of one KV head through the pages of one split, with three groups of four warps: one
              unpacks pages into shared memory (`unpack_hopper`), several stages of them, and two, with 64 rows each, multiply, by
              `wgmma`, with weights and sums in registers. Queries and outputs are rotated in registers, too

The first group's integer instructions run beside the matrix products of the others. Those start their products in turn, so that a
group's softmax runs beside the other group's and, as a page's first product is started before the last one's second, beside its own.
Registers move from the first group to the others.

Time goes with the number of instructions, so the softmax looks for no maximum. Weights are relative to `top`, from the maximum of the
page that comes first, which is the last one. As long as no thread's sum of weights of a page exceeds 2^15, float16 holds them all; when
one does, `top` is raised by what is needed, and the weights, which are still float32 numbers, and the sums so far are multiplied
accordingly. Only a logit 2^113 times as heavy as all before it makes an infinite sum, and then a program does all its pages again, with
a softmax that nothing can overflow. `prefill` is its twin.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from kvstack.kernels.hopper import exp2, log2
from kvstack.kernels.pages import PAGE, Format, Pages
from kvstack.kernels.prefill import relative
from kvstack.kernels.unpack_hopper import following, natural, produce, room

START = gl.constexpr(3.0)  # when top is set, the largest weight, or the sum of a thread's weights, is 2^3

# A step of a Hadamard matrix across lanes: $2 is 1 in the first of two, -1 in the second.
_ACROSS_1 = gl.constexpr("{ .reg .f32 y; shfl.sync.bfly.b32 y, $1, 1, 31, -1; fma.rn.f32 $0, $1, $2, y; }")
_ACROSS_2 = gl.constexpr("{ .reg .f32 y; shfl.sync.bfly.b32 y, $1, 2, 31, -1; fma.rn.f32 $0, $1, $2, y; }")

# Of two rows: new tops $0, $1, by what to multiply $2, $3, and whether there is something to multiply $4, $5, the same in all threads
# of a warp, from sums of a thread's weights $6, $7 and tops $8, $9. 0f47000000 is 2^15, 0f40400000 START.
_RAISE = gl.constexpr(
    """{
    .reg .pred p;
    .reg .f32 a, b;
    .reg .s32 m;
    mov.f32 $0, $8;
    mov.f32 $1, $9;
    mov.f32 $2, 0f3F800000;
    mov.f32 $3, 0f3F800000;
    mov.s32 m, 0;
    max.f32 a, $6, $7;
    setp.gt.f32 p, a, 0f47000000;
    vote.sync.any.pred p, p, -1;
    @!p bra DONE;
    mov.s32 m, 1;
"""
    + "".join(
        f"""
    shfl.sync.bfly.b32 b, ${6 + row}, 1, 31, -1;
    max.f32 a, ${6 + row}, b;
    shfl.sync.bfly.b32 b, a, 2, 31, -1;
    max.f32 a, a, b;
    lg2.approx.ftz.f32 a, a;
    sub.f32 a, a, 0f40400000;
    max.f32 a, a, 0f00000000;
    add.f32 ${row}, ${8 + row}, a;
    neg.f32 a, a;
    ex2.approx.ftz.f32 ${2 + row}, a;
"""
        for row in (0, 1)
    )
    + """
    DONE:
    mov.s32 $4, m;
    mov.s32 $5, m;
    }"""
)
# 16 numbers times 16 others, if the first of 16 words is not zero. With one branch for all 64 numbers of a thread it is slower.
_FADE = gl.constexpr(
    "{.reg .pred p; setp.eq.s32 p, $48, 0;"
    + "".join(f"mov.f32 ${i}, ${16 + i};" for i in range(16))
    + "@p bra DONE;"
    + "".join(f"mul.f32 ${i}, ${i}, ${32 + i};" for i in range(16))
    + "DONE: }"
)
_FADED = gl.constexpr(",".join(["=f"] * 16 + ["f"] * 32 + ["r"] * 16))


# One variant for all rows and lengths, and for all places in a batch.
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["table", "lengths"])
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


@gluon.jit
def _rows_of(x, like):
    """Numbers of rows `[64, 4]`, the same in the four threads of a row, for `like [64, columns / 8, 4, 2]`."""
    L: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, like.type.layout))
    return gl.convert_layout(x, L, assert_trivial=True)[:, None, :, None]


@gluon.jit
def _logits(s, factor, bias, softcap, CAPPED: gl.constexpr):
    """Products `s [64, N]` as `[64, N / 8, 4, 2]`, and what they are to be multiplied by."""
    s = s.reshape((64, s.shape[1] // 8, 4, 2))
    if CAPPED:
        x = s * _rows_of(factor, s) + _rows_of(bias, s)
        s = (softcap * 1.4426950408889634) * (1.0 - 2.0 / (1.0 + exp2(x * (2.0 / softcap))))
        factor = factor * 0.0 + 1.0
    return s, factor


@gluon.jit
def _weights(s, top, factor, v_power):
    """Weights of `s [64, N / 8, 4, 2]`, and a thread's sums of them `[64, 4]`: by short chains, of neighbours, of four, of all."""
    p = exp2(gl.fma(s, _rows_of(factor, s), _rows_of(v_power - top, s)))
    part = gl.sum(gl.sum(gl.sum(p.reshape((64, s.shape[1] // 4, 4, 4, 2)), 4), 2), 1)
    return p, gl.convert_layout(part, top.type.layout, assert_trivial=True)


@gluon.jit
def _soften(s, top, mass, factor, bias, v_power, seen, softcap, CAPPED: gl.constexpr):
    """Weights `[64, N / 8, 4, 2]` of the products `s [64, N]` of a page's first `seen` tokens, relative to the largest so far; the new
    top, the sums so far, and what those of before are to be multiplied by."""
    N: gl.constexpr = s.shape[1]
    STAT: gl.constexpr = top.type.layout
    place = gl.arange(0, N, layout=gl.SliceLayout(0, s.type.layout))
    s, factor = _logits(s, factor, bias, softcap, CAPPED)
    if seen < N:
        token = gl.convert_layout(natural(place).reshape((N // 8, 4, 2)), gl.SliceLayout(0, s.type.layout))
        s = gl.where((token < seen)[None], s, float("-inf"))
    most = gl.max(gl.max(gl.max(gl.max(s.reshape((64, N // 32, 4, 4, 2)), 4), 2), 1), 1)
    most = gl.convert_layout(most, gl.SliceLayout(1, STAT), assert_trivial=True)[:, None] + factor * 0.0
    new = gl.maximum(top, most * factor + (v_power - START))
    fade = exp2(top - new)
    p, part = _weights(s, new, factor, v_power)
    return p, new, mass * fade + part * exp2(-v_power), fade


@gluon.jit
def _follow(s, top, mass, factor, bias, v_power, softcap, CAPPED: gl.constexpr):
    """The same of a whole page that is not the first, without a maximum, and whether there is anything to multiply."""
    s, factor = _logits(s, factor, bias, softcap, CAPPED)
    p, part = _weights(s, top, factor, v_power)
    top, fade, raised = gl.inline_asm_elementwise(
        _RAISE, "=f,=f,=f,=f,=r,=r,f,f,f,f", [part, top], dtype=(gl.float32, gl.float32, gl.int32), is_pure=True, pack=2
    )
    return _faded(p, fade, raised), top, (mass + part * exp2(-v_power)) * fade, fade, raised


@gluon.jit
def _faded(x, fade, raised):
    """`x [64, columns / 8, 4, 2]` times `fade [64, 4]`, if `raised`."""
    args = [x, _rows_of(fade, x), _rows_of(raised, x)]
    return gl.inline_asm_elementwise(_FADE, _FADED, args, dtype=gl.float32, is_pure=True, pack=16)


@gluon.jit
def _pack(p):
    """Pairs of weights `[64, N / 8, 4, 2]` as words of float16 numbers, here and not earlier."""
    low, high = gl.split(p)
    return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _operand(words, D: gl.constexpr):
    """Pairs of float16 numbers `[64, N / 8, 4]` as the operand `[64, N]` of a product with D columns. As words they stay in their
    registers from one turn of a loop to the next."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
    )
    weights = gl.join(low, high).reshape((64, 8 * words.shape[1]))
    return gl.convert_layout(weights, gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]), 2))


@gluon.jit
def _hadamard(x, BITS: gl.constexpr):
    """`x [64, 2 ** BITS]`, an accumulator, times the Sylvester-Hadamard matrix, not normalised, without shared memory, of which there
    is none left. A step for every bit of the column: the lowest and the highest ones are of registers, two of lanes."""
    D: gl.constexpr = x.shape[1]
    L: gl.constexpr = x.type.layout
    x = x.reshape((64, D // 8, 4, 2))
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, x.type.layout))))[None, None, :, None]
    x = gl.inline_asm_elementwise(_ACROSS_1, "=f,f,f", [x, 1.0 - 2.0 * (t & 1).to(gl.float32)], dtype=gl.float32, is_pure=True, pack=1)
    x = gl.inline_asm_elementwise(_ACROSS_2, "=f,f,f", [x, 1.0 - (t & 2).to(gl.float32)], dtype=gl.float32, is_pure=True, pack=1)
    even, odd = gl.split(x)
    x = gl.join(even + odd, even - odd)
    for i in gl.static_range(BITS - 3):
        low, high = gl.split(x.reshape((64, D // 16 >> i, 2, 1 << i, 4, 2)).permute((0, 1, 3, 4, 5, 2)))
        x = gl.join(low + high, low - high).permute((0, 1, 5, 2, 3, 4)).reshape((64, D // 8, 4, 2))
    return gl.convert_layout(x.reshape((64, D)), L, assert_trivial=True)


@gluon.jit
def _queries(
    q_ptr, signs_ptr, centre_ptr, q_shared, row, rows, T, stride_h, stride_t, factor,
    D: gl.constexpr, BITS: gl.constexpr, ROTATE: gl.constexpr, CENTRE: gl.constexpr,
):  # fmt: skip
    """64 query rows, rotated and over a power of two next to the largest number of a row, into shared memory, in the order of K.
    Returns that power and the products with the centre, `[64]` each."""
    OM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, OM))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, OM))
    at = (r // T).to(gl.int64) * stride_h + (r % T).to(gl.int64) * stride_t
    x = gl.load(q_ptr + at[:, None] + d[None, :], mask=(r < rows)[:, None], other=0.0).to(gl.float32) * factor
    bias = gl.full([64], 0.0, gl.float32, layout=gl.SliceLayout(1, OM))
    if CENTRE:
        bias = gl.sum(x * gl.load(centre_ptr + d)[None, :], 1)
    if ROTATE:
        x = _hadamard(x * gl.load(signs_ptr + d)[None, :], BITS)
    size = exp2(gl.ceil(log2(gl.maximum(gl.max(gl.abs(x), 1), 1e-30))))
    x = (x * (1.0 / size)[:, None]).to(gl.float16).reshape((64, D // 32, 2, 4, 4)).permute((0, 1, 3, 2, 4)).reshape((64, D))
    q_shared.store(x)
    fence_async_shared()
    gl.thread_barrier()
    return size, bias


@gluon.jit
def _fast(
    powers, q_shared, k_shared, v_shared, barriers, turns, me, size, bias, n, seen, softcap, top, mass, acc,
    D: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """The last page, then all others, and where the rings of stages are then."""
    k_full, k_free, v_full, v_free = barriers
    OM: gl.constexpr = acc.type.layout
    zero = gl.full([64, 128], 0.0, gl.float32, layout=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
    k_stage = 0
    k_phase = 0
    v_stage = 0
    v_phase = 0
    turn = 1 - me  # the first group need not wait the first time
    if n > 0:
        powers += (n - 1) * 2
        k_power = gl.load(powers)
        v_power = gl.load(powers + 1)
        mbarrier.wait(k_full.index(0), 0)
        s = warpgroup_mma(q_shared, k_shared.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_free.index(0))
        p, top, mass, fade = _soften(s, top, mass, size * k_power, bias, v_power, seen, softcap, CAPPED)
        p = _pack(p)
        k_stage, k_phase = following(k_stage, k_phase, K_STAGES)
        mbarrier.wait(k_full.index(k_stage), k_phase, pred=n > 1)
        for i in range(n - 1):
            powers -= 2
            k_power = gl.load(powers)
            v_power = gl.load(powers + 1)
            mbarrier.wait(turns.index(me), turn)
            s = warpgroup_mma(q_shared, k_shared.index(k_stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_stage), v_phase)
            o = warpgroup_mma(_operand(p, D), v_shared.index(v_stage).permute((1, 0)), acc, is_async=True)
            mbarrier.arrive(turns.index(1 - me))
            turn = turn ^ 1
            s = warpgroup_mma_wait(1, [s])
            mbarrier.arrive(k_free.index(k_stage))
            p_next, top, mass, fade, raised = _follow(s, top, mass, size * k_power, bias, v_power, softcap, CAPPED)
            k_stage, k_phase = following(k_stage, k_phase, K_STAGES)
            # This wait stands between the weights and the next one, which the compiler would move up to before the weights.
            mbarrier.wait(k_full.index(k_stage), k_phase, pred=i < n - 2)
            acc = warpgroup_mma_wait(0, [o])
            mbarrier.arrive(v_free.index(v_stage))
            v_stage, v_phase = following(v_stage, v_phase, V_STAGES)
            faded = _faded(acc.reshape((64, D // 8, 4, 2)), fade, raised)
            acc = gl.convert_layout(faded.reshape((64, D)), OM, assert_trivial=True)
            p = _pack(p_next)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        o = warpgroup_mma(_operand(p, D), v_shared.index(v_stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [o])
        mbarrier.arrive(v_free.index(v_stage))
        v_stage, v_phase = following(v_stage, v_phase, V_STAGES)
    return top, mass, acc, (k_stage, k_phase, v_stage, v_phase)


@gluon.jit
def _safe(
    powers, q_shared, k_shared, v_shared, barriers, places, size, bias, n, seen, softcap, top, mass, acc,
    D: gl.constexpr, N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """All pages, the last one first, N tokens at once."""
    k_full, k_free, v_full, v_free = barriers
    k_stage, k_phase, v_stage, v_phase = places
    OM: gl.constexpr = acc.type.layout
    zero = gl.full([64, N], 0.0, gl.float32, layout=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    powers += (n - 1) * 2
    for _ in range(n):
        k_power = gl.load(powers)
        v_power = gl.load(powers + 1)
        powers -= 2
        k = k_shared.index(k_stage)
        v = v_shared.index(v_stage)
        mbarrier.wait(k_full.index(k_stage), k_phase)
        for part in gl.static_range(128 // N):
            s = warpgroup_mma(q_shared, k.slice(part * N, N).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, [s])
            if part == 128 // N - 1:
                mbarrier.arrive(k_free.index(k_stage))
            p, top, mass, fade = _soften(s, top, mass, size * k_power, bias, v_power, seen - part * N, softcap, CAPPED)
            x = acc.reshape((64, D // 8, 4, 2))
            acc = gl.convert_layout((x * _rows_of(fade, x)).reshape((64, D)), OM, assert_trivial=True)
            if part == 0:
                mbarrier.wait(v_full.index(v_stage), v_phase)
            o = warpgroup_mma(_operand(_pack(p), D), v.slice(part * N, N, 1).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, [o])
        mbarrier.arrive(v_free.index(v_stage))
        seen = 128
        k_stage, k_phase = following(k_stage, k_phase, K_STAGES)
        v_stage, v_phase = following(v_stage, v_phase, V_STAGES)
    return top, mass, acc


@gluon.jit
def _overflown(flags, verdict, CONSUMERS: gl.constexpr):
    """Whether a group found its sums infinite, once all have said so or not."""
    mbarrier.wait(verdict, 0)
    return gl.load(flags, volatile=True) + gl.load(flags + CONSUMERS - 1, volatile=True) > 0


@gluon.jit
def _consume(
    tensors, me, q_shared, shared, row, numbers,
    D: gl.constexpr, BITS: gl.constexpr, N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    CAPPED: gl.constexpr, FAST: gl.constexpr, ROTATE: gl.constexpr, CENTRE: gl.constexpr,
):  # fmt: skip
    """64 query rows, from `row`, through all pages. me: the number of this group."""
    q_ptr, signs, centres, powers, out_ptr, lse_ptr, flags = tensors
    k_shared, v_shared, barriers, verdict, turns = shared
    rows, T, strides, factor, n, left, softcap = numbers
    OM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    STAT: gl.constexpr = gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4])
    OR: gl.constexpr = gl.SliceLayout(1, OM)
    size, bias = _queries(
        q_ptr, signs[0], centres[0], q_shared, row, rows, T, strides[0], strides[1], factor, D, BITS, ROTATE[0], CENTRE[0]
    )
    none = gl.full([64, 4], 0.0, gl.float32, layout=STAT)
    size = none + gl.convert_layout(size, gl.SliceLayout(1, STAT))[:, None]
    bias = none + gl.convert_layout(bias, gl.SliceLayout(1, STAT))[:, None]
    nothing = gl.full([64, D], 0.0, gl.float32, layout=OM)
    seen = left - (n - 1) * 128
    if FAST:
        top, mass, acc, places = _fast(
            powers, q_shared, k_shared, v_shared, barriers, turns, me, size, bias, n, seen, softcap, none - 1e30, none, nothing,
            D, K_STAGES, V_STAGES, CAPPED,
        )  # fmt: skip
        gl.store(flags + me, gl.max((gl.sum(mass, 1) < float("inf")).to(gl.int32) ^ 1, 0))  # NaN is not less, too
        gl.thread_barrier()
        mbarrier.arrive(verdict)
        if _overflown(flags, verdict, CONSUMERS):
            top, mass, acc = _safe(
                powers, q_shared, k_shared, v_shared, barriers, places, size, bias, n, seen, softcap, none - 1e30, none, nothing,
                D, N, K_STAGES, V_STAGES, CAPPED,
            )  # fmt: skip
    else:
        top, mass, acc = _safe(
            powers, q_shared, k_shared, v_shared, barriers, (0, 0, 0, 0), size, bias, n, seen, softcap, none - 1e30, none, nothing,
            D, N, K_STAGES, V_STAGES, CAPPED,
        )  # fmt: skip
    r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, STAT))
    total = gl.sum(mass, 1)
    some = total > 0
    total = gl.where(some, total, 1.0)
    lse = gl.max(top, 1) + log2(total)
    if not CAPPED:
        lse += gl.max(bias, 1)
    gl.store(lse_ptr + r, gl.where(some, lse * 0.6931471805599453, float("-inf")), mask=r < rows)
    x = acc * gl.convert_layout(1.0 / total, OR)[:, None]
    r = row + gl.arange(0, 64, layout=OR)
    d = gl.arange(0, D, layout=gl.SliceLayout(0, OM))
    if ROTATE[1]:
        x = _hadamard(x, BITS) * gl.load(signs[1] + d)[None, :]
    if CENTRE[1]:
        x += gl.convert_layout(some.to(gl.float32), OR)[:, None] * gl.load(centres[1] + d)[None, :]
    to = out_ptr + r.to(gl.int64)[:, None] * D + d[None, :]
    gl.store(to, x.to(out_ptr.dtype.element_ty), mask=(r < rows)[:, None])


# One variant for all rows and lengths, and for all places in a batch.
@gluon.jit(do_not_specialize=["rows", "T", "table_stride", "columns"], do_not_specialize_on_alignment=["table", "lengths"])
def prefill_kernel(
    q, k_signs, v_signs, k_centre, v_centre, pool, table, lengths, folded, powers, k_table, v_table, out, lse, flags,
    heads, rows, T, stride_b, stride_h, stride_t, table_stride, columns, factor, softcap,
    D: gl.constexpr, BITS: gl.constexpr, K: gl.constexpr, V: gl.constexpr, CAPPED: gl.constexpr, ROTATE: gl.constexpr,
    CENTRE: gl.constexpr, FAST: gl.constexpr, N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, CONSUMER: gl.constexpr, PRODUCER: gl.constexpr,
):  # fmt: skip
    """64 CONSUMERS query rows over one split of `attend_pages`. columns: of the table. ROTATE, CENTRE: whether K and V have signs and
    centres. For the constants after these see `configuration`."""
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
    row = gl.program_id(0) * (64 * CONSUMERS)
    F16: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_shared = gl.allocate_shared_memory(gl.float16, [CONSUMERS, 64, D], F16)
    k_shared = gl.allocate_shared_memory(gl.float16, [K_STAGES, 128, D], F16)
    v_shared = gl.allocate_shared_memory(gl.float16, [V_STAGES, D, 128], F16)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BAR)
    k_free = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BAR)
    v_free = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BAR)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=CONSUMERS)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=CONSUMERS)
    # Only those that are used. The memory of others is given to something else, and when the hardware switches from one process to
    # another it writes a barrier back to where it was.
    verdict = k_full.index(0)
    turns = k_full
    if FAST:
        verdict = gl.allocate_shared_memory(gl.int64, [1], BAR)
        turns = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
        mbarrier.init(verdict, count=CONSUMERS)
        mbarrier.init(turns.index(0), count=1)
        mbarrier.init(turns.index(1), count=1)
    q += b * stride_b + h.to(gl.int64) * (rows // T) * stride_h
    to = segment * gl.num_programs(2) + gl.program_id(2)
    flags += (to * gl.num_programs(0) + gl.program_id(0)) * CONSUMERS
    at = segment * columns + first
    powers += at * 2
    out += to * rows * D
    lse += to * rows
    signs = (k_signs, v_signs)
    centres = (k_centre + h * D, v_centre + h * D)
    strides = (stride_h, stride_t)
    barriers = (k_full, k_free, v_full, v_free)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    k_scales = gl.allocate_shared_memory(gl.int32, [128], FLAT)
    v_scales = gl.allocate_shared_memory(gl.int32, [64], FLAT)
    rooms = (room(128, D, K), room(D, 128, V), k_scales, v_scales)
    ids = table + b * table_stride
    folded += at * 192
    tensors = (q, signs, centres, powers, out, lse, flags)
    shared = (k_shared, v_shared, barriers, verdict, turns)
    numbers = (rows, T, strides, factor, n, left, softcap)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (tensors, 0, q_shared.index(0), shared, row, numbers, D, BITS, N, K_STAGES, V_STAGES, CONSUMERS, CAPPED,
                            FAST, ROTATE, CENTRE)),
                (_consume, (tensors, 1, q_shared.index(1), shared, row + 64, numbers, D, BITS, N, K_STAGES, V_STAGES, CONSUMERS, CAPPED,
                            FAST, ROTATE, CENTRE)),
                (_produce, (pool, ids, folded, k_table, v_table, k_shared, v_shared, rooms, barriers, flags, verdict, first, n, heads,
                            h, D, K, V, K_STAGES, V_STAGES, CONSUMERS, FAST)),
            ],
            [4, 4],
            [CONSUMER, PRODUCER],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (tensors, 0, q_shared.index(0), shared, row, numbers, D, BITS, N, K_STAGES, V_STAGES, CONSUMERS, CAPPED,
                            FAST, ROTATE, CENTRE)),
                (_produce, (pool, ids, folded, k_table, v_table, k_shared, v_shared, rooms, barriers, flags, verdict, first, n, heads,
                            h, D, K, V, K_STAGES, V_STAGES, CONSUMERS, FAST)),
            ],
            [4],
            [PRODUCER],
        )  # fmt: skip


@gluon.jit
def _produce(
    pool, ids, folded, k_table, v_table, k_shared, v_shared, rooms, barriers, flags, verdict, first, n, H, h,
    D: gl.constexpr, K: gl.constexpr, V: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    FAST: gl.constexpr,
):  # fmt: skip
    """All pages, and if they are wanted again, again."""
    places = (0, 1, 0, 1)
    for _ in range(2 if FAST else 1):
        places = produce(
            pool, ids, folded, k_table, v_table, k_shared, v_shared, rooms, barriers, places, first, n, H, h,
            D, K, V, K_STAGES, V_STAGES,
        )  # fmt: skip
        if FAST:
            n = gl.where(_overflown(flags, verdict, CONSUMERS), n, 0)


def configuration(f: Format) -> dict[str, Any]:
    """What suits a format.

    N: tokens of a product. K_STAGES, V_STAGES: pages in shared memory. CONSUMERS: groups of 64 query rows. CONSUMER, PRODUCER:
    registers of the threads of the second one, if there is one, and of the group that unpacks. FAST: whether to try without maxima
    first, which needs the registers of smaller heads.
    """
    if f.head_dim == 256:
        groups = dict(CONSUMERS=2, CONSUMER=208, PRODUCER=88) if f.k + f.v <= 8 else dict(CONSUMERS=1, CONSUMER=0, PRODUCER=232)
        return dict(FAST=False, N=64, K_STAGES=1, V_STAGES=1, **groups)
    registers = dict(CONSUMER=208, PRODUCER=88) if 3 in (f.k, f.v) else dict(CONSUMER=216, PRODUCER=72)
    return dict(FAST=True, N=128, K_STAGES=2, V_STAGES=3 if f.k + f.v <= 8 else 2, CONSUMERS=2, **registers)


def attend_pages(
    q: Tensor,
    signs: tuple[Tensor | None, Tensor | None],
    centres: tuple[Tensor | None, Tensor | None],
    factor: float,
    pages: Pages,
    k_table: Tensor,
    v_table: Tensor,
    out: Tensor,
    lse: Tensor,
    softcap: float | None,
) -> None:
    """Attention of `q [B, Hq, T, D]` times `factor`, which has log2(e), over all tokens of `pages`: fills the partials of E splits,
    `out [B * H, E, R, D]`, in the plain space of V, and `lse [B * H, E, R]` float32, both contiguous.

    signs, centres: of K and V, `[D]` (`rotate.signs`) and `[H, D]` float32, None for none. k_table, v_table: of `hopper.table`.
    softcap: in natural units. Allocates 3/2 of the scales of the pages, for a while; nothing waits.
    """
    f, (_, _, t, head_dim), (segments, splits, rows) = pages.format, q.shape, lse.shape
    heads, columns = pages.pool.shape[1], pages.table.shape[1]
    assert max(f.k, f.v) <= 8 and head_dim == f.head_dim and out.shape == (*lse.shape, head_dim)
    assert out.is_contiguous() and lse.is_contiguous() and q.stride(-1) == pages.table.stride(1) == 1
    folded = torch.empty(segments, columns, 192, dtype=torch.int32, device=q.device)
    powers = torch.empty(segments, columns, 2, dtype=torch.float32, device=q.device)
    if columns:
        fold_kernel[(columns, segments)](
            pages.pool, pages.table, pages.lengths, folded, powers, heads, pages.table.stride(0),
            SCALES=f.scale_offset, PAGE=PAGE, num_warps=1,
        )  # fmt: skip
    how = configuration(f)
    grid = (-(-rows // (64 * how["CONSUMERS"])), segments, splits)
    flags = torch.empty(grid[0] * segments * splits * how["CONSUMERS"], dtype=torch.int32, device=q.device)
    prefill_kernel[grid](
        q, *(q if x is None else x for x in (*signs, *centres)), pages.pool, pages.table, pages.lengths, folded, powers,
        k_table, v_table, out, lse, flags, heads, rows, t, *q.stride()[:3], pages.table.stride(0), columns, factor,
        1.0 if softcap is None else softcap, D=head_dim, BITS=head_dim.bit_length() - 1, K=f.k, V=f.v, CAPPED=softcap is not None,
        ROTATE=tuple(x is not None for x in signs), CENTRE=tuple(x is not None for x in centres), **how, num_warps=4,
    )  # fmt: skip
