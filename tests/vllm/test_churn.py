"""Half a minute of churn on CPUs: nothing is left behind, and no token is wrong."""

from pathlib import Path

import pytest
from engines import MODEL, engine

import kvstack
from kvstack.bench.churn import Load, churn, compare

SECONDS = 12


@pytest.mark.parametrize("recipe", ["exact", "tri(128)+exact"])
def test_churn_leaves_nothing_behind_and_says_nothing_wrong(recipe: str) -> None:
    """With far fewer blocks than the requests would take."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(MODEL)(Path(kvstack.__file__).with_name("recipe.py").read_text("utf-8"))["input_ids"]
    load = Load(ids, longest=500, new_tokens=200 if "tri" in recipe else 60)
    asked = {"recipe": recipe, "profile": f"{MODEL}/profile/profile.safetensors"}
    evicting = "tri" in recipe
    arguments = dict(
        max_model_len=512, num_gpu_blocks_override=7 if evicting else 12, max_num_batched_tokens=192,
        enable_prefix_caching=not evicting, disable_log_stats=False, max_num_seqs=16,
    )  # fmt: skip
    with engine(asked, **arguments) as llm:
        row, done = churn(llm, load, SECONDS, seed=0)
    assert row["leaked_blocks"] == 0 and row["finished"] + row["aborted"] == row["requests"] > 10
    assert row["aborted"] > 0 and (row["preempted"] > 0 or "tri" in recipe) and (row["cached_tokens"] > 0) == ("tri" not in recipe)
    with engine(asked, **arguments | {"num_gpu_blocks_override": 64, "enable_prefix_caching": False}) as llm:
        found = compare(llm, done, 8, seed=1)
    assert found["checked"] == 8
    if "tri" not in recipe:  # where chunks end decides what a prompt that is longer than the budget keeps
        assert found["worst_gap"] < 1e-3
