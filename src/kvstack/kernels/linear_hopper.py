"""Scores that are linear in keys and in the lengths of their bands, over pages, on Hopper (sm_90), in Gluon: see `score.score_linear`.

A program goes through neighbouring pages of the table, and does each for all query heads of its KV head. A page comes by an
asynchronous copy, while another is worked on, and its codes become float16 numbers x in registers as in `hopper`:

    re, im = x @ basis        the rotation back, in float16 in shared memory; neighbouring columns, which one thread has
    |k| = sqrt(re^2 + im^2)   in float32; as float16 it is the next product's operand, without leaving its thread
    out = scale * (x @ latent^T + |k| @ c^T) + bias

The product with w needs no rotation back: latent = w turned as keys were, and bias = <w, centre>. latent and c are twice as many
columns, see `hopper`: what float16 leaves of them is there, too. Where |k| may be any number, with a centre or 16 bits, the scale and
the centre come before the square root, and |k| is divided by the greatest of its token and 32 bands. A product sums over the columns of
x in the order of memory, which the host gives to basis and latent, too (`_order`). V is not read.

`linear` is its portable twin, for codecs, head sizes and GPUs that this does not take.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from kvstack.codecs.base import Codec
from kvstack.codecs.exact import ExactCodec
from kvstack.codecs.polar import PolarCodec
from kvstack.kernels.device import processors
from kvstack.kernels.hopper import copy_words, fragment, joined, near_and_rest, numbers, paired, query_layout, table
from kvstack.kernels.pages import PAGE, Pages
from kvstack.kernels.portable import ROWS
from kvstack.rope import Rope

HEAD_DIMS = 64, 128
OCCUPANCY, REGISTERS = 2, 255  # programs of a multiprocessor; registers of a thread that let them


def score_pages(pages: Pages, key: Codec, rope: Rope, w: Tensor, c: Tensor) -> Tensor:
    """`score.score_linear` on Hopper, for codecs that `decode.choose` sends there, and head sizes of `HEAD_DIMS`."""
    f, (batch, heads, groups, head_dim), slots = pages.format, w.shape, pages.table.shape[1]
    assert groups <= ROWS and head_dim in HEAD_DIMS and c.shape[-3:] == (heads, groups, head_dim // 2) and c.is_contiguous()
    assert w.dtype == c.dtype == torch.float32 and head_dim == f.head_dim and pages.pool.shape[1:] == (heads, f.nbytes)
    assert pages.table.shape[0] == batch and pages.table.stride(1) == 1 and pages.pool.is_contiguous()
    half = key.dtype if isinstance(key, ExactCodec) else torch.float16
    turned = rope.pairs.to(w.device).T.flatten()  # (re, im) of each band
    order = _order(head_dim, f.k, w.device)
    rotation = torch.eye(head_dim, device=w.device) if key.transform is None else key.transform
    basis = rotation[order[:, None], turned].T.to(half).contiguous()
    centre, bias = w, w
    if key.centre is not None:
        centre, bias = key.centre[:, turned].contiguous(), torch.einsum("bhgd,hd->bhg", w, key.centre).contiguous()
    levels = table(key.levels if isinstance(key, PolarCodec) else w.new_zeros(8), f.k)
    latent = key.project(w)[..., order].contiguous()
    out = w.new_zeros(batch, heads, groups, slots * PAGE)
    if out.numel():
        linear_kernel[(min(batch * heads * slots, processors(w.device) * OCCUPANCY),)](
            latent, bias, c, basis, centre, levels, pages.pool, pages.table, pages.lengths, out,
            batch * heads * slots, heads, groups, slots, pages.table.stride(0), c.numel() // (groups * (head_dim // 2)),
            D=head_dim, K=f.k, R=max(4, 1 << (groups - 1).bit_length()), SCALES=f.scale_offset, NBYTES=f.nbytes,
            HALF=gl.bfloat16 if half == torch.bfloat16 else gl.float16, CENTRE=key.centre is not None,
            num_warps=4, maxnreg=REGISTERS,
        )  # fmt: skip
    return out


def _order(head_dim: int, bits: int, device: torch.device) -> Tensor:
    """The coordinate of a key that is column 16 s + 8 h + 2 t + i of the operand, `[D]`. Codes lie in memory in fours, not in pairs."""
    column = torch.arange(head_dim, device=device)
    if bits == 16:
        return column
    n, t = column // 16 * 4 + column // 8 % 2 * 2 + column % 2, column // 2 % 4  # number n of thread t
    return n // 8 * 32 + n // 4 % 2 * 16 + t * 4 + n % 4


@gluon.jit
def _sqrt(x):
    """The square root, fast; of numbers that are no less than 0."""
    return gl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _place(tile, stop, lengths, table, heads, slots, table_stride):
    """The page of the pool that is number `tile` of the table, and how many tokens of its row it and those behind it hold."""
    inside = tile < stop
    segment = tile // slots
    page = tile - segment * slots
    b = segment // heads
    left = gl.load(lengths + b, mask=inside, other=0) - page * 128
    return gl.load(table + b.to(gl.int64) * table_stride + page, mask=left > 0, other=0), left


@gluon.jit
def _fetch(low, high, scales, base, inside, K: gl.constexpr, SCALES: gl.constexpr):
    """Start to copy K of the page at `base` and its scales."""
    copy_words(low, base, inside)
    if K == 3:
        copy_words(high, base + low.shape[0] * 4, inside)
    one = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    async_copy.async_copy_global_to_shared(scales, (base + SCALES).to(gl.pointer_type(gl.uint32), bitcast=True) + one, mask=inside)
    async_copy.commit_group()


@gluon.jit
def _small(shared, x, most, TYPE: gl.constexpr):
    """Rows `x [R, C]` over `most [R]` to `shared [2 R, C]`, as numbers of `TYPE` and 16 times what they miss."""
    near, rest = near_and_rest(x / most[:, None], TYPE)
    shared.store(gl.join(near, rest).permute((0, 2, 1)).reshape((2 * x.shape[0], x.shape[1])))


@gluon.jit(do_not_specialize=["total", "slots", "table_stride", "c_segments"])  # they change with rows and lengths
def linear_kernel(
    latent,  # [B, H, G, D] float32, columns as those of x
    bias,  # [B, H, G]
    c,  # [c_segments, G, D / 2]: of all rows, or the same for each
    basis,  # [D, D]: column 2 f or 2 f + 1 of the keys, and columns as those of x
    centre,  # [H, D], column 2 f or 2 f + 1
    levels,  # [2, 4] int32
    pool,
    table,
    lengths,
    out,
    total,
    heads,
    groups,
    slots,
    table_stride,
    c_segments,
    D: gl.constexpr,
    K: gl.constexpr,  # bits
    R: gl.constexpr,  # query heads of a KV head, padded
    SCALES: gl.constexpr,
    NBYTES: gl.constexpr,
    HALF: gl.constexpr,  # type of the operands
    CENTRE: gl.constexpr,
):
    """See the module. Pages of the table count as they lie, those of a row's KV heads one after the other: `total` in all."""
    F: gl.constexpr = D // 2
    XT: gl.constexpr = HALF if K == 16 else gl.float8e4nv
    ANY: gl.constexpr = CENTRE or K == 16  # |k| may be any number
    MM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * R, 16])
    XL: gl.constexpr = gl.DotOperandLayout(0, MM, 2)
    SL: gl.constexpr = gl.DotOperandLayout(0, SM, 2)
    BAND: gl.constexpr = gl.SliceLayout(2, paired(128, 32))  # of |k| [128 tokens, 32 bands]
    ST: gl.constexpr = gl.SliceLayout(2, paired(128, R))  # of scores [128 tokens, R]
    TOKEN: gl.constexpr = gl.SliceLayout(1, ST)
    ROW: gl.constexpr = gl.SliceLayout(0, ST)
    Q: gl.constexpr = query_layout(R, 16)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    B: gl.constexpr = query_layout(64, 16)

    share = gl.cdiv(total, gl.num_programs(0))
    tile = gl.program_id(0) * share
    stop = gl.minimum(tile + share, total)
    copy = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, fragment(128, 4))))  # see `hopper`
    t0 = gl.load(levels + copy)
    t1 = gl.load(levels + 4 + copy)
    b_shared = gl.allocate_shared_memory(HALF, [D // 64, 64, D], gl.NVMMASharedLayout(128, 16, rank=2))
    w_shared = gl.allocate_shared_memory(HALF, [2 * R, D], gl.NVMMASharedLayout(128, 16, rank=2))
    c_shared = gl.allocate_shared_memory(gl.float16, [D // 64, 2 * R, 32], gl.NVMMASharedLayout(64, 16, rank=2))
    low = gl.allocate_shared_memory(gl.int32, [2, 128 * D * (K & 30) // 32], FLAT)
    high = low
    if K == 3:
        high = gl.allocate_shared_memory(gl.int32, [2, 128 * D // 32], FLAT)
    scales_shared = gl.allocate_shared_memory(gl.uint32, [2, 128], FLAT)
    wide = gl.arange(0, D, layout=gl.SliceLayout(0, B))
    for i in gl.static_range(D // 64):
        column = 64 * i + gl.arange(0, 64, layout=gl.SliceLayout(1, B))
        b_shared.index(i).store(gl.load(basis + column[:, None] * D + wide[None, :]))
    fence_async_shared()
    zero_b = gl.full([128, 64], 0.0, gl.float32, layout=MM)
    zero_s = gl.full([128, 2 * R], 0.0, gl.float32, layout=SM)
    token = gl.arange(0, 128, layout=TOKEN)
    row = gl.arange(0, R, layout=ROW)
    w_most = gl.full([R], 1.0, gl.float32, layout=ROW)
    c_most = gl.full([R], 1.0, gl.float32, layout=ROW)
    shift = gl.full([R], 0.0, gl.float32, layout=ROW)
    index, left = _place(tile, stop, lengths, table, heads, slots, table_stride)
    next_index, next_left = _place(tile + 1, stop, lengths, table, heads, slots, table_stride)
    before = tile // slots - 1
    h = tile // slots % heads
    _fetch(
        low.index(0), high.index(0), scales_shared.index(0), pool + (index.to(gl.int64) * heads + h) * NBYTES, left > 0, K, SCALES
    )  # fmt: skip
    stage = 0
    while tile < stop:
        segment = tile // slots
        h = segment % heads
        h_next = (tile + 1) // slots % heads
        base = pool + (next_index.to(gl.int64) * heads + h_next) * NBYTES
        _fetch(low.index(1 - stage), high.index(1 - stage), scales_shared.index(1 - stage), base, next_left > 0, K, SCALES)
        ahead_index, ahead_left = _place(tile + 2, stop, lengths, table, heads, slots, table_stride)
        if segment != before:
            before = segment
            d = gl.arange(0, D, layout=gl.SliceLayout(0, Q))
            r = gl.arange(0, R, layout=gl.SliceLayout(1, Q))
            w = gl.load(latent + (segment.to(gl.int64) * groups + r[:, None]) * D + d[None, :], mask=(r < groups)[:, None], other=0.0)
            most = gl.maximum(gl.max(gl.abs(w), 1), 1e-30)
            _small(w_shared, w, most, HALF)
            w_most = gl.convert_layout(most, ROW)
            f = gl.arange(0, F, layout=gl.SliceLayout(0, Q))
            of = segment % c_segments
            factor = gl.load(c + (of * groups + r[:, None]) * F + f[None, :], mask=(r < groups)[:, None], other=0.0)
            most = gl.maximum(gl.max(gl.abs(factor), 1), 1e-30)
            c_most = gl.convert_layout(most, ROW)
            for i in gl.static_range(D // 64):
                # Column 16 s + 8 h + 2 t + i of |k| is the band 16 s + 8 h + 4 i + t of 32.
                p = gl.arange(0, 32, layout=gl.SliceLayout(0, Q))
                band = 32 * i + p // 8 * 8 + p % 2 * 4 + p // 2 % 4
                factor = gl.load(c + (of * groups + r[:, None]) * F + band[None, :], mask=(r < groups)[:, None], other=0.0)
                _small(c_shared.index(i), factor, most, gl.float16)
            if CENTRE:
                shift = gl.load(bias + segment * groups + row, mask=row < groups, other=0.0)
            fence_async_shared()
        async_copy.wait_group(1)
        gl.thread_barrier()
        if left > 0:
            scales = scales_shared.index(stage).load(TOKEN)
            x = numbers(low.index(stage), high.index(stage), t0, t1, K, 128, D, XT)
            if K != 16:
                x = x.to(HALF).reshape((128, 4, D // 16, 2, 2))
            x = x.permute((0, 2, 3, 1, 4)).reshape((128, D))
            scale = (scales << 16).to(gl.float32, bitcast=True)
            s = warpgroup_mma(
                gl.convert_layout(x, SL, assert_trivial=True), w_shared.permute((1, 0)), zero_s, use_acc=False, is_async=True
            )
            x = gl.convert_layout(x, XL, assert_trivial=True)
            of_bands = gl.full([128, R], 0.0, gl.float32, layout=ST)
            for i in gl.static_range(D // 64):
                k = warpgroup_mma(x, b_shared.index(i).permute((1, 0)), zero_b, use_acc=False, is_async=True)
                k = warpgroup_mma_wait(0, [k])
                re, im = gl.split(k.reshape((128, 32, 2)))
                re, im = gl.convert_layout(re, BAND), gl.convert_layout(im, BAND)
                if ANY:
                    of_band = gl.convert_layout(scale, gl.SliceLayout(1, BAND))[:, None]
                    re, im = re * of_band, im * of_band
                if CENTRE:
                    f = gl.arange(0, 32, layout=gl.SliceLayout(0, BAND))
                    re += gl.load(centre + h * D + 64 * i + 2 * f)[None, :]
                    im += gl.load(centre + h * D + 64 * i + 2 * f + 1)[None, :]
                size = _sqrt(re * re + im * im)
                if ANY:
                    most = gl.maximum(gl.max(size, 1), 1e-30)
                    size = size / most[:, None]
                size = size.to(gl.float16).reshape((128, 2, 2, 2, 4)).permute((0, 1, 2, 4, 3)).reshape((128, 32))
                size = gl.convert_layout(size, SL, assert_trivial=True)
                part = warpgroup_mma(size, c_shared.index(i).permute((1, 0)), zero_s, use_acc=False, is_async=True)
                part = joined(warpgroup_mma_wait(0, [part]), ST)
                if ANY:
                    part = part * gl.convert_layout(most, TOKEN)[:, None]
                of_bands += part
            s = joined(warpgroup_mma_wait(0, [s]), ST)
            if ANY:
                s = s * (scale[:, None] * w_most[None, :]) + of_bands * c_most[None, :] + shift[None, :]
            else:
                s = scale[:, None] * (s * w_most[None, :] + of_bands * c_most[None, :])
            page = tile - segment * slots
            to = out + (segment.to(gl.int64) * groups + row[None, :]) * (slots * 128) + page * 128 + token[:, None]
            gl.store(to, s, mask=(token < left)[:, None] & (row < groups)[None, :])
        gl.thread_barrier()  # all threads have read this page, and the products their small operands
        index, left = next_index, next_left
        next_index, next_left = ahead_index, ahead_left
        stage = 1 - stage
        tile += 1
    async_copy.wait_group(0)
