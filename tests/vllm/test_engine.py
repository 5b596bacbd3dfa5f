"""The plugin in vLLM's CPU engine: the tokens that transformers generates, whatever the scheduler does, and pages that are as small as
said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import MODEL, SPACE, alone, copy_of, engine, generated, greedy, transformers_model
from vllm import SamplingParams

import kvstack
from kvstack.kernels.pages import PAGE
from kvstack.lab.registry import load_profile
from kvstack.vllm.backend import Backend

SOURCE = Path(kvstack.__file__).with_name("recipe.py").read_text("utf-8")
PROMPTS = [SOURCE[:900], SOURCE[:900] + "A", "def main(", SOURCE[2000:2600], "import "]


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers_model()


@pytest.fixture(scope="module")
def tokenized() -> list[list[int]]:
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(MODEL)
    return [tok(p)["input_ids"] for p in PROMPTS]


def as_prompts(ids: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": x} for x in ids]


def layers(llm: Any) -> list[Any]:
    return list(llm.llm_engine.vllm_config.compilation_config.static_forward_context.values())


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def test_lossless_pages_give_the_tokens_of_transformers(model: Any, tokenized: list[list[int]]) -> None:
    """With chunks of 96 tokens, with prefixes of another request, of one of the same step and of one that was aborted, and after
    requests were preempted and began anew."""
    want = [alone(model, ids, 12) for ids in tokenized]
    with engine("exact", max_num_batched_tokens=96, enable_prefix_caching=True) as llm:
        assert all(issubclass(layer.attn_backend, Backend) for layer in layers(llm))
        assert generated(llm, as_prompts(tokenized), 12) == want
        out = llm.generate(as_prompts(tokenized), greedy(12), use_tqdm=False)
        assert [list(o.outputs[0].token_ids) for o in out] == want
        assert out[0].num_cached_tokens == len(tokenized[0]) // PAGE * PAGE > 0
        llm.llm_engine.add_request("gone", as_prompts(tokenized)[3], greedy(12))
        for _ in range(3):
            llm.llm_engine.step()
        llm.llm_engine.abort_request(["gone"])
        assert generated(llm, as_prompts(tokenized), 12) == want
        assert not llm.llm_engine.has_unfinished_requests()
    with engine("exact", max_num_batched_tokens=512, max_model_len=512, num_gpu_blocks_override=8, enable_prefix_caching=False) as llm:
        many = [tokenized[0][: 250 + i] for i in range(4)]  # of which each grows into a third page
        assert generated(llm, as_prompts(many), 12) == [alone(model, ids, 12) for ids in many]
        assert scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks() == 7  # all but the one that nobody gets


def test_polar_pages_give_the_tokens_of_the_transformers_cache(model: Any, tokenized: list[list[int]]) -> None:
    some = [tokenized[i] for i in (0, 2)]
    with engine("polar4", enable_prefix_caching=False) as llm:
        found = generated(llm, as_prompts(some), 16)
        held = [layer.impl.body.pages.pool.untyped_storage().nbytes() for layer in layers(llm)]
    assert found == [alone(model, ids, 16, kvstack.Cache(model, "polar4")) for ids in some]
    assert held == [0] * 6, "the cache with which vLLM tries graphs would stay"


def test_as_many_more_tokens_fit_as_the_records_are_smaller() -> None:
    fits = []
    for recipe in (None, "polar4"):
        with engine(recipe, dtype="bfloat16") as llm:
            config = llm.llm_engine.vllm_config.cache_config
            fits.append(config.num_gpu_blocks * config.block_size)
            held = sum(layer.kv_cache.nbytes for layer in layers(llm))
            assert SPACE - 6 * 2 * 2**17 < held <= SPACE
    assert fits[1] / fits[0] >= 3.7


def test_layers_have_pages_of_their_own_widths(model: Any, tokenized: list[list[int]], tmp_path: Path) -> None:
    asked = {"recipe": "polar4", "layers": {"0": "exact", "5": "k4v2"}}
    with engine(None, copy_of(MODEL, tmp_path / "model", asked), enable_prefix_caching=False) as llm:
        widths = [layer.kv_cache.shape[-1] for layer in layers(llm)]
        assert widths == [2 * 128 * 4 + 4, *[128 + 4] * 4, 64 + 32 + 4]
        blocks = {layer.kv_cache.shape[0] for layer in layers(llm)}
        assert len(blocks) == 1 and blocks.pop() == SPACE // (sum(widths) * 2 * PAGE)
        assert generated(llm, as_prompts(tokenized[:1]), 8) == [alone(model, tokenized[0], 8)]


@pytest.mark.parametrize("recipe", ["tri(128)+exact", "knorm(128)+exact"])  # by statistics of layers, and by keys alone
def test_evictions_give_the_tokens_of_the_transformers_cache_and_pages_back(
    recipe: str, model: Any, tokenized: list[list[int]]
) -> None:
    """128 tokens stay when 256 have come, also in a prompt, and by `tri` again when 384 have."""
    profile = Path(MODEL) / "profile" / "profile.safetensors"
    prompts = [(tokenized[0] + tokenized[3])[:n] for n in (240, 256)]
    tokens = 140 if "tri" in recipe else 30
    want = [alone(model, ids, tokens, kvstack.Cache(model, recipe, profile=load_profile("bundled"))) for ids in prompts]
    with engine({"recipe": recipe, "profile": str(profile)}, enable_prefix_caching=False) as llm:
        found = generated(llm, as_prompts(prompts), tokens)
        pool = scheduler(llm).kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        llm.llm_engine.add_request("long", as_prompts([tokenized[0][:200]])[0], greedy(100))
        held = []
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            held.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        assert max(held) == 2  # of three pages that 300 tokens would take
    assert found == want


def test_quality_is_that_of_the_transformers_cache(model: Any, tokenized: list[list[int]]) -> None:
    """Nats of a text whose chunks of 128 tokens read all before them as four bits, and how much more that is than without loss."""
    ids = (tokenized[0] + tokenized[3])[:400]
    nats = {}
    for recipe in ("polar4", "exact"):
        with engine(recipe, max_num_batched_tokens=PAGE, enable_prefix_caching=False) as llm:
            params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
            (out,) = llm.generate(as_prompts([ids]), params, use_tqdm=False)
        nats[recipe] = -sum(p[t].logprob for p, t in zip(out.prompt_logprobs[1:], ids[1:], strict=True))
        cache, logits = kvstack.Cache(model, recipe), []
        with torch.inference_mode():
            for chunk in torch.tensor([ids]).split(PAGE, 1):
                logits.append(model(chunk, past_key_values=cache).logits[0])
        gold = torch.nn.functional.cross_entropy(torch.cat(logits)[:-1], torch.tensor(ids[1:]), reduction="sum").item()
        assert abs(nats[recipe] / gold - 1) < 1e-3
    assert nats["polar4"] != nats["exact"]


@pytest.mark.parametrize("recipe", ["exact", "polar4"])
def test_pages_go_to_another_engine_as_they_are(recipe: str, model: Any, tokenized: list[list[int]], tmp_path: Path) -> None:
    """By vLLM's connector that keeps blocks in files. The second engine reads two pages, and says what the transformers cache says when
    it has these tokens already."""
    ids, stored = tokenized[0], 2 * PAGE
    connector = {
        "kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }  # fmt: skip
    found = []
    for _ in range(2):
        with engine(recipe, kv_transfer_config=connector, enable_prefix_caching=False, disable_log_stats=False) as llm:
            (out,) = llm.generate(as_prompts([ids]), greedy(12), use_tqdm=False)
            found.append((out.num_cached_tokens, list(out.outputs[0].token_ids)))
            page = layers(llm)[0].kv_cache[0].nbytes
    caches = [kvstack.Cache(model, recipe) for _ in range(2)]
    with torch.inference_mode():
        model(torch.tensor([ids[:stored]]), past_key_values=caches[1])
    assert found == [(n, alone(model, ids, 12, cache)) for n, cache in zip((0, stored), caches, strict=True)]
    sizes = [file.stat().st_size for file in tmp_path.rglob("*.safetensors")]
    assert len(sizes) == 6 and all(2 * page < size < 2 * page + 128 for size in sizes)
