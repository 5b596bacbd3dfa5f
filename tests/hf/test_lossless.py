"""Invariant 1: a lossless recipe generates token for token, and logit for logit, what transformers' own cache does, in every way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, make, tokens
from transformers import DynamicCache

from kvstack import Cache

torch.set_num_threads(1)
RECIPES = ["exact", "exact(window=5, sinks=2)"]
STOP = {"eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}

Generate = Callable[[Any, Any], Any]


def greedy(model: Any, cache: Any) -> Any:
    return model.generate(tokens(2, 21), past_key_values=cache, do_sample=False, max_new_tokens=14, **STOP)


def left_padded(model: Any, cache: Any) -> Any:
    ids = tokens(3, 21)
    mask = (torch.arange(21) >= torch.tensor([[0], [6], [17]])).long()
    return model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=14, **STOP)


def sampled(model: Any, cache: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(tokens(2, 9), past_key_values=cache, do_sample=True, temperature=0.9, max_new_tokens=14, **STOP)


def beams(model: Any, cache: Any) -> Any:
    ids = tokens(2, 13)
    mask = (torch.arange(13) >= torch.tensor([[0], [4]])).long()
    return model.generate(ids, attention_mask=mask, past_key_values=cache, num_beams=4, do_sample=False, max_new_tokens=10, **STOP)


def chunked_prefill(model: Any, cache: Any) -> Any:
    return model.generate(tokens(2, 40), past_key_values=cache, prefill_chunk_size=7, do_sample=False, max_new_tokens=10, **STOP)


def multi_turn(model: Any, cache: Any) -> Any:
    first = model.generate(tokens(1, 11), past_key_values=cache, do_sample=False, max_new_tokens=6, **STOP)
    second = torch.cat([first.sequences, tokens(1, 8, seed=1)], 1)
    return model.generate(second, past_key_values=cache, do_sample=False, max_new_tokens=6, **STOP)


def assisted(model: Any, cache: Any) -> Any:
    # Prompt lookup drafts tokens and takes most of them back: crop. The prompt repeats, so that drafts are made.
    ids = tokens(1, 6).repeat(1, 4)
    return model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=4, do_sample=False, max_new_tokens=14, **STOP)


WAYS: dict[str, Generate] = {f.__name__: f for f in (greedy, left_padded, sampled, beams, chunked_prefill, multi_turn, assisted)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_token_for_token(family: str, way: str) -> None:
    model = make(family)
    model.set_attn_implementation("eager")
    expected = WAYS[way](model, DynamicCache(config=model.config))
    truth = torch.stack(expected.logits)
    assert (truth[1:] - truth[:-1]).norm() > 0.01 * truth.norm(), "logits that do not depend on the context show nothing"
    for recipe in RECIPES:
        for prefill in ("exact", "strict"):
            found = WAYS[way](model, Cache(model, recipe, prefill=prefill))  # type: ignore[arg-type]
            assert torch.equal(found.sequences, expected.sequences), (recipe, prefill)
            # A model that repeats a token proves little by its tokens; its logits do.
            assert (torch.stack(found.logits) - truth).norm() < 1e-4 * truth.norm(), (recipe, prefill)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_other_caches_and_none_are_served_as_before(family: str) -> None:
    """The registered attention with plain tensors: no cache, a DynamicCache, padding on either side."""
    model, ids = make(family), tokens(3, 21)
    for mask in (None, torch.arange(21) >= torch.tensor([[0], [6], [17]]), torch.arange(21) < torch.tensor([[21], [6], [17]])):
        model.set_attn_implementation("eager")
        given = None if mask is None else mask.long()
        expected = model(input_ids=ids, attention_mask=given).logits
        Cache(model, "exact")
        for cache in (None, DynamicCache(config=model.config)):
            found = model(input_ids=ids, attention_mask=given, past_key_values=cache).logits
            real = torch.ones(3, 21, dtype=torch.bool) if mask is None else mask
            torch.testing.assert_close(found[real], expected[real], atol=2e-4, rtol=2e-4)


@torch.inference_mode()
def test_half_precision_models() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = make("qwen3-128").to(dtype)
        model.set_attn_implementation("eager")
        expected = model(input_ids=tokens(2, 30)).logits.float()
        cache = Cache(model, "exact(window=5, sinks=2)")
        found = torch.cat([model(input_ids=x, past_key_values=cache).logits for x in tokens(2, 30).split(9, 1)], 1).float()
        assert (found - expected).norm() < 0.05 * expected.norm()
        assert all(t.dtype == dtype for tier in cache.layers[0].store.tiers.values() for side in tier.buffers for t in side)
