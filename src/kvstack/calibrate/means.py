"""Sums of the keys (after RoPE) and values of every layer and KV head, read from a cache that the model has filled.

Sums are float64 `[L, Hkv, D]`. Layers that are no full attention (sliding windows) stay zero.
"""

import torch
from torch import Tensor
from transformers import DynamicCache

from kvstack.errors import UnsupportedModelError


def sums(cache: DynamicCache, side: str, real: Tensor) -> Tensor:
    """Sums `[L, Hkv, D]` float64 of the "keys" or "values" in the cache over the tokens that are `real [B, T]`.

    Raises UnsupportedModelError when the full-attention layers do not cache keys and values of one shape.
    """
    held = [None if getattr(layer, "is_sliding", False) else getattr(layer, side, None) for layer in cache.layers]
    found = [None if x is None else x.transpose(1, 2)[real].sum(0, dtype=torch.float64) for x in held]
    shapes = {s.shape for s in found if s is not None}
    if len(shapes) != 1:
        raise UnsupportedModelError("The full-attention layers do not cache keys and values of one shape; they cannot be calibrated.")
    nothing = torch.zeros(*shapes, dtype=torch.float64, device=real.device)
    return torch.stack([nothing if s is None else s for s in found])
