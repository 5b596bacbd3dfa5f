"""The random rotation that makes every vector look Gaussian: a signed Hadamard matrix, dense, float32 `[D, D]`, orthonormal.

    R = H . diag(signs)        rotated: y = x @ R^T        back: x = y @ R

H is the Sylvester-Hadamard matrix divided by sqrt(D). Where D is no power of two (80, 96, 192), H is the Kronecker product of the
Hartley matrix of the odd part (5, 3, 3), cos + sin of 2 pi i j / m over sqrt(m), with the Hadamard matrix of the rest: orthonormal, and
every input reaches every output. The block-diagonal matrix that others use leaves what lives in one block there, at up to 17 times the
distortion (D = 80, 5 bits).

The signs are free and matter: a family of vectors along one row of H would be turned into spikes without them. They are raw
bits of PCG64, whose stream numpy guarantees, so that a saved cache is read with the same rotation years later.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor


@cache
@torch.inference_mode(False)
def rotation(head_dim: int, seed: int | None, device: torch.device) -> Tensor:
    """The rotation `[D, D]` of a seed; None gives all signs +. The same tensor object for the same arguments: do not write to it."""
    block = head_dim & -head_dim
    h = np.ones((1, 1))
    while len(h) < block:
        h = np.block([[h, h], [h, -h]])
    odd = np.arange(head_dim // block)
    angle = 2 * np.pi * np.outer(odd, odd) / len(odd)
    r = np.kron((np.cos(angle) + np.sin(angle)) / np.sqrt(len(odd)), h / np.sqrt(block))
    if seed is not None:
        r *= np.where(np.random.PCG64(seed).random_raw(head_dim) >> np.uint64(63), -1.0, 1.0)
    return torch.tensor(r, dtype=torch.float32, device=device)
