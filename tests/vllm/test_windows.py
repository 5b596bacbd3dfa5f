"""A model of which most layers have sliding windows: these are vLLM's, the others ours, and all share one pool of pages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import KINDS, engine, generated, less_likely, windowed_model

import kvstack
from kvstack.errors import RecipeError, UnsupportedModelError
from kvstack.vllm.backend import Backend


@pytest.fixture(scope="module")
def model() -> Any:
    return windowed_model(KINDS)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    to = tmp_path_factory.mktemp("model")
    model.save_pretrained(to)
    return str(to)


def layers(llm: Any) -> list[Any]:
    return list(llm.llm_engine.vllm_config.compilation_config.static_forward_context.values())


@pytest.mark.parametrize("recipe", ["exact", "fp8"])
def test_tokens_are_those_of_the_transformers_cache(recipe: str, model: Any, folder: str) -> None:
    """Of prompts longer and shorter than the window, which run over it, and again with their prefixes cached, lossless then too. With
    eight bits, of which rounding decides some, and the cache's exact tokens are in 16 bits: tokens that are nearly as likely."""
    draw = torch.Generator().manual_seed(0)
    prompts = [[int(x) for x in torch.randint(3, 512, (n,), generator=draw)] for n in (300, 40, 130)]
    with engine(recipe, folder, skip_tokenizer_init=True, enable_prefix_caching=True) as llm:
        assert [issubclass(layer.attn_backend, Backend) for layer in layers(llm)] == [kind == "full_attention" for kind in KINDS]
        found = [generated(llm, [{"prompt_token_ids": ids} for ids in prompts], 40) for _ in range(1 if recipe == "fp8" else 2)]
    assert found[0] == found[-1]
    for ids, said in zip(prompts, found[0], strict=True):
        gap, distinct = less_likely(model, kvstack.Cache(model, recipe), ids, said)
        assert distinct > 5 and gap < (0.5 if recipe == "fp8" else 1e-9)


def test_pages_of_windows_are_as_large_as_ours(folder: str) -> None:
    """So that ours need not be padded, and as many more of them fit as they are smaller."""
    blocks = []
    for recipe in (None, "polar4"):
        with engine(recipe, folder, skip_tokenizer_init=True, dtype="bfloat16") as llm:
            blocks.append(llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)
            ours, others = layers(llm)[2].kv_cache, layers(llm)[0].kv_cache
            assert ours[0].is_contiguous() and ours.stride(0) * ours.itemsize == others.stride(0) * others.itemsize
            assert recipe is None or (ours.shape[2:] == (128, 64 + 4) and others.shape[2] == 32)
    assert blocks[1] / blocks[0] == pytest.approx(256 / 68, rel=0.01)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"recipe": "knorm(128)+exact"}, "evicts tokens, and this model has sliding windows"),
        ({"recipe": "exact", "layers": {"2": "fp8"}}, "all pages have one size"),
        ({"recipe": "polar2"}, "32768 bytes, and pages of other layers would have 9216"),
    ],
)
def test_what_cannot_be_beside_windows(asked: dict[str, Any], message: str, folder: str) -> None:
    with pytest.raises(RecipeError, match=message), engine(asked, folder, skip_tokenizer_init=True, enable_prefix_caching=False):
        pass


def test_windows_alone_leave_nothing_to_do(tmp_path: Path) -> None:
    windowed_model(KINDS[:2]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="nothing is saved"), engine("exact", str(tmp_path), skip_tokenizer_init=True):
        pass
