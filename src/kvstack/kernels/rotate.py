"""The signed Hadamard rotation inside kernels, and the kernel that moves queries into a codec's rotated space.

A rotation of a power-of-two size is R = H . diag(signs) / sqrt(D) (`codecs.rotation`), so kernels need only the signs: the product
with H takes log2(D) steps of additions, and no matrix is read. Rows are independent; nothing here knows of caches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.codecs.rotation import rotation
from kvstack.errors import RecipeError


@triton.jit
def hadamard(x, ROWS: tl.constexpr, D: tl.constexpr, LOG2_D: tl.constexpr):
    """`x [ROWS, D]` times the Sylvester-Hadamard matrix, not normalised.

    Every step replaces neighbours by their sum and difference, and moves the sums to the front: after log2(D) steps every index bit has
    been used once and is back in its place.
    """
    for _ in tl.static_range(LOG2_D):
        a, b = tl.split(tl.reshape(x, [ROWS, D // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [ROWS, D])
    return x


@triton.jit
def _project(
    q_ptr,
    signs_ptr,  # [D]
    centre_ptr,  # [H, D]
    out_ptr,  # [M, D] float32
    bias_ptr,  # [M]
    M,
    HQ,
    T,
    G,
    factor,
    stride_b,
    stride_h,
    stride_t,
    D: tl.constexpr,
    LOG2_D: tl.constexpr,
    ROWS: tl.constexpr,
    ROTATE: tl.constexpr,
    CENTRE: tl.constexpr,
):
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    b, h, t = m // (HQ * T), m // T % HQ, m % T
    inside = m < M
    at = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + t.to(tl.int64) * stride_t
    x = tl.load(q_ptr + at[:, None] + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32) * factor
    bias = tl.zeros([ROWS], tl.float32)
    if CENTRE:
        bias = tl.sum(x * tl.load(centre_ptr + (h // G)[:, None] * D + d[None, :]), 1)
    tl.store(bias_ptr + m, bias, mask=inside)
    if ROTATE:
        x = hadamard(x * tl.load(signs_ptr + d)[None, :], ROWS, D, LOG2_D)
    tl.store(out_ptr + m[:, None].to(tl.int64) * D + d[None, :], x, mask=inside[:, None])


def signs(codec: Codec) -> Tensor | None:
    """The signs `[D]` float32 of a codec's rotation, divided by sqrt(D); None for a codec that does not rotate.

    Raises RecipeError when its transform is no signed Hadamard matrix.
    """
    if codec.transform is None:
        return None
    first = codec.transform[0]
    plain = rotation(first.shape[0], None, first.device)
    if codec.transform.shape != plain.shape or not torch.equal(plain * first.sign(), codec.transform):
        raise RecipeError("Kernels know no other rotation than a signed Hadamard matrix. Use a `polar` codec, or the torch path.")
    return first.contiguous()


def project(q: Tensor, signs: Tensor | None, centre: Tensor | None, factor: float, heads: int) -> tuple[Tensor, Tensor]:
    """Queries `[B, Hq, T, D]` times `factor`, rotated, `[B * H, R, D]` float32, and their products with `centre`, `[B * H, R]`.

    R = Hq / H * T. signs: of `signs`. centre: `[H, D]` float32 or None for zero.
    """
    b, hq, t, d = q.shape
    rows = hq // heads * t
    out = torch.empty(b * heads, rows, d, dtype=torch.float32, device=q.device)
    bias = torch.empty(b * heads, rows, dtype=torch.float32, device=q.device)
    assert q.stride(-1) == 1
    m, block = b * hq * t, 4
    _project[(triton.cdiv(m, block),)](
        q, q if signs is None else signs, q if centre is None else centre, out, bias, m, hq, t, hq // heads, factor, *q.stride()[:3],
        D=d, LOG2_D=d.bit_length() - 1, ROWS=block, ROTATE=signs is not None, CENTRE=centre is not None, num_warps=4,
    )  # fmt: skip
    return out, bias
