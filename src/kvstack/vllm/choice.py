"""Which attention backend a layer gets: names that vLLM's registry resolves to classes, anew for every configuration.

vLLM chooses a backend by platform and then looks up its class by a dotted path. `plugin.register` gives it paths into this module for
those that it chooses for full attention, `kvstack.vllm.choice.FLASH_ATTN` and so on. Asked for such a name, the module answers with our
backend when the configuration at hand asks for a recipe, and else with the class that vLLM itself has under this name. Layers with a
sliding window get the latter in any case (`backend.Backend`).
"""

from typing import Any

import vllm
from vllm.config import get_current_vllm_config_or_none
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvstack.errors import KVStackError, UnsupportedModelError
from kvstack.vllm.settings import Settings, read

VERSIONS = ("0.32.",)  # whose internals this was written for and tested with
NAMES = ("FLASH_ATTN", "FLASHINFER", "CPU_ATTN", "CUSTOM")
OTHERS = ("TRITON_ATTN", "FLEX_ATTENTION")  # vLLM's own, for layers with sliding windows only


def wanted(config: Any) -> Settings | None:
    """The settings that a VllmConfig asks for, or None. Raises KVStackError when they cannot be followed with this vLLM or this
    model."""
    if config is None or config.model_config is None:
        return None
    settings = read(config.additional_config, config.model_config.model)
    if settings is None:
        return None
    if not vllm.__version__.startswith(VERSIONS):
        raise KVStackError(
            f"kvstack works with vLLM {', '.join(f'{v}x' for v in VERSIONS)}, and this is {vllm.__version__}. Install one of these "
            f"versions, or take away the recipe ({settings.source})."
        )
    _check(config, settings)
    return settings


def _check(config: Any, settings: Settings) -> None:
    """Raise UnsupportedModelError for models and options that pages of codes do not serve."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    reasons = {
        "latent attention (MLA), whose cache vLLM makes small itself": model.use_mla,
        "an encoder beside its decoder": model.is_encoder_decoder,
        "a cache that is divided along the context (--decode-context-parallel-size)": parallel.decode_context_parallel_size > 1,
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype != "auto",
        f"--block-size {cache.block_size}, and pages hold 128 tokens": cache.user_specified_block_size and cache.block_size % 128,
    }
    if settings.recipe.selection is not None:
        evicted = "which cannot be while tokens are evicted"
        reasons |= {
            f"prefix caching, {evicted} (--no-enable-prefix-caching)": cache.enable_prefix_caching,
            f"speculative decoding, {evicted}": config.speculative_config is not None,
            f"a KV connector, {evicted}": config.kv_transfer_config is not None
            and not config.kv_transfer_config.get_from_extra_config("any_content", False),
        }
    for reason, found in reasons.items():
        if found:
            raise UnsupportedModelError(f"kvstack cannot serve this: {model.model} has {reason}. Remove it, or take away the recipe.")


def _chosen(attention: Any, name: str) -> bool:
    """Whether a backend is asked for by name for layers that would be ours."""
    asked = attention.backend_per_kind.get("full_attention", attention.backend)
    return asked is not None and asked.name == name


def own(name: str) -> Any:
    """The class that vLLM itself has under a name."""
    path = AttentionBackendEnum[name].value
    if path is None:
        raise KVStackError(f"vLLM has no attention backend {name} of its own. Ask for another, or for a recipe.")
    return resolve_obj_by_qualname(path)


def __getattr__(name: str) -> Any:
    if name not in NAMES + OTHERS:
        raise AttributeError(name)
    config = get_current_vllm_config_or_none()
    settings = wanted(config)
    if settings is not None and name in OTHERS and _chosen(config.attention_config, name):
        raise UnsupportedModelError(f"--attention-backend {name} leaves kvstack out. Remove it, or the recipe ({settings.source}).")
    if settings is None or name in OTHERS:
        return own(name)
    from kvstack.vllm.backend import named

    return named(name)
