"""The attention function and the mask that transformers calls under the name "kvstack".

A full-attention layer of a kvstack cache hands over a `Fresh` in place of a key tensor: new keys and values, not yet stored, and their
store. Storing happens here and not in the cache's `update`, because only here is it known which tokens are padding. Such a layer says
how many tokens it has seen in `Slots`, and gets the 2-D padding mask `[B, slots]` or None; causality is the store's business.

For all else (sliding layers, other caches, no cache) mask and attention are transformers' own SDPA ones, and with soft-capped logits or
learned sinks, which SDPA lacks, the reference. It is for inference: no gradient reaches stored keys and values.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, flash_attention_mask, sdpa_mask

from kvstack.cache.static import StaticStore
from kvstack.cache.store import LayerStore, Prefill
from kvstack.codecs.exact import ExactCodec
from kvstack.errors import BadInputError, UnsupportedModelError
from kvstack.kernels.reference import RecordLogits, Shape, Side, attend, merge

NAME = "kvstack"


class Slots(int):
    """Tokens that a compressed layer has seen with those on their way: a length that tells the mask whose it is."""


@dataclass(frozen=True)
class Fresh:
    """New keys and values `[B, H, T, D]` on their way to `store`; `layer` is for messages. Models must hand it on untouched."""

    key: Tensor
    value: Tensor
    store: LayerStore | StaticStore
    prefill: Prefill
    layer: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the new keys, for models that look at it."""
        return self.key.shape

    def __getattr__(self, name: str) -> Any:
        if hasattr(Tensor, name):
            raise UnsupportedModelError(f"This model computes with cached keys itself (`{name}`), so they cannot be compressed.")
        raise AttributeError(name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", function)
        raise UnsupportedModelError(f"This model computes with cached keys itself (`{name}`), so they cannot be compressed.")


def attention(
    module: Any,
    query: Tensor,
    key: Tensor | Fresh,
    value: Tensor | Fresh,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    record_logits: RecordLogits | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention `[B, T, Hq, D]` of `query [B, Hq, T, D]`; see the module. record_logits: of modules that cache no keys but latents.

    Raises BadInputError for NaN or Inf, for masks that the store cannot follow and for dropout, UnsupportedModelError for a layer that
    needs another mask than a causal one.
    """
    shape = Shape(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, record_logits)
    if isinstance(key, Fresh):
        if kwargs.get("sliding_window") is not None:
            raise UnsupportedModelError(f"Layer {key.layer} has a sliding window that its cache does not know. Use another model.")
        if dropout:
            raise BadInputError("A compressed cache is for inference. Call model.eval().")
        try:
            if isinstance(key.store, StaticStore):
                out = key.store.attend(query, key.key, key.value, shape, s_aux)
            else:
                valid = _valid(attention_mask, key, key.store)
                out = key.store.attend(query, key.key, key.value, shape, valid=valid, prefill=key.prefill, sink=s_aux)
        except BadInputError as e:
            raise BadInputError(f"Layer {key.layer}: {e}") from e
        return out.to(query.dtype).transpose(1, 2).contiguous(), None
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=shape.scale, dropout=dropout, **kwargs
        )
    assert isinstance(value, Tensor)
    if attention_mask is None:
        t, n = query.shape[2], key.shape[2]
        seen = torch.ones(1, t, n, dtype=torch.bool, device=key.device).tril(n - t)
    else:
        seen = attention_mask[:, 0]
    k, v = (Side(ExactCodec(x.shape[-1], x.dtype), (x,)) for x in (key, value))
    out = merge([attend(query, k, v, seen, shape)], s_aux).out
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _valid(mask: Tensor | None, fresh: Fresh, store: LayerStore) -> Tensor | None:
    """`[B, T]` bool, false for padding among the new tokens; None when there is none."""
    if mask is None:
        return None
    if mask.ndim != 2:
        raise BadInputError("kvstack takes padding masks [B, tokens], not 4-D attention masks. Pass the mask that the tokenizer gives.")
    t = fresh.key.shape[2]
    if not torch.equal(mask[:, :-t].sum(1).cpu(), store.lengths):
        raise BadInputError("The mask hides tokens that are cached already. Use a new cache, or pass the mask that they came with.")
    valid = mask[:, -t:].bool()
    return None if bool(valid.all()) else valid


def _mask(*, kv_length: int, **kwargs: Any) -> Tensor | None:
    """See the module."""
    if not isinstance(kv_length, Slots):
        return sdpa_mask(kv_length=kv_length, **kwargs)  # type: ignore[no-any-return]
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise UnsupportedModelError(
            "This model's full-attention layers need another mask than a causal one; they cannot be compressed."
        )
    return flash_attention_mask(kv_length=kv_length, **kwargs)  # type: ignore[no-any-return]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
