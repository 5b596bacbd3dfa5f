"""`kvstack.generate` says what `model.generate` says with the caches that it replaces."""

import pytest
import torch
from families import FAMILIES, VOCABULARY

from kvstack import Cache
from kvstack.calibrate import calibrate
from kvstack.errors import BadInputError, RecipeError, UnsupportedModelError
from kvstack.hf.generate import Choice, generate


def model_of(name):
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    model.generation_config.eos_token_id = None  # the end of a row is tested by itself
    return model


def prompts(batch, tokens, seed=1):
    torch.manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, tokens))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, : 7 * row], mask[row, : 7 * row] = 0, 0
    return ids, mask


def theirs(model, ids, mask, cache, n):
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=n, do_sample=False)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("name", ["llama", "qwen2-bias", "qwen3-128", "mistral-full"])
def test_exact_is_what_transformers_generates(name):
    model, (ids, mask) = model_of(name), prompts(3, 40)
    assert torch.equal(generate(model, ids, mask, recipe="exact", max_new_tokens=12).tokens, theirs(model, ids, mask, None, 12))


@pytest.mark.parametrize(
    "recipe", ["polar4", "polar3(window=16, sinks=4)", "k4v2(window=5, sinks=0, scale=unbiased)", "fp8(window=8, sinks=2)"]
)
def test_compressed_is_what_the_flexible_cache_generates(recipe):
    model, (ids, mask) = model_of("qwen3-128"), prompts(3, 150)
    mine = generate(model, ids, mask, recipe=recipe, max_new_tokens=24).tokens
    for row, prompt, real in zip(mine, ids, mask, strict=True):  # one by one: with padding its sums have another order, and codes flip
        alone = prompt[real.bool()][None]
        assert torch.equal(row[None], theirs(model, alone, torch.ones_like(alone), Cache(model, recipe), 24))


@pytest.mark.parametrize("tier", ["bf16", "bf16(window=4, sinks=2)"])
@pytest.mark.parametrize("scorer", ["tri", "knorm", "keydiff", "streaming"])
def test_evicting_is_what_the_flexible_cache_does(scorer, tier):
    model, (ids, mask) = model_of("qwen3-128"), prompts(3, 150)
    profile = calibrate(model, [ids[:1]])
    recipe = f"{scorer}(24, interval=8)+{tier}"
    mine = generate(model, ids, mask, recipe=recipe, max_new_tokens=44, profile=profile)
    for row, prompt, real in zip(mine.tokens, ids, mask, strict=True):
        alone = prompt[real.bool()][None]
        assert torch.equal(row[None], theirs(model, alone, torch.ones_like(alone), Cache(model, recipe, profile=profile), 44))
    whole = generate(model, ids, mask, recipe=tier, max_new_tokens=44)
    assert mine.nbytes < 0.72 * whole.nbytes, "a page of 128 tokens a row instead of 196 slots"


def test_selections_that_a_graph_cannot_follow_are_refused():
    model, (ids, _) = model_of("qwen3-128"), prompts(1, 20)
    for recipe, why in {
        "snapkv(64)+polar4": "more than keys and values",
        "knorm(24, heads=pooled)+polar4": "heads=separate",
        "oracle(24)+polar4": "future",
        "tri(24)+polar4": "kvstack calibrate",
    }.items():
        with pytest.raises(RecipeError, match=why):
            generate(model, ids, recipe=recipe, max_new_tokens=2)


def test_prompts_shorter_than_the_sinks_and_the_window():
    model, ids = model_of("qwen3-128"), torch.tensor([[5, 6], [7, 8]])
    recipe = "polar4(window=4, sinks=4)"
    mine = generate(model, ids, recipe=recipe, max_new_tokens=20).tokens
    assert torch.equal(mine, theirs(model, ids, torch.ones_like(ids), Cache(model, recipe), 20))


def test_a_row_ends_at_its_eos_and_is_padded():
    model, (ids, mask) = model_of("llama"), prompts(2, 20)
    free = generate(model, ids, mask, recipe="exact", max_new_tokens=10).tokens
    eos = int(free[0, 3])
    ended = generate(model, ids, mask, recipe="exact", max_new_tokens=10, eos_token_id=eos, pad_token_id=63).tokens
    several = generate(model, ids, mask, recipe="exact", max_new_tokens=10, eos_token_id=[eos, 1000], pad_token_id=63).tokens
    assert torch.equal(several, ended)
    for row, all_of_it in zip(ended, free, strict=True):
        at = (all_of_it == eos).nonzero()
        n = int(at[0]) + 1 if len(at) else len(all_of_it)
        assert torch.equal(row[:n], all_of_it[:n]) and (row[n:] == 63).all()


def test_sampling_draws_from_the_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, -1)
    drawn = Choice(temperature=0.7)(logits).bincount(minlength=4) / 20_000
    p = (logits[0] / 0.7).softmax(0)
    assert (drawn - p).abs().max() < 4 * (p * (1 - p) / 20_000).sqrt().max()
    nucleus = Choice(temperature=0.7, top_p=0.75)(logits).unique().tolist()
    assert nucleus == [2] if p[2] >= 0.75 else nucleus == [1, 2]


def test_the_cache_is_as_small_as_it_says():
    model, (ids, _) = model_of("qwen3-128"), prompts(1, 200)
    exact = generate(model, ids, recipe="exact", max_new_tokens=4)
    small = generate(model, ids, recipe="polar4", max_new_tokens=4)
    assert exact.ratio == pytest.approx(203 / 205 / 2, abs=1e-3)  # the model is in float32, one slot is for the step and one not filled
    assert small.path.startswith("reference" if model.device.type == "cpu" else "portable")
    tokens, record = 203, 2 * (64 + 2)
    assert small.nbytes > tokens * 2 * 2 * record and small.ratio == pytest.approx(tokens * 2 * 2 * 512 / small.nbytes)


def test_bad_input_is_refused():
    model, (ids, mask) = model_of("qwen3-128"), prompts(2, 20)
    with pytest.raises(BadInputError, match="empty"):
        generate(model, ids, torch.zeros_like(mask))
    with pytest.raises(BadInputError, match="mask"):
        generate(model, ids, mask[:, 1:])
    with pytest.raises(BadInputError, match="max_new_tokens"):
        generate(model, ids, mask, max_new_tokens=0)
    with pytest.raises(BadInputError, match="context"):
        generate(model, ids, mask, max_new_tokens=1000)
    with pytest.raises(BadInputError, match="top_p"):
        Choice(top_p=0.0)
    with pytest.raises(RecipeError, match=r"kvstack\.Cache"):
        generate(model, ids, mask, recipe="int4", max_new_tokens=2)
    with pytest.raises(UnsupportedModelError, match="sliding"):
        generate(model_of("gemma2-softcap"), ids, mask)
