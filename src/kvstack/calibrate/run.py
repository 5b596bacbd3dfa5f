"""Run a model on a batch of tokens and watch its attention: queries, keys and values as its attention function gets them.

A batch is `input_ids [B, T]`, or a mapping with `input_ids` and optionally `attention_mask`, both `[B, T]` (1 for real tokens).
Positions count real tokens, so padding on either side changes nothing. The model attends as it did, with an ordinary `DynamicCache`,
and is left as it was. What is made of what is seen is the business of the others in this room.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvstack.errors import BadInputError, UnsupportedModelError
from kvstack.kernels.reference import Shape
from kvstack.rope import REMEDY, Rope, rope_of

NAME = "kvstack-calibrate"
Batch = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Attended:
    """One call of attention: `query [B, Hq, T, D]`, `key, value [B, H, T, D]` after RoPE, of the tokens that are `real [B, T]` at
    `position [B, T]`. sink: learned logits `[Hq]` beside those of the keys, or None."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    shape: Shape
    sink: Tensor | None
    real: Tensor
    position: Tensor
    rope: Rope

    def queries(self) -> Tensor:
        """Queries of real tokens before RoPE, `[N, Hq, D]` float32."""
        return self.rope.unturn(self.query.transpose(1, 2)[self.real], self.position[self.real][:, None])


Take = Callable[[Attended], None]


def unpack(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens `[B, T]` of a batch, and which of them are real, bool, on `device`. Raises BadInputError for other shapes."""
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        raise BadInputError("A batch is `input_ids` [B, T] with an `attention_mask` of the same shape. Stack or pad your sequences.")
    return ids.to(device), (torch.ones_like(ids) if mask is None else mask).to(device).bool()


def run(model: Any, ids: Tensor, real: Tensor, take: Take, layers: Collection[int] | None = None, start: int = 0) -> DynamicCache:
    """The cache after one batch `ids, real [B, T]` whose first real tokens are at position `start`.

    take: gets the attention of `layers`; None: of all full-attention layers. One model at a time: transformers knows attention
    functions by name. Raises UnsupportedModelError when the model does not call registered attention functions, or with something else
    than its heads.
    """
    position = (real.long().cumsum(1) - 1).clamp_min(0) + start
    cache = DynamicCache(config=model.config)
    if layers is None:
        layers = [i for i, layer in enumerate(cache.layers) if not getattr(layer, "is_sliding", False) and hasattr(layer, "keys")]
    inputs = {"input_ids": ids, "attention_mask": real.long(), "position_ids": position}
    with _watch(model, layers, real, position, take):
        model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@contextmanager
def _watch(model: Any, layers: Collection[int], real: Tensor, position: Tensor, take: Take) -> Iterator[None]:
    """While the block runs `model` on one batch, `take` gets the attention of `layers`. See `run`."""
    config = model.config
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    before = {name: part._attn_implementation for name, part in {"": config, **parts}.items()}
    text = config.get_text_config(decoder=True)
    inner, rope, seen = text._attn_implementation, None, set()

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal rope
        if module.layer_idx in layers:
            stored = getattr(module, "stored_form", None)  # of modules that cache something else than they attend with at first
            q, k, v = (query, key, value) if stored is None else stored(query, key, value)
            rope = rope or rope_of(model)  # not before the first layer: a dynamic RoPE has seen the length of the batch then
            if q.shape[-1] != 2 * len(rope.frequency):
                raise UnsupportedModelError(
                    f"Queries of {text.model_type} have {q.shape[-1]} coordinates, and not those of its heads. {REMEDY}"
                )
            scale = kwargs.get("scaling")
            shape = Shape(query.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("softcap"))
            take(Attended(module.layer_idx, q, k, v, shape, kwargs.get("s_aux"), real, position, rope))
            seen.add(module.layer_idx)
        names = inspect.unwrap(type(module).forward).__globals__  # where the model would have looked its own attention up
        own = names["ALL_ATTENTION_FUNCTIONS"].get_interface(inner, names.get("eager_attention_forward"))
        return own(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface.register(NAME, sdpa_attention_forward)  # or transformers would hold the model for ever
    if missing := set(layers) - seen:
        raise UnsupportedModelError(f"Layers {sorted(missing)} of {text.model_type} do not call registered attention. {REMEDY}")
