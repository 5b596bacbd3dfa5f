"""What `bench generate` measures, as far as a machine without a GPU can tell: its models, its filled caches and their bytes."""

import math
from typing import Any

import pytest
import torch
from families import VOCABULARY, make

from kvstack.bench import generate
from kvstack.hf.generate import Choice
from kvstack.hf.static import StaticCache
from kvstack.kernels.pages import PAGE, Format, read
from kvstack.recipe import Recipe

torch.set_num_threads(1)
LAYERS, H, D = 2, 2, 128
POLAR = "k4v2(window=16, sinks=4)"


def model() -> Any:
    return make("qwen3-128").bfloat16()


@pytest.mark.parametrize("tokens", [20, 21, 20 + PAGE, 250])
def test_bytes_of_a_row(tokens: int) -> None:
    """Slots and whole pages; and of 16 bits, which no kernel reads here, slots for everything."""
    m, pages = model(), math.ceil((tokens - 20) / PAGE)
    slots, page = (4 + 16 + 1) * 2 * D * 2, Format(D, 4, 2).nbytes
    assert generate.row_bytes(m, Recipe.parse(POLAR), tokens) == LAYERS * (H * (slots + pages * page) + 4 * pages)
    assert generate.row_bytes(m, Recipe.parse("bf16"), tokens) == LAYERS * H * (tokens + 1) * 2 * D * 2


@pytest.mark.parametrize("recipe", [POLAR, "fp8(window=3, sinks=0)", "bf16"])
@torch.inference_mode()
def test_a_filled_cache_is_random_and_can_be_decoded_from(recipe: str) -> None:
    torch.manual_seed(0)
    m, context, batch = model(), 200, 3
    cache = StaticCache(m, Recipe.parse(recipe), batch, context + 6)
    loop = generate.filled(m, cache, batch, context, 6)
    assert cache.steps.lengths.tolist() == [context] * batch and cache.steps.filling is None
    for layer in cache.layers:
        store = layer.store
        assert all(0.95 < float(x.float().std()) < 1.05 for x in store.exact)
        if store.body is not None:
            k, v, scales = read(store.body.pages)
            if recipe.startswith("fp8"):
                k, v = (x.view(torch.float8_e4m3fn).float() for x in (k, v))
                assert bool(k.isfinite().all() & v.isfinite().all())
            assert bool((scales > 0).all() & (scales < 2).all()) and scales.float().std() > 0.1 * scales.float().mean()
            assert int(store.body.pages.lengths[0]) == context - cache.steps.sinks - cache.steps.window
            assert len(k[0, 0].unique()) > 10 and not torch.equal(k[0], k[1]) and not torch.equal(v[0], v[1])
    for i in range(5):
        loop.step()
        assert cache.steps.lengths.tolist() == [context + i + 1] * batch
    assert loop.tokens.shape == (batch, 7) and bool(((loop.tokens[:, :6] >= 0) & (loop.tokens[:, :6] < VOCABULARY)).all())
    assert loop.choice == Choice() and not loop.done.any() and loop.at.tolist() == [[6]] * batch


@pytest.mark.parametrize(("shape", "billions", "kv_bytes"), [("qwen3-8b", 8.19, 147_456), ("llama-3.2-1b", 1.236, 32_768)])
def test_shapes_are_those_of_real_models(shape: str, billions: float, kv_bytes: int) -> None:
    """Parameters, and bytes of one token's keys and values in bf16, as published."""
    m = generate.random_model(shape, torch.device("meta"))
    config = m.config
    assert sum(p.numel() for p in m.parameters()) == pytest.approx(billions * 1e9, rel=1e-3)
    assert 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim == kv_bytes
    assert m.dtype == torch.bfloat16 and not m.training and torch.get_default_dtype() == torch.float32


def test_the_recipes_can_be_parsed() -> None:
    assert all(Recipe.parse(text) for text in generate.RECIPES)
