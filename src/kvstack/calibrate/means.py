"""Means of the keys (after RoPE) and values of every layer and KV head, streamed over batches of tokens.

The model runs as it is, with an ordinary `DynamicCache` per batch, and the cache is read afterwards: nothing is patched. Sums are
float64 `[L, Hkv, D]`; padding does not count. Only full-attention layers are calibrated, the others (sliding windows) stay zero.
One batch must fit in memory with its whole cache.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvstack.errors import BadInputError, UnsupportedModelError
from kvstack.fingerprint import fingerprint
from kvstack.profile import Profile

Batch = Tensor | Mapping[str, Tensor]


@torch.inference_mode()
def calibrate(model: Any, batches: Iterable[Batch], progress: Callable[[int], None] | None = None, source: str = "") -> Profile:
    """The profile of `model` on `batches`.

    A batch is `input_ids [B, T]`, or a mapping with `input_ids` and optionally `attention_mask`, both `[B, T]` (1 for real tokens).
    progress: called after every batch with the number of real tokens so far. source: what the batches are, in words.
    Raises BadInputError when there are no tokens or the keys or values are not finite, and UnsupportedModelError when the
    model does not cache keys and values of one shape in its full-attention layers.
    """
    if isinstance(batches, Tensor | Mapping):
        raise BadInputError("`batches` is a list of batches. Put the one you have into a list.")
    keys: Tensor | None = None
    values: Tensor | None = None
    tokens = 0
    for batch in batches:
        ids, mask = _unpack(batch, model.device)
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        k, v = (_sums(cache, side, mask) for side in ("keys", "values"))
        keys, values = (k, v) if keys is None or values is None else (keys + k, values + v)
        tokens += int(mask.sum())
        if progress is not None:
            progress(tokens)
    if keys is None or values is None or tokens == 0:
        raise BadInputError("There are no tokens to calibrate on. Give at least one batch with real tokens.")
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise BadInputError("The model gives keys or values that are NaN or Inf. Check its weights, or load it in bfloat16 or float32.")
    key_centre, value_centre = ((s / tokens).float().cpu() for s in (keys, values))
    return Profile(key_centre, value_centre, fingerprint(model), source, tokens)


def _unpack(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask `[B, T]` of a batch, on `device`."""
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        raise BadInputError("A batch is `input_ids` [B, T] with an `attention_mask` of the same shape. Stack or pad your sequences.")
    return ids.to(device), (torch.ones_like(ids) if mask is None else mask).to(device)


def _sums(cache: DynamicCache, side: str, mask: Tensor) -> Tensor:
    """Sums over real tokens of the keys or values in the cache, `[L, Hkv, D]` float64; zero where a layer is no full attention."""
    found = [None if getattr(layer, "is_sliding", False) else getattr(layer, side, None) for layer in cache.layers]
    sums = [None if x is None else torch.einsum("bhtd,bt->hd", x.double(), mask.double()) for x in found]
    shapes = {s.shape for s in sums if s is not None}
    if len(shapes) != 1:
        raise UnsupportedModelError("The full-attention layers do not cache keys and values of one shape; they cannot be calibrated.")
    nothing = torch.zeros(*shapes, dtype=torch.float64, device=mask.device)
    return torch.stack([nothing if s is None else s for s in sums])
