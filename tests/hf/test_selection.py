"""Invariant 2: after evictions, logits are those of a full cache in which exactly the evicted tokens are masked.

Which tokens leave is read off the store itself, and replayed by an attention function that masks them for every layer, KV head and
query in a forward of all tokens at once; what lies in the body is encoded and decoded there.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import VOCABULARY, make, tokens
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from kvstack import BadInputError, Cache, RecipeError
from kvstack.cache.store import LayerStore
from kvstack.calibrate import calibrate
from kvstack.codecs.base import Context
from kvstack.profile import Profile
from kvstack.recipe import WORDS, Recipe
from kvstack.scorers.base import Future, Selection

torch.set_num_threads(1)
SCORERS = [word for word, row in WORDS.items() if issubclass(row.build, Selection)]
TIERS = ["exact", "exact(window=5, sinks=2)", "polar4", "polar3(window=6, sinks=3)", "fp8(sinks=1)"]
MODES = ["separate", "shared", "union", "pooled"]
BUDGET, INTERVAL, LENGTH = 24, 8, 88


@pytest.fixture(scope="module")
def model() -> Any:
    return make("qwen3-128")


@pytest.fixture(scope="module")
def profile(model: Any) -> Profile:
    found = calibrate(model, [tokens(2, 60, seed=5)], covariance=True)
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return replace(
        found,
        forecast_hidden=draw(2, 2, 256, 16), forecast_hidden_bias=draw(2, 2, 16), forecast_out=draw(2, 2, 16, 2),
        forecast_out_bias=draw(2, 2, 2), forecast_fit=draw(2, 2, 2),
    )  # fmt: skip


class Diary:
    """When each token left, by layer: `left[layer] [B, H, n]` is the number of tokens that had come then; a large number: never."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Cache, batch: int, length: int) -> None:
        self.cache = cache
        self.left = [torch.full((batch, 2, length), 10**6) for _ in cache.layers]
        plain = LayerStore._keep

        def keep(store: LayerStore, mask: Tensor) -> None:
            layer = next(i for i, layer in enumerate(cache.layers) if layer.store is store)
            self.note(self.left[layer], store, mask)
            plain(store, mask)

        monkeypatch.setattr(LayerStore, "_keep", keep)

    @staticmethod
    def note(left: Tensor, store: LayerStore, mask: Tensor) -> None:
        for b, came in enumerate(store.lengths.tolist()):
            sinks, window = (int(t.lengths[b * store.split]) for t in (store.sinks, store.window))
            for h in range(mask.shape[1]):
                here = torch.tensor([n for n in range(sinks, came - window) if left[b, h, n] == 10**6], dtype=torch.long)
                assert len(here) == int(store.body.lengths[b * store.split + (h if store.split > 1 else 0)])
                left[b, h, here[~mask[b, h, : len(here)]]] = came


def replay(diary: Diary, recipe: Recipe, scale: float, chunk_of: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The attention function of one forward of all tokens. chunk_of: rank of the first token of the call in which a query came."""

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        left, n = diary.left[module.layer_idx], torch.arange(k.shape[2])
        r = n[:, None]
        ctx = Context(k.shape[-1], k.shape[1], torch.float32, k.device)
        stored = []
        for side, x in (("key", k), ("value", v)):
            codec = recipe.precision.build(side, ctx)  # type: ignore[arg-type]
            exact = x if recipe.precision == Recipe.parse("exact").precision else x.bfloat16().float()
            stored.append((exact, codec.decode(codec.encode(exact))))
        coded = (n >= recipe.sinks) & (n < chunk_of(r) - recipe.window)
        alive = (left[:, :, None, :] > r) & (n <= r)  # [B, H, T, N]; what left after r + 1 tokens had come was seen by r
        groups = q.shape[1] // k.shape[1]

        def of_queries(x: Tensor) -> Tensor:
            return x.repeat_interleave(groups, 1)

        (k_exact, k_coded), (v_exact, v_coded) = stored
        logits = torch.where(coded, q @ of_queries(k_coded).mT, q @ of_queries(k_exact).mT) * scale
        p = logits.masked_fill(~of_queries(alive), -torch.inf).softmax(-1)
        out = (p * coded) @ of_queries(v_coded) + (p * ~coded) @ of_queries(v_exact)
        return out.transpose(1, 2).contiguous(), None

    return attention


def logits_of_replay(model: Any, ids: Tensor, attention: Callable[..., Any]) -> Tensor:
    AttentionInterface.register("replay", attention)
    AttentionMaskInterface.register("replay", lambda **_: None)
    before = model.config._attn_implementation
    model.set_attn_implementation("replay")
    try:
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
    finally:
        model.set_attn_implementation(before)


def with_future(cache: Cache, batch: int) -> Cache:
    g = torch.Generator().manual_seed(1)
    for layer in cache.layers:
        layer.future = Future(torch.randn(batch, 4, LENGTH, 128, generator=g), torch.zeros(batch, 4, LENGTH))
    return cache


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scorer", SCORERS)
@torch.no_grad()
def test_strict_chunks_equal_a_masked_full_cache(
    model: Any, profile: Profile, scorer: str, mode: str, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {"snapkv": ", queries=4, kernel=3", "rkv": ", queries=4, kernel=3"}.get(scorer, "")
    recipe = Recipe.parse(f"{scorer}({BUDGET}, interval={INTERVAL}, heads={mode}{extra})+{tier}")
    ids = tokens(2, LENGTH, seed=2)
    cache = with_future(Cache(model, recipe, profile=profile, prefill="strict"), 2)
    diary = Diary(monkeypatch, cache, 2, LENGTH)
    out = torch.cat([model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(INTERVAL, 1)], 1)
    # Strict: a query sees as codes all that is older than the window when it comes.
    expected = logits_of_replay(model, ids, replay(diary, recipe, 128**-0.5, lambda r: r))
    # Numbers at the border of two codes, or of two 16-bit numbers, may fall to either side.
    worst, mean = (2e-4, 1e-5) if tier.startswith("exact") else (3e-2, 5e-3)
    assert (out - expected).abs().max() < worst * expected.abs().max()
    assert (out - expected).square().mean() < mean**2 * expected.square().mean()
    evicted = torch.stack([left < 10**6 for left in diary.left]).sum(-1)  # [L, B, H]
    assert int(evicted.sum()) == 2 * 2 * 2 * (LENGTH - BUDGET), "every eviction leaves the budget, in the mean over heads"
    assert mode == "pooled" or bool((evicted == LENGTH - BUDGET).all())
    if mode in ("shared", "union"):
        assert torch.equal(diary.left[0], diary.left[1])
    assert cache.report().nbytes == cache.nbytes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scorer", ["tri", "h2o", "snapkv", "forecast"])
@torch.no_grad()
def test_ragged_rows_are_as_if_they_were_alone(model: Any, profile: Profile, scorer: str, mode: str) -> None:
    recipe = f"{scorer}({BUDGET}, interval={INTERVAL}, heads={mode})+polar4(window=4, sinks=2)"
    ids, counts = tokens(3, 70, seed=4), (70, 41, 9)
    mask = (torch.arange(70) >= 70 - torch.tensor(counts)[:, None]).long()

    def steps(rows: Tensor, mask: Tensor | None) -> Tensor:
        cache = Cache(model, recipe, profile=profile)
        out, n = [], rows.shape[1] - 20
        for i in [slice(0, n), *(slice(j, j + 1) for j in range(n, n + 20))]:
            seen = None if mask is None else mask[:, : i.stop]
            position = None if mask is None else (seen.cumsum(1) - 1).clamp_min(0)[:, i]  # type: ignore[union-attr]
            out.append(
                model(input_ids=rows[:, i], attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True).logits
            )
        return torch.cat(out, 1)[:, -20:]

    # A row of 9 tokens is padded in all of the prompt: give it a prompt of its own.
    together = steps(ids[:2], mask[:2])
    for b, n in enumerate(counts[:2]):
        alone = steps(ids[b : b + 1, 70 - n :], None)
        assert (together[b] - alone[0]).square().mean() < 5e-3**2 * alone.square().mean()  # codes may fall to either side


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_memory_falls_with_the_budget_and_does_not_grow(model: Any, profile: Profile, mode: str) -> None:
    """Where heads hold different numbers of tokens, pages of 128 do."""
    small, large, interval, length = (130, 520, 64, 1400) if mode == "pooled" else (16, 64, 8, 240)
    sizes = {}
    for budget in (small, large):
        cache = Cache(model, f"tri({budget}, interval={interval}, heads={mode})+polar4", profile=profile, prefill="strict")
        held = []
        for part in tokens(1, length, seed=6).split(interval, 1):
            model(input_ids=part, past_key_values=cache, use_cache=True)
            held.append(sum(layer.store.nbytes for layer in cache.layers))
        assert max(held[-8:]) <= 1.02 * max(held[-16:-8]), "no growth"
        sizes[budget] = held[-1]
    assert sizes[small] < 0.55 * sizes[large]
    assert cache.bf16_nbytes == 2 * length * 2 * 2 * 2 * 128


@torch.no_grad()
def test_prompts_are_compressed_protected_or_refused(model: Any) -> None:
    ids = tokens(1, 60, seed=7)

    def cache(prompt: str) -> Cache:
        found = Cache(model, f"streaming(24, interval=8, prompt={prompt})")
        model(input_ids=ids[:, :40], past_key_values=found, use_cache=True)
        for i in range(40, 60):
            model(input_ids=ids[:, i : i + 1], past_key_values=found, use_cache=True)
        return found

    def held(c: Cache) -> int:
        return int(c.layers[0].store.body.lengths)

    compressed, protected = cache("compress"), cache("protect")
    assert 24 <= held(compressed) < 32 and held(protected) == 60, "20 tokens after the prompt are below budget + interval"
    full = Cache(model, "exact")
    model(input_ids=ids, past_key_values=full, use_cache=True)
    for i in range(60, 80):
        model(input_ids=ids[:, i - 60 : i - 59], past_key_values=protected, use_cache=True)
    key = protected.layers[0].store.body.sides()[0].codes[0]
    assert 40 + 24 <= key.shape[2] < 40 + 32
    assert torch.allclose(key[:, :, :40], full.layers[0].store.body.sides()[0].codes[0][:, :, :40], atol=1e-5), "the prompt is there"
    with pytest.raises(BadInputError, match="40 tokens, and the budget is 24"):
        cache("error")


@torch.no_grad()
def test_crop_save_load_and_select(model: Any, profile: Profile, tmp_path: Any) -> None:
    for scorer in ("h2o", "snapkv", "forecast"):
        recipe = f"{scorer}(24, interval=8)+polar4(window=4, sinks=2)"
        cache = Cache(model, recipe, profile=profile)
        ids = tokens(2, 50, seed=8)
        for i in range(0, 45, 5):
            model(input_ids=ids[:, i : i + 5], past_key_values=cache, use_cache=True)
        cache.save(tmp_path / "cache")
        again = Cache.load(tmp_path / "cache", model, profile=profile)
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
        a = model(input_ids=ids[[1, 0, 1], 45:], past_key_values=cache, use_cache=True).logits
        b = model(input_ids=ids[:, 45:], past_key_values=again, use_cache=True).logits
        assert torch.allclose(a, b[[1, 0, 1]], atol=1e-5)
        with pytest.raises(BadInputError, match="Only the newest"):
            again.crop(-40)
        assert again.get_seq_length() == 50


def test_what_a_selection_needs_is_asked_for(model: Any, profile: Profile) -> None:
    with pytest.raises(RecipeError, match="kvstack calibrate MODEL -o"):
        Cache(model, "tri(24)")
    with pytest.raises(RecipeError, match="--covariance"):
        Cache(model, "expected(24)", profile=replace(profile, query_covariance=None))
    with pytest.raises(RecipeError, match="blocks of tokens"):
        Cache(model, "streaming(24)+kivi4")
    with pytest.raises(RecipeError, match="heads=pooled"):
        Cache(model, "streaming(24, heads=pooled)+polar4(centre=on)", profile=profile)
    with pytest.raises(BadInputError, match="Give 8 at most"):
        model(input_ids=tokens(1, 9), past_key_values=Cache(model, "streaming(24, interval=8)", prefill="strict"), use_cache=True)


def test_all_words_of_the_axis_are_tested() -> None:
    assert {"tri", "forecast", "snapkv", "h2o", "rkv", "oracle"} <= set(SCORERS) and VOCABULARY == 64
