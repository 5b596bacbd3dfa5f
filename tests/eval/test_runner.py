"""A comparison from end to end on the bundled model, against a forward pass that knows no cache."""

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from kvstack.errors import BadInputError
from kvstack.eval.runner import REFERENCE, evaluate, logits_of, ratio_of_random, rows
from kvstack.eval.suite import SuiteConfig, task_batches, text_batches
from kvstack.hf.models import check_context
from kvstack.lab.registry import load
from kvstack.lab.text import tuning_text
from kvstack.recipe import Recipe

torch.set_num_threads(1)
TEXT = tuning_text()
CFG = SuiteConfig(length=128, text_sequences=2, task_samples=1, tasks=("recall", "dfs"))
RECIPES = ["exact", "polar4", "bf16", "polar2(window=8)"]
KEYS = {"recipe", "tokens", "bytes_per_token", "ratio", "bits_per_byte", "delta_pct", "kl", "tasks", "tokens_per_s", "decoding"}


@pytest.fixture(scope="module")
def lab() -> tuple[Any, Any]:
    model, tok = load("bundled", device="cpu")
    return model, tok


@pytest.fixture(scope="module")
def run(lab: tuple[Any, Any]) -> dict[str, Any]:
    """Scores, rows by recipe, and what was reported on the way."""
    seen: list[tuple[int, int]] = []
    scores = evaluate(*lab, [Recipe.parse(r) for r in RECIPES], CFG, TEXT, progress=lambda done, total: seen.append((done, total)))
    return {"scores": scores, "rows": {r["recipe"]: r for r in rows(scores, CFG)}, "seen": seen}


@torch.inference_mode()
def plain(lab: tuple[Any, Any], tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the model itself, without any cache."""
    model, _ = lab
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(input_ids=tokens, use_cache=False).logits.float()
    model.set_attn_implementation(before)
    return torch.as_tensor(out)


def test_rows_have_the_keys_of_a_results_file(run: dict[str, Any]) -> None:
    assert list(run["rows"]) == ["bf16", "exact", "polar4", "polar2(window=8)"], "bf16 comes first, and once"
    for name, row in run["rows"].items():
        assert row.keys() >= KEYS
        assert row["recipe"] == name and row["tokens"] == 128 and row["tokens_per_s"] > 0
        assert list(row["tasks"]) == ["recall", "dfs"]
        for task in row["tasks"].values():
            assert task.keys() >= {"accuracy", "low", "high", "n"}
            assert 0.0 <= task["low"] <= task["accuracy"] <= task["high"] <= 1.0 and task["n"] == 1
    json.dumps(list(run["rows"].values()), allow_nan=False)


def test_progress_ends_at_the_total(run: dict[str, Any]) -> None:
    done, totals = zip(*run["seen"], strict=True)
    assert list(done) == list(range(1, totals[0] + 1)) and len(set(totals)) == 1


def test_the_reference_is_no_change_from_itself(run: dict[str, Any]) -> None:
    row = run["rows"][REFERENCE]
    assert row["kl"] == row["kl_low"] == row["kl_high"] == 0.0
    assert row["delta_pct"] == row["delta_pct_low"] == row["delta_pct_high"] == 0.0


def test_exact_is_the_model_itself(lab: tuple[Any, Any], run: dict[str, Any]) -> None:
    (text,) = text_batches(lab[1], TEXT, CFG)
    logits = plain(lab, text.tokens)
    nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), text.tokens[:, 1:], reduction="none").sum(1)
    assert run["scores"]["exact"].nats == pytest.approx(nats.tolist(), rel=1e-4)
    row = run["rows"]["exact"]
    assert row["bits_per_byte"] == pytest.approx(nats.sum().item() / math.log(2) / sum(text.nbytes), rel=1e-4)
    # bf16 rounds the cache, and that is all that differs.
    assert abs(row["delta_pct"]) < 0.2 and 0.0 < row["kl"] < 1e-3


def test_the_divergence_is_that_of_the_reference_from_the_recipe(lab: tuple[Any, Any], run: dict[str, Any]) -> None:
    (text,) = text_batches(lab[1], TEXT, CFG)
    ours, theirs = (logits_of(lab[0], Recipe.parse(r), text.tokens, None, 512)[0][:, :-1] for r in ("bf16", "polar4"))
    kl = kl_divergence(Categorical(logits=ours), Categorical(logits=theirs)).mean(1)
    assert run["scores"]["polar4"].kl == pytest.approx(kl.tolist(), rel=1e-3)


def test_accuracy_is_counted_by_whole_answers(lab: tuple[Any, Any], run: dict[str, Any]) -> None:
    assert all(scores.tasks["recall"] == [1.0] for name, scores in run["scores"].items() if name != "polar2(window=8)")
    # A model that is hurt gets some answers half right.
    hurt = copy.deepcopy(lab[0])
    torch.manual_seed(0)
    for p in hurt.parameters():
        p.data += 0.3 * p.data.std() * torch.randn_like(p)
    cfg = replace(CFG, length=256, text_sequences=0, task_samples=2)
    scores = evaluate(hurt, lab[1], [Recipe.parse("exact")], cfg, TEXT)["exact"]
    halves = 0
    for batch in task_batches(lab[1], TEXT, cfg):
        first = plain((hurt, None), batch.tokens).argmax(-1)
        right = [[first[i, a - 1 : b - 1] == batch.tokens[i, a:b] for a, b in items] for i, items in enumerate(batch.items)]
        assert scores.tasks[batch.kind] == [sum(bool(r.all()) for r in row) / len(row) for row in right]
        halves += sum(bool(r.any() and not r.all()) for row in right for r in row)
    assert halves > 3


def test_an_untrained_model_knows_no_answer(lab: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    model = type(lab[0])(lab[0].config).eval()
    scores = evaluate(model, lab[1], [], SuiteConfig(length=128, text_sequences=2, task_samples=2), TEXT)[REFERENCE]
    assert max(max(v) for v in scores.tasks.values()) < 0.2
    assert scores.nats[0] / 127 == pytest.approx(math.log(4096), rel=0.1), "nor a word"


def test_fewer_bits_cost_more(run: dict[str, Any]) -> None:
    kl = {name: row["kl"] for name, row in run["rows"].items()}
    assert kl["polar2(window=8)"] > kl["polar4"] > kl["exact"] > 0.0
    held = {name: row["bytes_per_token"] for name, row in run["rows"].items()}
    assert held["polar2(window=8)"] < held["polar4"] < held["bf16"] < held["exact"]
    # 6 layers, 2 heads, keys and values of 128: 6144 bytes in bf16, with slack and lengths on top.
    assert 6144 <= held["bf16"] < 1.2 * 6144
    for row in run["rows"].values():
        assert row["ratio"] == pytest.approx(6144 / row["bytes_per_token"], rel=1e-3)


def test_differences_to_another_recipe_are_paired(run: dict[str, Any]) -> None:
    scores = run["scores"]
    found = {r["recipe"]: r["against"] for r in rows(scores, CFG, against="polar4")}
    assert all(a["recipe"] == "polar4" for a in found.values())
    assert found["polar4"]["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    gaps = [a - b for a, b in zip(scores["polar2(window=8)"].kl, scores["polar4"].kl, strict=True)]
    assert found["polar2(window=8)"]["kl"]["mean"] == pytest.approx(sum(gaps) / 2)
    nats = {name: sum(s.nats) for name, s in scores.items()}
    for name in nats:
        assert found[name]["delta_pct"]["mean"] == pytest.approx(100 * (nats[name] / nats["polar4"] - 1))


def test_chunks_change_nothing(lab: tuple[Any, Any], run: dict[str, Any]) -> None:
    cfg = SuiteConfig(length=128, text_sequences=2, tasks=(), batch=1)
    scores = evaluate(*lab, [Recipe.parse("polar2(window=8)")], cfg, TEXT, chunk=50)
    assert scores["polar2(window=8)"].nats == pytest.approx(run["scores"]["polar2(window=8)"].nats, rel=1e-3)
    assert rows(scores, cfg)[1]["tasks"] == {}


def test_a_run_of_tasks_alone_has_no_text_keys(lab: tuple[Any, Any]) -> None:
    cfg = SuiteConfig(length=128, text_sequences=0, task_samples=2, tasks=("chain",))
    (row,) = rows(evaluate(*lab, [], cfg, TEXT), cfg)
    assert "kl" not in row and "bits_per_byte" not in row and row["tasks"]["chain"]["n"] == 2


def test_windows_that_are_too_long_are_refused(lab: tuple[Any, Any]) -> None:
    check_context(lab[0], 4096, "")
    with pytest.raises(BadInputError, match="context of 4096"):
        check_context(lab[0], 4097, "Ask for shorter sequences.")
    with pytest.raises(BadInputError, match=r"do not fit the model's context of 4096\. Ask for shorter"):
        evaluate(*lab, [], SuiteConfig(length=5000), TEXT)


def test_the_ratio_of_random_tokens_is_that_of_real_ones(lab: tuple[Any, Any], run: dict[str, Any]) -> None:
    for name in ("bf16", "polar4", "polar2(window=8)"):
        assert ratio_of_random(lab[0], Recipe.parse(name), 126) == pytest.approx(run["rows"][name]["ratio"], rel=0.15)
    # Beyond the context of the model, where a recipe comes near what its bits say.
    assert ratio_of_random(lab[0], Recipe.parse("bf16"), 6000) == pytest.approx(1.0, abs=0.1)
    assert 3.2 < ratio_of_random(lab[0], Recipe.parse("polar4"), 6000) < 4.0
