"""Attention of a few queries over vectors kept as they are: sinks, window and the new tokens of a decode step, in plain Triton.

One program takes one block of 64 slots of one KV head and gives a partial of its own, so that a short tier keeps a whole GPU busy and
no program waits for another. There is no schedule: a block that nobody sees costs a program, not a read.

    q [B, Hq, T, D]    k, v [B, H, S, D]    seen [B or 1, T or 1, S] bool    all with any strides, but unit stride in D
    out [B * H, E, R, D] float32    lse2 [B * H, E, R] float32    E = ceil(S / 64) blocks, R = G * T query rows in the order (g, t)

Logits are in base 2: `lse2` is the base-2 logarithm of the sum of 2^(logit * log2(e)), -inf where a query sees nothing of a block;
`out` is then 0. What no query of a row sees is not read. Merging is not done here.

Products are of TF32 numbers, summed in float32. A TF32 number has the range of bfloat16 and the mantissa of float16, so that vectors
of 16 bits are taken as they are; their weights are rounded. Vectors of 32 bits take three products and keep float32 precision.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstack.kernels.portable import ROWS, tanh

BLOCK = 64


def attend_exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Partials `(out [B * H, E, R, D], lse2 [B * H, E, R])` of `q [B, Hq, T, D]` over the slots of `k, v [B, H, S, D]`.

    q, k, v: floats of 16 or 32 bits. seen: `[B or 1, T or 1, S]` bool, true where a query sees a slot; a slot that no query of its row
    sees may hold anything. softcap: logits become softcap * tanh(logits / softcap).
    """
    (batch, heads, slots, head_dim), (_, q_heads, steps, _) = k.shape, q.shape
    rows, blocks = q_heads // heads * steps, triton.cdiv(slots, BLOCK)
    assert v.shape == k.shape and q.shape[-1] == head_dim and q_heads % heads == 0 and head_dim in (64, 128, 256)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and seen.dtype == torch.bool
    seen = seen.expand(batch, steps, slots)
    out = torch.empty(batch * heads, blocks, rows, head_dim, dtype=torch.float32, device=q.device)
    lse2 = torch.empty(batch * heads, blocks, rows, dtype=torch.float32, device=q.device)
    short = max(x.dtype.itemsize for x in (q, k, v)) == 2
    precision = "ieee" if torch.version.hip else "tf32" if short else "tf32x3"  # AMD's matrix units take float32
    if slots:
        exact_kernel[(batch * heads, blocks, triton.cdiv(rows, ROWS))](
            q, k, v, seen, out, lse2, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *seen.stride(),
            heads, steps, rows, slots, scale * math.log2(math.e), 0.0 if softcap is None else softcap * math.log2(math.e),
            M=ROWS, D=head_dim, BLOCK=BLOCK, CAPPED=softcap is not None, SHORT=short, PRECISION=precision,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return out, lse2


@triton.jit
def exact_kernel(
    q, k, v, seen, out, lse2, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, seen_b, seen_t, seen_s,
    heads, steps, rows, slots, scale, cap,
    M: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, SHORT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of one KV head of `attend_exact`. M: query rows of a program. x_y: stride of x in y. scale, cap: in base 2."""
    segment = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    b, h = segment // heads, segment % heads
    row, column = tl.program_id(2) * M + tl.arange(0, M), tl.arange(0, D)
    slot = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    t = row % steps
    real = row < rows

    at = b * seen_b + (t * seen_t)[:, None] + (slot * seen_s)[None, :]
    sees = tl.load(seen + at, mask=real[:, None] & (slot < slots)[None, :], other=0) != 0
    wanted = (tl.max(sees.to(tl.int32), 0) > 0)[:, None]
    at = b * q_b + ((h * (rows // steps) + row // steps) * q_h + t * q_t)[:, None] + column[None, :]
    query = tl.load(q + at, mask=real[:, None], other=0.0).to(tl.float32)
    keys = tl.load(k + b * k_b + h * k_h + (slot * k_s)[:, None] + column[None, :], mask=wanted, other=0.0).to(tl.float32)
    values = tl.load(v + b * v_b + h * v_h + (slot * v_s)[:, None] + column[None, :], mask=wanted, other=0.0).to(tl.float32)

    x = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
    if CAPPED:
        x = cap * tanh(x / cap)
    x = tl.where(sees, x, float("-inf"))
    top = tl.max(x, 1)
    some = top > float("-inf")
    weight = tl.exp2(x - tl.where(some, top, 0.0)[:, None])
    if SHORT:
        weight = weight.to(tl.float16).to(tl.float32)  # to the nearest: as TF32 it would be cut off
    mass = tl.where(some, tl.sum(weight, 1), 1.0)
    mean = tl.dot(weight, values, input_precision=PRECISION) / mass[:, None]
    to = (segment * tl.num_programs(1) + block) * rows + row
    tl.store(lse2 + to, top + tl.log2(mass), mask=real)
    tl.store(out + to[:, None] * D + column[None, :], mean, mask=real[:, None])
