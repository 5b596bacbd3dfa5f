"""`kvstack.Cache` on real models of transformers: what it costs, saves, refuses, and gives back."""

import copy
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, SIZES, make, tokens
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import kvstack
from kvstack import ArtefactError, BadInputError, Cache, RecipeError, UnsupportedModelError
from kvstack.calibrate import calibrate

torch.set_num_threads(1)
LOSSY = [
    "bf16", "fp8", "polar4(window=6, sinks=2)", "k4v2(scale=unbiased)", "int4", "turboquant4", "turboquant_4bit_nc",
    "kivi4(group=16, window=4)",
]  # fmt: skip


@torch.inference_mode()
def logits(model: Any, cache: Any, ids: torch.Tensor, chunk: int = 1000) -> torch.Tensor:
    return torch.cat([model(input_ids=x, past_key_values=cache).logits for x in ids.split(chunk, 1)], 1)


@pytest.mark.parametrize("recipe", LOSSY)
@pytest.mark.parametrize("family", FAMILIES)
def test_lossy_recipes_run_everywhere(family: str, recipe: str) -> None:
    model = make(family)
    model.config.get_text_config().use_cache = True
    cache = Cache(model, recipe)
    ids = tokens(2, 40)
    out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    assert out.shape == (2, 45) and cache.get_seq_length() == 44


@pytest.mark.parametrize("recipe", [*LOSSY, "exact"])
def test_strict_prefill_does_not_depend_on_chunks(recipe: str) -> None:
    model, ids = make("llama"), tokens(2, 50)
    one = logits(model, Cache(model, recipe, prefill="strict"), ids, chunk=1)
    many = logits(model, Cache(model, recipe, prefill="strict"), ids, chunk=17)
    torch.testing.assert_close(one, many, atol=2e-3, rtol=2e-3)


def test_better_codes_are_closer() -> None:
    model, ids = make("qwen3-128"), tokens(2, 60)
    exact = logits(model, Cache(model, "exact"), ids).log_softmax(-1)
    found = [logits(model, Cache(model, r, prefill="strict"), ids).log_softmax(-1) for r in ("polar5", "polar4", "polar3", "polar2")]
    kl = [float((exact.exp() * (exact - x)).sum(-1).mean()) for x in found]
    assert 0 < kl[0] < kl[1] < kl[2] < kl[3]


def test_measured_ratio_at_head_size_128() -> None:
    """4096 tokens: at least 3.8 without window; the limit is 512 / 132."""
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES | {"num_hidden_layers": 6}, head_dim=128))
    for recipe, low, high in [("polar4", 3.8, 512 / 132), ("polar4(window=128, sinks=4)", 3.4, 3.6), ("bf16", 0.99, 1.0)]:
        cache = Cache(model, recipe)
        for layer in cache.layers:
            x = torch.randn(1, 2, 4096, 128)
            fresh, _ = layer.update(x, x)
            fresh.store.append(x, x)
        assert low <= cache.ratio <= high, cache.report()


@torch.inference_mode()
def test_what_is_measured_is_what_is_held() -> None:
    model = make("gemma3-256")
    cache = Cache(model, "polar4(window=6, sinks=2)")
    logits(model, cache, tokens(2, 50))
    assert cache.nbytes == sum(t.nbytes for t in cache.report().tiers)
    text = str(cache.report())
    assert f"{cache.nbytes:,}" in text and "sliding" in text and "window" in text and "body" in text
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.ratio == 1.0 and "empty" in str(cache.report())
    logits(model, cache, tokens(3, 8))


def test_memory_is_freed_without_the_garbage_collector() -> None:
    model = make("llama")
    cache = Cache(model, "polar4")
    logits(model, cache, tokens(1, 20))
    body = weakref.ref(cache.layers[0].store.body.buffers[0][0])
    gc.disable()
    try:
        del cache
        assert body() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["qwen3-128", "gemma3-256"])
@pytest.mark.parametrize("recipe", ["exact", "polar3(window=6, sinks=2)", "kivi2(group=16, window=4)", "turboquant3"])
def test_a_saved_cache_goes_on_where_it_was(family: str, recipe: str, tmp_path: Path) -> None:
    model, ids, more = make(family), tokens(2, 50), tokens(2, 9, seed=3)
    cache = Cache(model, recipe)
    mask = (torch.arange(50) >= torch.tensor([[0], [7]])).long()
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    cache.save(tmp_path / "c.safetensors")
    loaded = Cache.load(tmp_path / "c.safetensors", model)
    assert loaded.recipe == cache.recipe and loaded.get_seq_length() == 50
    assert loaded.nbytes <= cache.nbytes and os.listdir(tmp_path) == ["c.safetensors"]
    assert (tmp_path / "c.safetensors").stat().st_size < 1.1 * cache.nbytes + 20_000
    mask = torch.cat([mask, torch.ones(2, 9, dtype=torch.long)], 1)
    with torch.inference_mode():
        expected, found = (model(input_ids=more, attention_mask=mask, past_key_values=c).logits for c in (cache, loaded))
    assert torch.equal(expected, found)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    model, path = make("llama"), tmp_path / "c"
    cache = Cache(model, "polar4")
    logits(model, cache, tokens(1, 20))
    cache.save(path)
    with pytest.raises(ArtefactError, match="Load it with the model that wrote it"):
        Cache.load(path, make("llama", seed=1))
    raw = path.read_bytes()
    path.write_bytes(raw[:-9])
    with pytest.raises(ArtefactError, match="copy it again"):
        Cache.load(path, model)
    path.write_bytes(raw[:-9] + bytes(9))
    with pytest.raises(ArtefactError, match="damaged"):
        Cache.load(path, model)
    with pytest.raises(ArtefactError, match="does not exist"):
        Cache.load(tmp_path / "none", model)
    with pytest.raises(ArtefactError, match="folder that exists"):
        cache.save(tmp_path / "no" / "c")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = make("llama"), tmp_path / "c"
    cache = Cache(model, "polar4")
    logits(model, cache, tokens(1, 20))
    cache.save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtefactError, match="No space left"):
        cache.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c"]


def test_unsupported_models_are_refused_by_name() -> None:
    small: dict[str, Any] = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    mla = DeepseekV3Config(**small, num_key_value_heads=2, n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=1)
    for model, reason in [
        (GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)), "RoPE"),
        (BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=64)), "RoPE"),
        (DeepseekV3ForCausalLM(mla), "MLA"),
        (FalconForCausalLM(FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)), "registered"),
        (Qwen3NextForCausalLM(Qwen3NextConfig(**small, num_key_value_heads=2, head_dim=16, num_experts=2)), "LinearAttentionLayer"),
        (
            T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)),
            "encoder-decoder",
        ),
    ]:
        with pytest.raises(UnsupportedModelError, match=f"{reason}.*Use a decoder with RoPE"):
            Cache(model, "polar4")
    own = DiffLlamaForCausalLM(DiffLlamaConfig(**small, num_key_value_heads=2))
    with pytest.raises(UnsupportedModelError, match="computes with cached keys itself"):
        own(input_ids=tokens(1, 5), past_key_values=Cache(own, "polar4"))


def test_recipes_that_do_not_fit_are_refused_at_once() -> None:
    with pytest.raises(RecipeError, match="does not divide the head size 80"):
        Cache(make("llama-mha-80"), "kivi2(group=32)")
    with pytest.raises(RecipeError, match="needs a profile"):
        Cache(make("llama"), "polar4(centre=on)")
    with pytest.raises(RecipeError, match="Did you mean polar4"):
        Cache(make("llama"), "poler4")
    with pytest.raises(BadInputError, match="'exact' or 'strict'"):
        Cache(make("llama"), "polar4", prefill="fast")  # type: ignore[arg-type]


def test_centres_come_from_the_profile_of_this_model() -> None:
    model, ids = make("qwen2-bias"), tokens(2, 60)
    profile = calibrate(model, [tokens(4, 60, seed=5)])
    with pytest.raises(ArtefactError, match="Calibrate one on your model"):
        Cache(make("llama"), "polar3(centre=on)", profile=profile)
    exact = logits(model, Cache(model, "exact"), ids).log_softmax(-1)
    kl = []
    for recipe in ("polar3(scale=unbiased)", "polar3(scale=unbiased, centre=on)"):
        found = logits(model, Cache(model, recipe, profile=profile, prefill="strict"), ids).log_softmax(-1)
        kl.append(float((exact.exp() * (exact - found)).sum(-1).mean()))
    assert kl[1] < kl[0]


def test_misuse_is_explained() -> None:
    model = make("llama")
    cache = Cache(model, "polar4")
    logits(model, cache, tokens(2, 5))
    with pytest.raises(BadInputError, match="batch of 2 and is given one of 3"):
        logits(model, cache, tokens(3, 5))
    with pytest.raises(BadInputError, match="4-D"):
        model(input_ids=tokens(2, 5), attention_mask=torch.ones(2, 1, 5, 5), past_key_values=Cache(model, "polar4"))
    with pytest.raises(BadInputError, match="hides tokens that are cached already"):
        model(input_ids=tokens(2, 1), attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]] * 2), past_key_values=cache)
    with pytest.raises(BadInputError, match="prompt is empty"):
        model(input_ids=tokens(2, 0), past_key_values=Cache(model, "polar4"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModelError, match=r"set_attn_implementation\('kvstack'\)"):
        logits(model, cache, tokens(2, 5))


def test_a_copied_cache_goes_its_own_way_and_shares_the_model() -> None:
    model, more = make("llama"), tokens(1, 4, seed=2)
    cache = Cache(model, "polar4(window=4)")
    logits(model, cache, tokens(1, 30))
    twin = copy.deepcopy(cache)
    assert twin.model is model
    assert torch.equal(logits(model, twin, more), logits(model, cache, more))
    assert twin.layers[0].store.body.buffers[0][0].data_ptr() != cache.layers[0].store.body.buffers[0][0].data_ptr()
    del model
    with pytest.raises(UnsupportedModelError, match="model of this cache is gone"):
        cache.save("never")


def test_a_cache_of_another_profile_is_refused(tmp_path: Path) -> None:
    model = make("llama")
    one, two = (calibrate(model, [tokens(2, 40, seed=s)]) for s in (1, 2))
    cache = Cache(model, "polar4(centre=on)", profile=one)
    logits(model, cache, tokens(1, 30))
    cache.save(tmp_path / "c")
    Cache.load(tmp_path / "c", model, profile=one)
    with pytest.raises(ArtefactError, match="another profile"):
        Cache.load(tmp_path / "c", model, profile=two)


def test_modes_may_change_while_a_cache_lives() -> None:
    model, ids = make("llama"), tokens(1, 30)
    cache, straight = Cache(model, "polar4(window=4)"), Cache(model, "polar4(window=4)")
    logits(model, cache, ids[:, :20])
    found = torch.cat([model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 30)], 1)
    logits(model, straight, ids[:, :20])
    torch.testing.assert_close(found, logits(model, straight, ids[:, 20:], chunk=1))
    assert found.requires_grad


def test_a_model_without_full_attention_layers_is_told() -> None:
    with pytest.warns(UserWarning, match="no memory is saved"):
        Cache(make("mistral-sliding"), "polar4")


def test_static_caches_and_packed_sequences_are_served_as_before() -> None:
    for family in ("llama", "gemma2-softcap", "gpt-oss-sinks"):
        model, ids = make(family), tokens(2, 20)
        found = []
        for name in ("eager", "kvstack"):
            model.set_attn_implementation(name)
            out = model.generate(
                ids, cache_implementation="static", do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0
            )
            places = torch.cat([torch.arange(12), torch.arange(8)])[None].expand(2, -1)
            with torch.inference_mode():
                found.append((out, model(input_ids=ids, position_ids=places, use_cache=False).logits))
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[0][1], found[1][1], atol=2e-4, rtol=2e-4)


def test_nan_names_the_layer() -> None:
    model = make("llama")
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(BadInputError, match="Layer 1: NaN or Inf"):
        logits(model, Cache(model, "polar4"), tokens(1, 5))


def test_batch_operations_of_transformers() -> None:
    model, ids, more = make("llama"), tokens(2, 30), tokens(4, 3, seed=2)
    ours, theirs = Cache(model, "exact"), DynamicCache(config=model.config)
    for cache in (ours, theirs):
        logits(model, cache, ids)
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([0, 5, 3, 1]))
        cache.reorder_cache(torch.tensor([1, 0, 2, 2]))
        cache.crop(-4)
    assert ours.get_seq_length() == theirs.get_seq_length() == 26
    torch.testing.assert_close(logits(model, ours, more), logits(model, theirs, more), atol=1e-4, rtol=1e-4)
    ours.crop(20)  # the older convention: the length to keep
    assert ours.get_seq_length() == 20


def test_the_public_example() -> None:
    model = make("qwen3-128")
    cache = kvstack.Cache(model, "polar4(window=128, sinks=4)")
    model.generate(input_ids=tokens(1, 200), past_key_values=cache, max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    assert cache.nbytes and "polar4(window=128, sinks=4)" in str(cache.report())
