"""Packed pages as float16 matrices in Hopper's shared memory, in Gluon: what feeds the products of `prefill_hopper`.

    K   `[128 tokens, D]`    V   `[D, 128 tokens]`    both with columns in an order in which a thread has eight neighbours (`natural`)

A group of four warps does nothing else. It copies packed pages to rooms of its own, asynchronously, a page ahead, each thread the
words that it will read; codes become E4M3 numbers in registers as in `hopper`, these become float16 numbers by one instruction per
pair, and one multiplies a pair by its scales, which `prefill_hopper.fold_kernel` has prepared. No thread exchanges numbers with
another, and stores of 16 bytes meet no bank twice. A stage has two barriers: its matrix is there (full), and has been read (free).
"""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from kvstack.kernels.hopper import UNPACK2, UNPACK3, UNPACK4

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


@gluon.constexpr_function
def _rows(rows: int, swapped: bool) -> tuple[list[int], list[int], list[int]]:
    """Which bits of a producer's row are of its registers, lanes and warps. Stores of 16 bytes by 8 neighbours, of two rows, meet all
    banks when these differ in the third bit of their place in shared memory: of the token 16, or of the coordinate 4."""
    third = 16 if swapped else 4
    rest = [b for b in (4, 8, 16) if b != third]
    return [32 << i for i in range((rows // 32).bit_length() - 1)], [third, 1, 2], rest


@gluon.constexpr_function
def _words(rows: int, words: int, swapped: bool) -> Any:
    """Layout of `[rows, 4, words]` words in a producer."""
    registers, lanes, warps = _rows(rows, swapped)
    return gl.DistributedLinearLayout(
        [[0, 0, 1 << i] for i in range(words.bit_length() - 1)] + [[b, 0, 0] for b in registers],
        [[0, 1, 0], [0, 2, 0]] + [[b, 0, 0] for b in lanes],
        [[b, 0, 0] for b in warps],
        [],
        [rows, 4, words],
    )


@gluon.constexpr_function
def _steps(rows: int, steps: int, swapped: bool) -> Any:
    """The same for words of four bytes `[rows, 4, step, half]`."""
    registers, lanes, warps = _rows(rows, swapped)
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1]] + [[0, 0, 1 << i, 0] for i in range(steps.bit_length() - 1)] + [[b, 0, 0, 0] for b in registers],
        [[0, 1, 0, 0], [0, 2, 0, 0]] + [[b, 0, 0, 0] for b in lanes],
        [[b, 0, 0, 0] for b in warps],
        [],
        [rows, 4, steps, 2],
    )


@gluon.jit
def natural(place):
    """The column of the page, 32 s + 16 h + 4 t + i, that lies in shared memory at `place`, 32 s + 8 t + 4 h + i."""
    return (place & -29) | (place << 2 & 16) | (place >> 1 & 12)


@gluon.constexpr_function
def _columns() -> Any:
    """Layout of the 64 words of scales of V: 16 neighbours in a thread of a quad."""
    return gl.DistributedLinearLayout([[1], [2], [4], [8]], [[16], [32], [0], [0], [0]], [[0], [0]], [], [64])


@gluon.constexpr_function
def _planes(bits: int, columns: int) -> tuple[int, int]:
    """Words per thread and row in the first and in the second plane of a matrix; a plane that is not there has one."""
    return (columns // 64, columns // 128) if bits == 3 else (columns * bits // 128, 1)


@gluon.jit
def _place(base, R: gl.constexpr, W: gl.constexpr, TOKENS: gl.constexpr):
    """Pointers to the words `[R, 4, W]` of a plane at `base`."""
    L: gl.constexpr = _words(R, W, TOKENS)
    r = gl.arange(0, R, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
    w = gl.arange(0, W, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
    return base.to(gl.pointer_type(gl.int32), bitcast=True) + (r[:, None, None] * (4 * W) + t[None, :, None] * W + w[None, None, :])


@gluon.jit
def room(R: gl.constexpr, C: gl.constexpr, BITS: gl.constexpr):
    """Shared memory for the planes of a packed matrix `[R, C]`, and for its scales."""
    W: gl.constexpr = _planes(BITS, C)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
    low = gl.allocate_shared_memory(gl.int32, [R, 4, W[0]], PLAIN)
    high = low
    if BITS == 3:
        high = gl.allocate_shared_memory(gl.int32, [R, 4, W[1]], PLAIN)
    return low, high


@gluon.jit
def _fetch(room, scales, base, scale, BITS: gl.constexpr, TOKENS: gl.constexpr):
    """Start to copy a packed matrix at `base` to its room, and its scales."""
    low, high = room
    R: gl.constexpr = low.shape[0]
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    async_copy.async_copy_global_to_shared(low, _place(base, R, low.shape[2], TOKENS))
    if BITS == 3:
        async_copy.async_copy_global_to_shared(high, _place(base + R * low.shape[2] * 16, R, high.shape[2], TOKENS))
    async_copy.async_copy_global_to_shared(scales, scale + gl.arange(0, scales.shape[0], layout=L))
    async_copy.commit_group()


@gluon.jit
def _words_of(room, BITS: gl.constexpr, TOKENS: gl.constexpr):
    """The words of a packed matrix; without a second plane a dummy in its place."""
    low, high = room
    first = low.load(_words(low.shape[0], low.shape[2], TOKENS))
    if BITS == 3:
        return first, high.load(_words(high.shape[0], high.shape[2], TOKENS))
    else:
        return first, 0


@gluon.jit
def _e4m3(low, high, t0, t1, R: gl.constexpr, C: gl.constexpr, BITS: gl.constexpr, TOKENS: gl.constexpr):
    """Words of codes `[R, 4, words]` as words of four E4M3 numbers `[R, 4, step, half]`."""
    W: gl.constexpr = _words(R, C // 128 if BITS == 3 else C * BITS // 128, TOKENS)
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
    return gl.convert_layout(x.reshape((R, 4, C // 32, 2)), _steps(R, C // 32, TOKENS))


@gluon.jit
def _store(shared, x, scale0, scale1, R: gl.constexpr, C: gl.constexpr, TOKENS: gl.constexpr):
    """Words of E4M3 numbers, times scales, to float16 `shared [R, C]`."""
    a, b = gl.inline_asm_elementwise(_SCALE, "=r,=r,r,r,r", [x, scale0, scale1], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
    pairs = shared._reinterpret(gl.int32, [R, C // 2], gl.NVMMASharedLayout(128, 32, rank=2))
    words = gl.join(a, b).permute((0, 2, 1, 3, 4))
    if TOKENS:
        words = words.reshape((4, 2, 4, 4, C // 2)).permute((0, 2, 1, 3, 4))
    pairs.store(words.reshape((R, C // 2)))


@gluon.jit
def produce(
    pool, ids, folded, k_table, v_table, k_shared, v_shared, rooms, barriers, places, first, n, H, h,
    D: gl.constexpr, K: gl.constexpr, V: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """Pages to float16 matrices in shared memory, the last page first. places: stages and phases of the rings of K and V, returned as
    they are then."""
    k_full, k_free, v_full, v_free = barriers
    k_room, v_room, k_scales, v_scales = rooms
    k_stage, k_phase, v_stage, v_phase = places
    VALUES: gl.constexpr = 128 * D * K // 8
    NBYTES: gl.constexpr = VALUES + 128 * D * V // 8 + 512
    COLUMN: gl.constexpr = gl.SliceLayout(0, _steps(D, 4, False))
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, _steps(128, D // 32, True))))
    if n > 0:
        copy = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, _words(128, 4, True))))
        kt0 = gl.load(k_table + copy)
        kt1 = gl.load(k_table + 4 + copy)
        vt0 = gl.load(v_table + copy)
        vt1 = gl.load(v_table + 4 + copy)
        at = first + n - 1
        folded += (n - 1) * 192
        base = pool + (gl.load(ids + at).to(gl.int64) * H + h) * NBYTES
        ahead = gl.load(ids + gl.maximum(at - 1, first))
        _fetch(k_room, k_scales, base, folded, K, True)
        _fetch(v_room, v_scales, base + VALUES, folded + 128, V, False)
        for i in range(n):
            base = pool + (ahead.to(gl.int64) * H + h) * NBYTES
            ahead = gl.load(ids + gl.maximum(at - i - 2, first))
            folded -= gl.where(i < n - 1, 192, 0)
            async_copy.wait_group(1)
            gl.thread_barrier()
            low, high = _words_of(k_room, K, True)
            scale = k_scales.load(ROW)
            gl.thread_barrier()
            _fetch(k_room, k_scales, base, folded, K, True)
            mbarrier.wait(k_free.index(k_stage), k_phase)
            x = _e4m3(low, high, kt0, kt1, 128, D, K, True)
            _store(k_shared.index(k_stage), x, scale[:, None, None, None], scale[:, None, None, None], 128, D, True)
            fence_async_shared()
            mbarrier.arrive(k_full.index(k_stage))
            k_stage, k_phase = following(k_stage, k_phase, K_STAGES)
            async_copy.wait_group(1)
            gl.thread_barrier()
            low, high = _words_of(v_room, V, False)
            even, odd = gl.split(v_scales.load(_columns()).reshape((4, 4, 2, 2)))
            gl.thread_barrier()
            _fetch(v_room, v_scales, base + VALUES, folded + 128, V, False)
            mbarrier.wait(v_free.index(v_stage), v_phase)
            x = _e4m3(low, high, vt0, vt1, D, 128, V, False)
            even, odd = gl.convert_layout(even, COLUMN)[None], gl.convert_layout(odd, COLUMN)[None]
            _store(v_shared.index(v_stage), x, even, odd, D, 128, False)
            fence_async_shared()
            mbarrier.arrive(v_full.index(v_stage))
            v_stage, v_phase = following(v_stage, v_phase, V_STAGES)
        async_copy.wait_group(0)
    return k_stage, k_phase, v_stage, v_phase


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    """The stage of a ring after `stage`, and its phase."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)
