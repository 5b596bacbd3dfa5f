"""Churn on CPUs, for a few requests: nothing is left behind, and no token is wrong."""

from pathlib import Path

import pytest
import torch
from engines import MODEL, SPACE, engine, generated, transformers_model
from transformers import AutoTokenizer, Qwen3Config

import kvstack
from kvstack.bench import forced, random_weights  # noqa: F401, the latter is a load format
from kvstack.bench.churn import Wanted, measure
from kvstack.bench.churn_engine import say_again
from kvstack.bench.engine_process import RANDOM


@pytest.mark.parametrize("recipe", ["exact", "tri(128)+exact"])
def test_churn_leaves_nothing_behind_and_says_nothing_wrong(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With far fewer blocks than the requests would take."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    evicting, parts = "tri" in recipe, list[float]()
    how = Wanted(
        600, rows=8, longest=500, new_tokens=60, checked=3, seed=1, blocks=6, requests=16, dtype="float32",
        profile=Path(MODEL) / "profile" / "profile.safetensors", log=tmp_path / "log",
        extra=dict(enforce_eager=True, kv_cache_memory_bytes=SPACE),
    )  # fmt: skip
    text = Path(kvstack.__file__).with_name("recipe.py").read_text("utf-8")
    (row,) = measure(MODEL, [recipe], text, how, lambda _, part: parts.append(part))
    assert "reason" not in row, row["reason"]
    assert row["leaked_blocks"] == 0 and row["finished"] + row["aborted"] == row["requests"] > 10
    assert row["aborted"] > 0 and (row["preempted"] > 0 or evicting) and (row["cached_tokens"] > 0) == (not evicting)
    assert row["checked"] > 1 and row["tokens"] > 30 and row["differing"] == 0 and not row["together"] and row["others"] > 1
    assert parts[0] == 0 and 0.8 < max(parts) < 1 and "part done: " in (tmp_path / "log").read_text("utf-8")


def test_random_weights_say_something_of_their_own_to_each_prompt(tmp_path: Path) -> None:
    """And the same a second time; those of vLLM do not."""
    Qwen3Config(
        vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=128, tie_word_embeddings=False, architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    said = []
    for weights in ("dummy", RANDOM, RANDOM):
        with engine("polar4", str(tmp_path), load_format=weights, skip_tokenizer_init=True) as llm:
            said.append(generated(llm, [{"prompt_token_ids": [first, *range(10, 100)]} for first in (5, 6)], 20))
    kinds = [{token for tokens in answers for token in tokens} for answers in said]
    assert len(kinds[0]) < 5 and len(kinds[1]) > 20 and said[1] == said[2] and said[1][0] != said[1][1]


def test_a_wrong_token_is_found() -> None:
    """Told with its place, and as far from likely as it is; what comes after it is compared as what follows from it."""
    tok, text = AutoTokenizer.from_pretrained(MODEL), Path(kvstack.__file__).with_name("recipe.py").read_text("utf-8")
    prompts = [tok(text[start : start + 400])["input_ids"] for start in (0, 2000)]
    with engine("exact", **forced.arguments()) as llm:
        said = generated(llm, [{"prompt_token_ids": ids} for ids in prompts], 12)
        right = say_again(llm, [dict(prompt=ids, said=tokens) for ids, tokens in zip(prompts, said, strict=True)], lambda _: None)
        wrong = [*said[1][:5], (said[1][5] + 1) % 512, *said[1][6:]]
        found = say_again(llm, [dict(prompt=ids, said=x) for ids, x in zip(prompts, (said[0], wrong), strict=True)], lambda _: None)
    assert right["tokens"] == found["tokens"] == 24 and right["others"] > 1
    assert not right["differing"] and not right["gaps"] and not right["worst"] and not right["together"] and not found["together"]
    assert found["differing"] == 1 and found["gaps"][0] > 1 and found["worst"] == [dict(at=5, prompt=prompts[1], said=wrong)]
    logits = transformers_model()(torch.tensor([prompts[1] + wrong])).logits[0, len(prompts[1]) - 1 : -1]
    gaps = logits.amax(1) - logits[range(12), wrong]
    torch.testing.assert_close(torch.tensor(found["gaps"]), gaps[gaps > 1e-4].sort(descending=True).values, rtol=1e-3, atol=1e-3)
