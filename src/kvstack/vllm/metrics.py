"""What a server holds, among the numbers of vLLM's `/metrics`: a stat logger that vLLM finds by its entry point.

    kvstack_cache_tokens          tokens that fit
    kvstack_tokens_per_gib        of the cache's memory, of all of this engine's GPUs
    kvstack_ratio                 bytes of the same layers in 16 bits over the bytes that are stored
    kvstack_evicted_tokens_total  tokens that evictions have taken from requests that are finished, counted once and not per head

It sees what the engine reports and no tensors. Without a recipe it does nothing.
"""

from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.v1.metrics.loggers import StatLoggerBase

from kvstack.kernels.pages import PAGE
from kvstack.vllm.selection import Plan
from kvstack.vllm.settings import Settings, layout, read


class Metrics(StatLoggerBase):  # type: ignore[misc]
    """See the module."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.config, self.engine = vllm_config, str(engine_index)
        self.settings = read(vllm_config.additional_config, vllm_config.model_config.model)
        selection = None if self.settings is None else self.settings.recipe.selection
        self.plan = None if selection is None else Plan(selection.budget, selection.interval)

    def log_engine_initialized(self) -> None:
        """See vLLM: the cache is there."""
        if self.settings is None:
            return
        stored, exact = bytes_per_token(self.settings, self.config.model_config)
        cache, windows = self.config.cache_config, "sliding_attention" in _kinds(self.config.model_config)
        fits = cache.kv_cache_size_tokens if windows else (cache.num_gpu_blocks or 0) * PAGE
        for name, value in (("cache_tokens", fits), ("tokens_per_gib", 2**30 / stored), ("ratio", exact / stored)):
            _gauge(name).labels(self.engine).set(value)

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
        """See vLLM: a step is over."""
        if self.plan is not None and iteration_stats is not None:
            for done in iteration_stats.finished_requests:
                came = done.num_prompt_tokens + done.num_generation_tokens - 1  # the last one is never read
                _evicted().labels(self.engine).inc(self.plan.gone(came))


def bytes_per_token(settings: Settings, model: Any) -> tuple[float, float]:
    """Bytes of a token of all full-attention layers as they are stored, and in 16 bits, for a ModelConfig of vLLM."""
    heads, size = model.get_total_num_kv_heads(), model.get_head_size()
    layers = [i for i, kind in enumerate(_kinds(model)) if kind == "full_attention"]
    stored = sum(layout(settings.precision(i), size, model.dtype).nbytes / PAGE * heads for i in layers)
    return stored, float(len(layers) * heads * 2 * size * 2)


def _kinds(model: Any) -> list[str]:
    return getattr(model.hf_text_config, "layer_types", None) or ["full_attention"] * model.get_total_num_hidden_layers()


# Once in a process, whatever engines come and go in it.
@cache
def _gauge(name: str) -> Any:
    text = {"cache_tokens": "Tokens that fit", "tokens_per_gib": "Tokens in a GiB", "ratio": "16-bit bytes over stored bytes"}
    return Gauge(f"kvstack_{name}", text[name], ["engine"], multiprocess_mode="mostrecent")


@cache
def _evicted() -> Any:
    return Counter("kvstack_evicted_tokens", "Tokens evicted from finished requests", ["engine"])
