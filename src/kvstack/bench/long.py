"""Long generation measured: tokens per second over a whole generation from nothing to `generated` tokens, and the memory that it takes.

    {recipe, context, batch, generated, tokens_per_s, peak_bytes, ms, ms_at, evict_ms, cache_bytes}

A cache that keeps everything grows with the generation, so that its rows must fit at the end and its steps become longer; one that
evicts takes as many rows as its budget allows, and its steps stay the same. Steps are timed in blocks of one eviction interval at
lengths spread evenly over the generation (`ms_at`), eviction included, and `ms` is their mean: of a step of all rows. evict_ms: of one
eviction in all layers. context: tokens at the end, which is `generated`. peak_bytes: of the allocator, weights included, while steps
ran. The model has the shape of a real one and random weights, statistics of queries are random too, and the cache is filled with random
numbers and codes: none of it changes the time of a step.

`endure` makes every step instead, and notes speed and memory on the way; its evictions are in the steps and not timed apart.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvstack.bench.generate import PROMPT, Row, at_most, filled, fitting
from kvstack.fingerprint import fingerprint
from kvstack.hf.generate import PLAIN_STEPS, recorded
from kvstack.hf.static import StaticCache
from kvstack.profile import Profile
from kvstack.recipe import Recipe
from kvstack.rope import rope_of

RECIPES = ("bf16", "tri(3072)", "tri(3072)+polar4", "tri(1024)+polar4", "tri(4096)", "tri(4096)+polar4")
BLOCK = 128  # steps of a block of a recipe that does not evict


def random_profile(model: Any) -> Profile:
    """Random statistics of queries, in the shape of those of `model`."""
    return random_statistics(model.config.get_text_config(), rope_of(model).frequency.float().cpu(), fingerprint(model))


def random_statistics(config: Any, frequency: Tensor, owner: str) -> Profile:
    """Random statistics of queries for models with a transformers `config`. frequency: of its RoPE, `[F]`. owner: a fingerprint."""
    layers, heads, size = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    g = torch.Generator().manual_seed(0)
    real, imaginary = torch.randn(2, layers, heads, size // 2, generator=g)
    zero = torch.zeros(layers, config.num_key_value_heads, size)
    return Profile(zero, zero.clone(), real, imaginary, 1.5 * torch.hypot(real, imaginary), frequency, owner, "random numbers", 0)


def measure(
    model: Any, recipes: Sequence[str], generated: int, points: int, batch: int | None, progress: Callable[[int, int], object]
) -> list[Row]:
    """A row per recipe. points: lengths at which steps are timed. batch: rows of the batch; None for as many as fit into the memory."""
    profile, rows = random_profile(model), []
    for i, text in enumerate(recipes):
        recipe = Recipe.parse(text)
        first = batch or fitting(model, recipe, generated + BLOCK, profile)
        row = at_most(first, batch is None, lambda n, recipe=recipe: _run(model, recipe, n, generated, points, profile))  # type: ignore[misc]
        rows.append({"recipe": text, "context": generated, **row})
        progress(i + 1, len(recipes))
    return rows


@torch.inference_mode()
def _run(model: Any, recipe: Recipe, batch: int, generated: int, points: int, profile: Profile) -> Row:
    block = BLOCK if recipe.selection is None else recipe.selection.interval
    cache = StaticCache(model, recipe, batch, generated + block + PLAIN_STEPS, profile)
    lengths = [round((i + 0.5) * generated / points) for i in range(points)]
    loop = filled(model, cache, batch, lengths[0], points * block + PLAIN_STEPS + 1)
    move_to(cache, lengths[0])
    for _ in range(PLAIN_STEPS):
        loop.step()
    step = recorded(loop.step)
    if recipe.selection is not None:
        cache.evict()  # compiles what it needs
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times, evictions = [], []
    for n in lengths:
        move_to(cache, n)
        began = time.perf_counter()
        for _ in range(block):
            step()
        torch.cuda.synchronize()
        middle = time.perf_counter()
        if recipe.selection is not None:
            cache.evict()
        torch.cuda.synchronize()
        end = time.perf_counter()
        times.append(1e3 * (end - began) / block)
        evictions.append(1e3 * (end - middle))
    ms = sum(times) / len(times)
    evict = {} if recipe.selection is None else {"evict_ms": sum(evictions) / len(evictions)}
    return {
        "batch": batch,
        "generated": generated,
        "tokens_per_s": 1e3 * batch / ms,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "ms": ms,
        "ms_at": dict(zip(map(str, lengths), times, strict=True)),
        **evict,
        "cache_bytes": cache.nbytes,
    }


def move_to(cache: StaticCache, length: int) -> None:
    """Let a filled cache hold what it holds after `length` tokens a row: all of them, or what the last eviction left."""
    steps = cache.steps
    steps.lengths.fill_(length)
    steps.evicted.zero_()
    steps.refresh()
    if cache.recipe.selection is not None:
        steps.evict(cache.layers[0].store.places)


def endure(
    model: Any, recipes: Sequence[str], generated: int, points: int, batch: int | None, progress: Callable[[int, int], object]
) -> list[Row]:
    """Make all steps, and give a row for each of `points` lengths: speed since the last one, and memory. batch: 1 if None."""
    profile, rows = random_profile(model), []
    for i, text in enumerate(recipes):
        for row in _endure(model, Recipe.parse(text), batch or 1, generated, points, profile):
            rows.append({"recipe": text, "context": generated, **row})
        progress(i + 1, len(recipes))
    return rows


@torch.inference_mode()
def _endure(model: Any, recipe: Recipe, batch: int, generated: int, points: int, profile: Profile) -> Iterator[Row]:
    gc.collect()
    torch.cuda.empty_cache()
    cache = StaticCache(model, recipe, batch, generated + PROMPT + PLAIN_STEPS + 1, profile)
    loop = filled(model, cache, batch, PROMPT, generated + PLAIN_STEPS)
    for _ in range(PLAIN_STEPS):
        loop.step()
    step, made = recorded(loop.step), 0
    while made < generated:
        torch.cuda.reset_peak_memory_stats()
        part, began = min(generated // points, generated - made), time.perf_counter()
        for _ in range(part):
            loop.evict_if_due()
            step()
        torch.cuda.synchronize()
        ms, made = 1e3 * (time.perf_counter() - began) / part, made + part
        yield {
            "batch": batch,
            "generated": made,
            "tokens_per_s": 1e3 * batch / ms,
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "ms": ms,
            "cache_bytes": cache.nbytes,
            "allocated_bytes": torch.cuda.memory_allocated(),
        }
