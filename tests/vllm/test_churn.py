"""Churn on CPUs, for a few requests: nothing is left behind, and no token is wrong."""

from pathlib import Path

import pytest
from engines import MODEL, SPACE

import kvstack
from kvstack.bench.churn import Wanted, measure


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
