"""A model of which most layers have sliding windows: these are vLLM's, the others ours, and all share one pool of pages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine, generated
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import kvstack
from kvstack.errors import RecipeError, UnsupportedModelError
from kvstack.vllm.backend import Backend

WINDOW = 100
KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * 2


def small(kinds: list[str]) -> Any:
    """Norms make so much of what attention finds that it does not say one token again and again."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=len(kinds), layer_types=kinds, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=WINDOW, max_position_embeddings=1024, query_pre_attn_scalar=4,
        initializer_range=0.3,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    for layer in model.model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            torch.nn.init.constant_(norm.weight, 5.0)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return small(KINDS)


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
        found = [generated(llm, [{"prompt_token_ids": ids} for ids in prompts], 40) for _ in range(2)]
    assert recipe == "fp8" or found[0] == found[1]
    for ids, said in zip(prompts, found[0], strict=True):
        x = torch.tensor([ids])
        out = model.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=40, do_sample=False, eos_token_id=None, output_logits=True,
            past_key_values=kvstack.Cache(model, recipe), return_dict_in_generate=True,
        )  # fmt: skip
        want = out.sequences[0, len(ids) :].tolist()
        first = next((i for i, (a, b) in enumerate(zip(said, want, strict=True)) if a != b), None)
        assert len(set(want)) > 5 and (first is None or recipe == "fp8")
        if first is not None:
            logits = out.logits[first][0]
            assert logits.max() - logits[said[first]] < 0.5 and logits.max() - logits.median() > 5


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
    small(KINDS[:2]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="nothing is saved"), engine("exact", str(tmp_path), skip_tokenizer_init=True):
        pass
