"""Churn on CPUs, for a few requests: nothing is left behind, and no token is wrong."""

from pathlib import Path

import pytest
from engines import MODEL, SPACE, engine, generated
from transformers import AutoTokenizer

import kvstack
from kvstack.bench.churn import Wanted, measure
from kvstack.bench.churn_engine import ask_again


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


def test_a_wrong_token_is_found() -> None:
    """Told with its place, and as far from likely as it is; what comes after it is compared as what follows from it, or not at all."""
    tok, text = AutoTokenizer.from_pretrained(MODEL), Path(kvstack.__file__).with_name("recipe.py").read_text("utf-8")
    prompts = [tok(text[start : start + 400])["input_ids"] for start in (0, 2000)]
    with engine("exact", enable_prefix_caching=False) as llm:
        said = generated(llm, [{"prompt_token_ids": ids} for ids in prompts], 12)
        done = [dict(prompt=ids, tokens=12, said=tokens) for ids, tokens in zip(prompts, said, strict=True)]
        right = ask_again(llm, done, True, lambda _: None)
        done[1]["said"] = [*said[1][:5], (said[1][5] + 1) % 512, *said[1][6:]]
        once, on = (ask_again(llm, done, all_tokens, lambda _: None) for all_tokens in (False, True))
    assert right["tokens"] == 24 and not right["differing"] and not right["gaps"] and not right["worst"] and not right["together"]
    assert (
        once["differing"] == on["differing"] == 1 and len(once["gaps"]) == 1 and once["gaps"][0] in on["gaps"] and once["gaps"][0] > 1
    )
    assert once["worst"] == [dict(at=5, prompt=prompts[1], said=done[1]["said"])] and once["tokens"] == 12 + 6 and on["tokens"] == 24
