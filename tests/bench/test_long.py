"""What `bench long` measures, as far as a machine without a GPU can tell: its profile, and caches moved along a generation."""

import pytest
import torch
from families import make

from kvstack.bench.generate import filled, row_bytes
from kvstack.bench.long import RECIPES, move_to, random_profile
from kvstack.hf.static import StaticCache
from kvstack.recipe import Recipe

torch.set_num_threads(1)


def test_the_profile_is_one_of_the_model() -> None:
    model = make("qwen3-128").bfloat16()
    profile = random_profile(model)
    profile.check(model)
    assert profile.query_norm.shape == (2, 4, 64) and float(profile.concentration().max()) < 0.7


@pytest.mark.parametrize("recipe", ["tri(200, interval=32)+polar4(window=16, sinks=4)", "tri(200)+bf16", "polar4(window=16, sinks=4)"])
@torch.inference_mode()
def test_a_cache_moves_along_a_generation(recipe: str) -> None:
    """Its body holds what an eviction leaves, or everything, and fills up to the next eviction and no further."""
    torch.manual_seed(0)
    model, parsed = make("qwen3-128").bfloat16(), Recipe.parse(recipe)
    cache = StaticCache(model, parsed, 2, 500, random_profile(model))
    loop = filled(model, cache, 2, 64, 60)
    near = parsed.window + parsed.sinks
    for length in (64, 300, 420):
        move_to(cache, length)
        held = length - near if parsed.selection is None else min(length, 200) - near
        assert cache.steps.body.tolist() == [held] * 2
        loop.step()
        assert cache.steps.body.tolist() == [held + 1] * 2 and cache.steps.lengths.tolist() == [length + 1] * 2
        if parsed.selection is not None:
            cache.evict()
            assert cache.steps.body.tolist() == [min(held + 1, 200 - near)] * 2
    assert loop.at.tolist() == [[4]] * 2


def test_bytes_depend_on_the_budget_and_not_on_the_length() -> None:
    model = make("qwen3-128").bfloat16()
    profile = random_profile(model)
    small, large = (row_bytes(model, Recipe.parse(f"tri({n})+polar4"), 4000, profile) for n in (256, 1024))
    assert small == row_bytes(model, Recipe.parse("tri(256)+polar4"), 8000, profile) and large == pytest.approx(3 * small, rel=0.01)


def test_the_recipes_can_be_parsed() -> None:
    assert all(Recipe.parse(text) for text in RECIPES)
