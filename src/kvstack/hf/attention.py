"""The attention function and the mask that transformers calls under the name "kvstack".

A full-attention layer of a kvstack cache hands over a `Fresh` in place of a key tensor: new keys and values, not yet stored, and their
store. Storing happens here and not in the cache's `update`, because only here is it known which tokens are padding.
With plain tensors (sliding layers, other caches, no cache) this is ordinary attention.

The registered mask is transformers' 2-D padding mask, `None` or `[B, keys]` bool; causality and sliding windows are made here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from kvstack.cache.store import LayerStore, Prefill
from kvstack.codecs.exact import ExactCodec
from kvstack.errors import BadInputError
from kvstack.kernels.reference import Shape, Side, attend, merge

NAME = "kvstack"


@dataclass(frozen=True)
class Fresh:
    """New keys and values `[B, H, T, D]` on their way to `store`; `layer` is for messages."""

    key: Tensor
    value: Tensor
    store: LayerStore
    prefill: Prefill
    layer: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the new keys, for models that look at it."""
        return self.key.shape


def attention(
    module: Any,
    query: Tensor,
    key: Tensor | Fresh,
    value: Tensor | Fresh,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention `[B, T, Hq, D]` of `query [B, Hq, T, D]`; see the module. Raises BadInputError for 4-D masks and for NaN or Inf."""
    if attention_mask is not None and attention_mask.ndim != 2:
        raise BadInputError("kvstack takes padding masks [B, tokens], not 4-D attention masks. Pass the mask that the tokenizer gives.")
    shape = Shape(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    if isinstance(key, Fresh):
        valid = None if attention_mask is None else attention_mask[:, -query.shape[2] :].bool()
        if valid is not None and bool(valid.all()):
            valid = None
        try:
            out = key.store.attend(query, key.key, key.value, shape, valid=valid, prefill=key.prefill, sink=s_aux)
        except BadInputError as e:
            raise BadInputError(f"Layer {key.layer}: {e}") from e
        return out.to(query.dtype).transpose(1, 2).contiguous(), None
    assert isinstance(value, Tensor)
    mask = _mask(query, key, attention_mask, sliding_window)
    if softcap is None and s_aux is None:
        wide = None if mask is None else mask[:, None]
        return sdpa_attention_forward(module, query, key, value, wide, scaling=shape.scale, dropout=dropout, **kwargs)  # type: ignore[no-any-return]
    if mask is None:
        mask = _causal(query, key, None)[None]
    k, v = (Side(ExactCodec(x.shape[-1], x.dtype), (x,)) for x in (key, value))
    out = merge([attend(query, k, v, mask, shape)], s_aux).out
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _mask(query: Tensor, key: Tensor, padding: Tensor | None, sliding_window: int | None) -> Tensor | None:
    """`[B, T, N]` bool, true where a query sees a key; None where SDPA's own causal attention is the same."""
    t, n = query.shape[2], key.shape[2]
    short = sliding_window is None or n <= sliding_window
    if padding is None and short and t in (1, n):
        return None
    mask = _causal(query, key, None if short else sliding_window)[None]
    if padding is not None:
        # A padded query sees at least itself: a row without any key would be NaN in other implementations.
        mask = (mask & padding[:, None, -n:].bool()) | torch.eye(t, n, dtype=torch.bool, device=key.device).roll(n - t, 1)
    return mask


def _causal(query: Tensor, key: Tensor, sliding_window: int | None) -> Tensor:
    """`[T, N]` bool for queries that are the last T of N tokens."""
    t, n = query.shape[2], key.shape[2]
    ago = torch.arange(n - t, n, device=key.device)[:, None] - torch.arange(n, device=key.device)
    return (ago >= 0) if sliding_window is None else (ago >= 0) & (ago < sliding_window)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, flash_attention_mask)
