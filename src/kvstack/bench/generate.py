"""Generation measured: tokens per second of a whole model in the decode loop of `kvstack.generate`, at the largest batch that fits.

    {recipe, context, batch, tokens_per_s, peak_bytes, ms, cache_bytes, steps}

The model has the shape of a real one and random weights, and the cache is filled with random numbers and codes instead of prompts,
since neither changes the time of a step. All recipes, the uncompressed one too, run through the same loop, a CUDA graph per step.
ms: of one step of all rows. peak_bytes: of the allocator, weights included. cache_bytes: reserved by the cache.
"""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvstack.bench.own import scramble
from kvstack.hf.generate import PLAIN_STEPS, Choice, DecodeLoop, recorded
from kvstack.hf.static import StaticCache
from kvstack.profile import Profile
from kvstack.recipe import Recipe

Row = dict[str, Any]
RECIPES = ("bf16", "fp8", "polar4(window=128, sinks=4)", "k4v2(window=128, sinks=4)")
PROMPT = 16  # tokens that are read for real, to make the stores
SPARE = 3 << 30  # bytes left to activations and logits

# Shapes by name: configuration class of transformers, and what differs from its defaults.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-8b": (
        "Qwen3",
        dict(
            vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, max_position_embeddings=1 << 20,
        ),
    ),
    "small": (
        "Qwen3",
        dict(
            vocab_size=32000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, head_dim=128, max_position_embeddings=1 << 20,
        ),
    ),
    "llama-3.2-1b": (
        "Llama",
        dict(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, max_position_embeddings=1 << 20, tie_word_embeddings=True,
        ),
    ),
}  # fmt: skip


def random_model(shape: str, device: torch.device) -> Any:
    """A model of a shape of `SHAPES` in bfloat16, with random weights."""
    import transformers

    name, config = SHAPES[shape]
    old = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with device:
            model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config))
    finally:
        torch.set_default_dtype(old)
    return model.eval()


def measure(
    model: Any, recipes: Sequence[str], context: int, steps: int, batch: int | None, progress: Callable[[int, int], object]
) -> list[Row]:
    """A row per recipe. batch: rows of the batch; None for as many as fit into the memory."""
    rows = []
    for i, text in enumerate(recipes):
        recipe = Recipe.parse(text)
        first = batch or fitting(model, recipe, context + steps)
        row = at_most(first, batch is None, lambda n, recipe=recipe: _run(model, recipe, n, context, steps))  # type: ignore[misc]
        rows.append({"recipe": text, "context": context, **row})
        progress(i + 1, len(recipes))
    return rows


def at_most(batch: int, fewer: bool, run: Callable[[int], Row]) -> Row:
    """What `run` gives for `batch` rows; if `fewer`, for as many less as it takes to fit into the memory."""
    while True:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            return run(batch)
        except torch.OutOfMemoryError:
            if batch == 1 or not fewer:
                raise
            batch -= max(1, batch // 16)


@torch.inference_mode()
def _run(model: Any, recipe: Recipe, batch: int, context: int, steps: int) -> Row:
    torch.cuda.reset_peak_memory_stats()
    cache = StaticCache(model, recipe, batch, context + steps + PLAIN_STEPS)
    loop = filled(model, cache, batch, context, steps + PLAIN_STEPS)
    for _ in range(PLAIN_STEPS):
        loop.step()
    step = recorded(loop.step)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps - 1):  # the first one was recorded, and not made
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / (steps - 1)
    return {
        "batch": batch,
        "tokens_per_s": batch / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "ms": 1e3 * seconds,
        "cache_bytes": cache.nbytes,
        "steps": steps - 1,
    }


def filled(model: Any, cache: StaticCache, batch: int, context: int, steps: int) -> DecodeLoop:
    """A loop after `context` tokens a row, of random numbers and codes."""
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device=model.device)
    cache.steps.filling = slice(0, batch)
    position = torch.arange(PROMPT, device=model.device).expand(batch, -1)
    out = model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.steps.filling = None
    for layer in cache.layers:
        for exact in layer.store.exact:
            exact.normal_()
        if layer.store.body is not None:
            scramble(layer.store.body.pages.format, layer.store.body.pages.pool)
    cache.steps.lengths.fill_(context)
    cache.steps.refresh()
    return DecodeLoop(model, cache, out.logits[:, -1], steps + 1, Choice(), (), 0)


def fitting(model: Any, recipe: Recipe, tokens: int, profile: Profile | None = None) -> int:
    """Rows whose cache fits into the free memory, judged by the cache of one row."""
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(model.device)[0] - SPARE
    config = model.config.get_text_config()
    logits = 8 * config.vocab_size  # bf16, and what choosing a token makes of them
    return max(1, int(free / (row_bytes(model, recipe, tokens, profile) + logits)))


def row_bytes(model: Any, recipe: Recipe, tokens: int, profile: Profile | None = None) -> int:
    """Bytes that the cache of one row of `tokens` tokens reserves."""
    cache = StaticCache(model, recipe, 1, tokens, profile)
    with torch.inference_mode():
        cache.steps.filling = slice(0, 1)
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model(input_ids=ids, position_ids=ids, past_key_values=cache, use_cache=True)
    return cache.nbytes
