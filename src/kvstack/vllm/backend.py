"""The attention backend: how large a page is, and which page every layer has.

vLLM hands a layer `[blocks, H, 128, bytes]` int8; with heads outside of tokens a block of one head is one page of `kernels.pages`, so
the record of a token-head is a page's bytes over 128, exactly. A layer's page depends on its precision, and vLLM asks a class and not a
layer, so each precision has a subclass of its own (`of`), which `assign` gives to the layers once their weights are there.

Layers with a sliding window keep what vLLM has for them. It chooses a backend by name before it says of which kind a layer is, so each
name has a subclass too (`named`), which stands aside for such a layer. All pages of a model must be equally large, and vLLM's hold 16
bits a number: so that not ours are padded, its pages get the number of tokens that fits into one of ours.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, MultipleOf, subclass_attention_backend_with_overrides
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout, SlidingWindowSpec

from kvstack.codecs.base import Precision
from kvstack.errors import RecipeError, UnsupportedModelError
from kvstack.kernels.decode import Path
from kvstack.kernels.pages import PAGE
from kvstack.vllm import choice
from kvstack.vllm.choice import own, wanted
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
    stands_for: ClassVar[str | None] = None

    @staticmethod
    def get_name() -> str:
        """See vLLM: a member of its enumeration."""
        return "CUSTOM"

    @classmethod
    def get_impl_cls(cls) -> Any:
        """See vLLM: of any layer with the name that we stand for."""
        from kvstack.vllm.impl import Impl, or_windowed

        return Impl if cls.stands_for is None else or_windowed(own(cls.stands_for))

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
        """See vLLM. A layer with a sliding window gets vLLM's own backend; what we cannot do for others is an error, since vLLM would
        fall back.

        Raises UnsupportedModelError.
        """
        if kwargs.get("has_sliding_window") and cls.stands_for is not None:
            return own(cls.stands_for).validate_configuration(*args, **kwargs)  # type: ignore[no-any-return]
        if reasons := super().validate_configuration(*args, **kwargs):
            raise UnsupportedModelError(f"kvstack cannot serve this model: {'; '.join(reasons)}. Take away the recipe.")
        return []

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """See vLLM: the bytes of a token-head. Raises UnsupportedModelError where no layer was there to `assign` backends."""
        if isinstance(spec, SlidingWindowSpec):
            raise UnsupportedModelError("All layers of this model have sliding windows: nothing is saved. Take away the recipe.")
        if cls.precision is None or spec.state_content_bytes is not None or not isinstance(spec, FullAttentionSpec):
            return spec
        spec = replace(spec, state_content_bytes=layout(cls.precision, spec.head_size, spec.dtype).nbytes // PAGE, dtype=torch.int8)
        return spec if cls.plan is None else SelectionSpec.of(spec, cls.plan, cls.in_flight)


@cache
def named(name: str) -> type[Backend]:
    """The backend of layers for which vLLM would take its own of a name. On GPUs it looks the class up once more, by its path."""
    fixed = {"stands_for": name, "__module__": choice.__name__, "__qualname__": name}
    return subclass_attention_backend_with_overrides(name, Backend, fixed)  # type: ignore[no-any-return]


@cache
def of(precision: Precision, plan: Plan | None, in_flight: int) -> type[Backend]:
    """The backend of layers with this precision and plan. Layers of one class share what is prepared for a step."""
    fixed = {"precision": precision, "plan": plan, "in_flight": in_flight}
    return subclass_attention_backend_with_overrides(repr(precision), Backend, fixed)  # type: ignore[no-any-return]


def assign() -> Settings:
    """Give every full-attention layer of the model at hand the backend of its precision, and those with sliding windows vLLM's; again
    does nothing more.

    Raises RecipeError for layers that there are not, for precisions without a page, and for what cannot be beside sliding windows.
    """
    config = get_current_vllm_config()
    settings = wanted(config)
    assert settings is not None, "our layers are there because of a recipe"
    layers = get_layers_from_vllm_config(config, Attention)
    ours = {extract_layer_index(n): x for n, x in layers.items() if issubclass(x.attn_backend, Backend) and x.sliding_window is None}
    windowed = [layer for layer in layers.values() if layer.sliding_window is not None]
    selection = settings.recipe.selection
    plan = None if selection is None else Plan(selection.budget, selection.interval)
    for i, layer in ours.items():
        layout(settings.precision(i), layer.head_size, layer.kv_cache_torch_dtype)
        layer.attn_backend = of(settings.precision(i), plan, config.max_in_flight_tokens)
    for layer in windowed:
        if issubclass(layer.attn_backend, Backend):
            layer.attn_backend = own(layer.attn_backend.stands_for)
    if windowed:
        config.cache_config.skip_page_size_padded = _page_beside_windows(settings, ours, windowed)
    start, end = config.model_config.get_layers_start_end_indices(config.parallel_config)
    others = {*range(start), *range(end, config.model_config.get_total_num_hidden_layers())}  # which other processes have
    if missing := sorted(set(settings.layers) - set(ours) - others):
        raise RecipeError(f"{settings.source}: the model has no full-attention layers {missing} to give other precisions to.")
    return settings


def _page_beside_windows(settings: Settings, ours: dict[int, Any], windowed: Sequence[Any]) -> int:
    """Bytes of a page of our layers, all of one size, in which those with windows find room for as many tokens as fit."""
    if settings.recipe.selection is not None:
        raise RecipeError(f"`{settings.recipe}` evicts tokens, and this model has sliding windows. Use the precision alone.")
    sizes = {
        int(layout(settings.precision(i), layer.head_size, layer.kv_cache_torch_dtype).nbytes * layer.num_kv_heads)
        for i, layer in ours.items()
    }
    if len(sizes) > 1:
        raise RecipeError(f"{settings.source}: beside sliding windows all pages have one size. Give all layers the same bits.")
    page = sizes.pop()
    for layer in windowed:
        token = 2 * layer.num_kv_heads * layer.head_size * layer.kv_cache_torch_dtype.itemsize
        fewest = min(s.base if isinstance(s, MultipleOf) else s for s in layer.attn_backend.get_supported_kernel_block_sizes())
        if fewest * token > page:
            raise RecipeError(
                f"`{settings.recipe}`: vLLM's pages of sliding windows have {fewest} tokens or more, {fewest * token} bytes, "
                f"and pages of other layers would have {page}. Use more bits."
            )
    return page


def tell(settings: Settings, config: Any, path: Path) -> None:
    """Say in one line what is served, once the cache is there."""
    layers = get_layers_from_vllm_config(config, Attention).values()
    ours = [layer for layer in layers if issubclass(layer.attn_backend, Backend)]
    stored = sum(layer.kv_cache[0].nbytes for layer in ours) / PAGE
    held = {layer.kv_cache.data_ptr(): layer.kv_cache.nbytes for layer in ours}  # beside windows, groups of layers share what there is
    tokens = int(sum(held.values()) / stored)
    exact = sum(2 * layer.num_kv_heads * 2 * layer.head_size for layer in ours)
    logger.info(
        "kvstack %s: %s (%s) in %d of %d layers, %.0f bytes a token, %.2fx smaller than in 16 bits; %s tokens fit%s. %s kernel: %s.",
        version("kvstack"), settings.recipe, settings.source, len(ours), len(layers), stored, exact / stored, f"{tokens:,}",
        ", less what windows take" if len(ours) < len(layers) else "", path.name,
        path.reason,
    )  # fmt: skip
