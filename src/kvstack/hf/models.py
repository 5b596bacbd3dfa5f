"""Which transformers models can be cached, and what of them the store must know.

A model is supported when its cache holds keys and values of full-attention layers, turned by RoPE, or of sliding-window layers. Sliding
layers keep transformers' own cache: their window is short and stays exact. Everything else is refused by name.
"""

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvstack.errors import BadInputError, UnsupportedModelError

REMEDY = "Use a decoder with RoPE and MHA, GQA or MQA attention, such as Llama, Qwen3, Mistral or Gemma."


def check(model: Any) -> None:
    """Raise UnsupportedModelError, saying why, when the keys and values of `model` cannot be cached by kvstack."""
    config = model.config.get_text_config(decoder=True)
    kind = config.model_type
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder model. {REMEDY}")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise UnsupportedModelError(f"{kind} caches latents (MLA), not keys and values. {REMEDY}")
    if getattr(config, "pool", 0):
        raise UnsupportedModelError(f"{kind} caches entries pooled from several tokens, not keys and values. {REMEDY}")
    if not getattr(config, "rope_parameters", None):
        raise UnsupportedModelError(f"{kind} states no `rope_parameters`: it has no rotary position embedding (RoPE). {REMEDY}")
    if getattr(config, "num_kv_shared_layers", None):
        raise UnsupportedModelError(f"{kind} has layers that read the cache of other layers. {REMEDY}")
    for i, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModelError(f"Layer {i} of {kind} is cached as {type(layer).__name__}, not as keys and values. {REMEDY}")


def use(model: Any, attention: str) -> None:
    """Let `model` call the registered `attention`. Raises UnsupportedModelError when its code has attention of its own."""
    model.set_attn_implementation(attention)
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != attention:
        raise UnsupportedModelError(f"{config.model_type} does not call registered attention functions. {REMEDY}")


def head_dim(model: Any) -> int:
    """Size of a cached key of a head as the config states it. Raises UnsupportedModelError when layers differ."""
    config = model.config.get_text_config(decoder=True)
    try:
        stated = getattr(config, "record_dim", None) or getattr(config, "head_dim", None)
        return int(stated or config.hidden_size // config.num_attention_heads)
    except Exception as e:  # transformers' own error for such configs differs between its versions
        raise UnsupportedModelError(f"The layers of {config.model_type} have heads of different sizes. {REMEDY}") from e


def check_context(model: Any, tokens: int, remedy: str) -> None:
    """Raise BadInputError, ending with `remedy`, when `tokens` do not fit the context that `model` was made for."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise BadInputError(f"{tokens} tokens do not fit the model's context of {context}. {remedy}")
