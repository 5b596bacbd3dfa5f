"""The attention backend: how large a page is, and which page every layer has.

vLLM hands a layer `[blocks, H, 128, bytes]` int8; with heads outside of tokens a block of one head is one page of `kernels.pages`, so
the record of a token-head is a page's bytes over 128, exactly. A layer's page depends on its precision, and vLLM asks a class and not a
layer, so each precision has a subclass of its own (`of`), which `assign` gives to the layers once their weights are there.
"""

from dataclasses import replace
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, subclass_attention_backend_with_overrides
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from kvstack.codecs.base import Precision
from kvstack.errors import RecipeError, UnsupportedModelError
from kvstack.kernels.decode import Path
from kvstack.kernels.pages import PAGE
from kvstack.vllm.choice import wanted
from kvstack.vllm.selection import Plan, SelectionSpec
from kvstack.vllm.settings import Settings, layout

logger = init_logger("vllm.kvstack")  # below vLLM's own logger, so that its handlers print it


class Backend(AttentionBackend):  # type: ignore[misc]
    """Pages of codes. precision: of the layers that have this class. plan: of evictions, or None. in_flight: see `SelectionSpec`."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]
    precision: ClassVar[Precision | None] = None
    plan: ClassVar[Plan | None] = None
    in_flight: ClassVar[int] = 0

    @staticmethod
    def get_name() -> str:
        """See vLLM: a member of its enumeration."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        """See vLLM."""
        from kvstack.vllm.impl import Impl

        return Impl

    @staticmethod
    def get_builder_cls() -> Any:
        """See vLLM."""
        from kvstack.vllm.steps import Builder

        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """See vLLM."""
        return [PAGE]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """See vLLM: layer, block, head, token, content."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """See vLLM: chunks are cut by the host's numbers."""
        return False

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """See vLLM. A layer with a sliding window gets another backend; whatever else we cannot do is an error, since vLLM would fall
        back.

        Raises UnsupportedModelError.
        """
        reasons: list[str] = super().validate_configuration(*args, **kwargs)
        others = [r for r in reasons if r != "sliding window not supported"]
        if others:
            raise UnsupportedModelError(f"kvstack cannot serve this model: {'; '.join(others)}. Take away the recipe.")
        return reasons

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """See vLLM: the bytes of a token-head."""
        if cls.precision is None or spec.state_content_bytes is not None or not isinstance(spec, FullAttentionSpec):
            return spec
        spec = replace(spec, state_content_bytes=layout(cls.precision, spec.head_size, spec.dtype).nbytes // PAGE, dtype=torch.int8)
        return spec if cls.plan is None else SelectionSpec.of(spec, cls.plan, cls.in_flight)


@cache
def of(precision: Precision, plan: Plan | None, in_flight: int) -> type[Backend]:
    """The backend of layers with this precision and plan. Layers of one class share what is prepared for a step."""
    fixed = {"precision": precision, "plan": plan, "in_flight": in_flight}
    return subclass_attention_backend_with_overrides(repr(precision), Backend, fixed)  # type: ignore[no-any-return]


def assign() -> Settings:
    """Give every full-attention layer of the model at hand the backend of its precision, and say so; again does nothing more.

    Raises RecipeError for layers that there are not, and for precisions without a page.
    """
    config = get_current_vllm_config()
    settings = wanted(config)
    assert settings is not None, "our layers are there because of a recipe"
    ours = {
        extract_layer_index(name): layer
        for name, layer in get_layers_from_vllm_config(config, Attention).items()
        if issubclass(layer.attn_backend, Backend)
    }
    selection = settings.recipe.selection
    plan = None if selection is None else Plan(selection.budget, selection.interval)
    for i, layer in ours.items():
        layout(settings.precision(i), layer.head_size, layer.kv_cache_torch_dtype)
        layer.attn_backend = of(settings.precision(i), plan, config.max_in_flight_tokens)
    if missing := sorted(set(settings.layers) - set(ours)):
        raise RecipeError(f"{settings.source}: the model has no full-attention layers {missing} to give other precisions to.")
    return settings


def tell(settings: Settings, config: Any, path: Path) -> None:
    """Say in one line what is served, once the cache is there."""
    layers = get_layers_from_vllm_config(config, Attention).values()
    ours = [layer for layer in layers if issubclass(layer.attn_backend, Backend)]
    tokens = ours[0].kv_cache.shape[0] * PAGE
    stored = sum(layer.kv_cache[0].nbytes for layer in ours) / PAGE
    exact = sum(2 * layer.num_kv_heads * 2 * layer.head_size for layer in ours)
    logger.info(
        "kvstack %s: %s (%s) in %d of %d layers, %.0f bytes a token, %.2fx smaller than in 16 bits; %s tokens fit. %s kernel: %s.",
        version("kvstack"), settings.recipe, settings.source, len(ours), len(layers), stored, exact / stored, f"{tokens:,}", path.name,
        path.reason,
    )  # fmt: skip
