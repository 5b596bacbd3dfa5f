"""Numbers of 16 bits into pages, as they are: what `encode` does for codes, for the recipes that do not compress.

Programs write single numbers to where the page has them, and nothing else; the scales become 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvstack.kernels.pages import PAGE, Pages

BLOCK = 16  # tokens of one program


@triton.jit
def _place(c, C: tl.constexpr):
    """Where column c = 16 s + 8 h + 2 t + i of C is in its row, in numbers."""
    return c // 2 % 4 * (C // 4) + c // 16 * 4 + c // 8 % 2 * 2 + c % 2


# One variant for all rows and lengths, and for all places in a batch.
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["table", "starts", "counts"])
def store_kernel(
    k, v, pool, table, starts, counts, k_b, k_h, k_n, v_b, v_h, v_n, heads, table_stride,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tokens of one block of one head. x_y: stride of x in y."""
    b, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ours = n < tl.load(counts + b)
    token = tl.load(starts + b) + n
    index = tl.load(table + b.to(tl.int64) * table_stride + token // PAGE, mask=ours, other=0)
    row, d = token % PAGE, tl.arange(0, D)
    page = (index.to(tl.int64) * heads + h) * (PAGE * (2 * D + 2))  # in numbers
    at = n.to(tl.int64)[:, None]
    mask = ours[:, None]
    x = tl.load(k + b.to(tl.int64) * k_b + h.to(tl.int64) * k_h + at * k_n + d[None, :], mask=mask)
    tl.store(pool + page[:, None] + row[:, None] * D + _place(d, D)[None, :], x, mask=mask)
    x = tl.load(v + b.to(tl.int64) * v_b + h.to(tl.int64) * v_h + at * v_n + d[None, :], mask=mask)
    tl.store(pool + page[:, None] + PAGE * D + d[None, :] * PAGE + _place(row, PAGE)[:, None], x, mask=mask)
    scales = (pool + page + 2 * PAGE * D + 2 * row).to(tl.pointer_type(tl.uint32), bitcast=True)
    tl.store(scales, tl.full((BLOCK,), 0x3F803F80, tl.uint32), mask=ours)


def store(k: Tensor, v: Tensor, pages: Pages, starts: Tensor, counts: Tensor) -> None:
    """Write the first `counts[b]` tokens of `k, v [B, H, n, D]`, of 16 bits, from token `starts[b]` of row b on."""
    (b, h, n, d), f = k.shape, pages.format
    assert f.k == f.v == 16 and f.head_dim == d and k.dtype == v.dtype and k.dtype.itemsize == 2 and k.stride(-1) == v.stride(-1) == 1
    store_kernel[(b * h, triton.cdiv(n, BLOCK))](
        k, v, pages.pool.view(k.dtype), pages.table, starts, counts, *k.stride()[:3], *v.stride()[:3], h, pages.table.stride(0),
        D=d, PAGE=PAGE, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
