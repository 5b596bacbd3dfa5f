"""Attention of a decode step over low-rank records (LRKV): by a kernel on a Hopper GPU, elsewhere in torch.

Records, queries and both ways of a residual are described in `lowrank_reference`, which is also what runs where there is no kernel; the
kernel is `lowrank_hopper`. Not here: the projections B_h^T q before and B_h times the mean after, which are one small product each for
all tokens.
"""

from functools import cache

import torch
from torch import Tensor

from kvstack.kernels import lowrank_reference
from kvstack.kernels.decode import choose
from kvstack.kernels.lowrank_reference import Rebuild

HEAD_DIMS = (64, 128, 256)


def has_kernel(q_shared: Tensor, keys: Tensor) -> bool:
    """Whether a kernel serves queries `[B, H, 1, D]` over such records: 16 bits, a Hopper GPU, and a size of heads that it has."""
    return keys.dtype.itemsize == 2 and q_shared.shape[-1] in HEAD_DIMS and _is_hopper(q_shared.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    """Looked up once a device: `choose` searches for packages, and a decode step asks for every layer."""
    return choose(device).name == "hopper"


def lowrank_decode(
    q_shared: Tensor, q_residual: Tensor | Rebuild, keys: Tensor, values: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Means `[B, H, D]` of the shared values and `[B, H, r]` of every head's own residual latents, both in the type of `q_shared`.

    Arguments are those of `lowrank_reference.attend`, which computes it where there is no kernel (`has_kernel`).
    """
    if not has_kernel(q_shared, keys):
        return lowrank_reference.attend(q_shared, q_residual, keys, values, lengths, scale)
    from kvstack.kernels import lowrank_hopper  # needs Triton

    tile = lowrank_hopper.EXACT if isinstance(q_residual, Rebuild) else lowrank_hopper.NOPE
    return lowrank_hopper.attend(q_shared, q_residual, keys, values, lengths, scale, tile)
