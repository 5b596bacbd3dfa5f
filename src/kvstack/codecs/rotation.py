"""The random rotation that makes every vector look Gaussian: a signed Hadamard matrix, dense, float32 `[D, D]`, orthonormal.

    R = H . diag(signs)        rotated: y = x @ R^T        back: x = y @ R

H is the Sylvester-Hadamard matrix divided by sqrt(D). Where D is no power of two (80, 96, 192), H is block-diagonal over the largest
power of two that divides D (16, 32, 64), each block with its own signs: orthonormal all the same, but what lives in one block is
spread over that block only. A one-hot vector has up to three times the distortion of theory there, and a vector of one block at D =
80 and 5 bits 17 times.

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
    r = np.kron(np.eye(head_dim // block), h / np.sqrt(block))
    if seed is not None:
        r *= np.where(np.random.PCG64(seed).random_raw(head_dim) >> np.uint64(63), -1.0, 1.0)
    return torch.tensor(r, dtype=torch.float32, device=device)
