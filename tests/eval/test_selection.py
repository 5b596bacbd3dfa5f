"""Accuracy over budgets: what counts, what the oracle is told, and that a budget for everything is the full cache."""

import json
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvstack.codecs.exact import ExactCodec
from kvstack.errors import BadInputError, RecipeError
from kvstack.eval import metrics
from kvstack.eval.future import futures, log_sums
from kvstack.eval.selection import Row, Stack, evaluate, in_tokens, parse_budgets, read, share_right
from kvstack.eval.suite import SuiteConfig, task_batches
from kvstack.kernels.reference import Shape, Side, attend, merge
from kvstack.lab.registry import load
from kvstack.lab.text import tuning_text
from kvstack.recipe import Recipe

torch.set_num_threads(1)
TEXT = tuning_text()
CFG = SuiteConfig(length=256, task_samples=2, tasks=("recall", "dfs_public"), batch=2, options={"recall": {"share": 0.2}})
RECIPES = ["random(BUDGET, interval=16)", "oracle(BUDGET, interval=16)", "streaming(4000)"]
KEYS = {
    "model", "scorer", "recipe", "budget", "length", "task", "accuracy", "low", "high", "n", "ratio", "peak_bytes", "working_set",
    "samples",
}  # fmt: skip


@pytest.fixture(scope="module")
def lab() -> tuple[Any, Any]:
    return load("bundled", device="cpu")


def run(lab: tuple[Any, Any], recipes: list[str], budgets: list[str], cfg: SuiteConfig, **options: Any) -> list[Row]:
    profiles = dict.fromkeys(cfg.tasks)
    return evaluate(lab[0], "lab", lab[1], recipes, parse_budgets(budgets, cfg.length), cfg, TEXT, profiles, **options)


@pytest.fixture(scope="module")
def rows(lab: tuple[Any, Any]) -> list[Row]:
    return run(lab, RECIPES, ["1/2", "1/5.12"], CFG, against="random( BUDGET, interval=16)")


def test_budgets_are_tokens_or_parts_of_the_length() -> None:
    assert [in_tokens(b, 4096) for b in parse_budgets(["1/2", "1/10.7", "512", "1/8"], 4096)] == [2048, 383, 512], "1/8 is 512"
    assert in_tokens(parse_budgets(["1/10.7"], 4096)[0], 107) == 10
    assert in_tokens(parse_budgets(["1/400"], 4096)[0], 128) == 1
    for bad in ("0", "2/3", "1/1", "1/0.5", "-4", "0.5", "half", "1e3"):
        with pytest.raises(BadInputError, match="is no budget"):
            parse_budgets(["7", bad], 4096)
    with pytest.raises(BadInputError, match="no budgets"):
        parse_budgets([], 4096)


def test_a_budget_stands_in_its_place_alone() -> None:
    assert str(Stack("tri(BUDGET, interval=64)+polar4").at(7)) == "tri(7, interval=64)+polar4"
    assert Stack("tri(BUDGET)").open and not Stack("tri(MYBUDGET)").open and not Stack("polar4").open


def test_late_items_count_and_whole() -> None:
    tokens = torch.arange(100, 120)
    choices = torch.cat([tokens[1:], tokens[:1]])  # all right
    choices[14] = 0  # the token at 15 is wrong
    items = [(2, 4), (9, 11), (10, 12), (14, 16), (17, 18)]
    assert share_right(choices, tokens, items, 20) == 2 / 3, "the item that begins before the half is left out"
    assert share_right(choices, tokens, items[:2], 20) == 1, "and counts where there is nothing else"
    assert share_right(choices, tokens, items, 26) == 1 / 2, "of the sample's own half"
    assert share_right(choices, tokens, items, 40) == 4 / 5


def test_the_future_is_that_of_the_model(lab: tuple[Any, Any]) -> None:
    """Queries and sums give back the attention weights of transformers' own eager attention."""
    model, _ = lab
    tokens, lengths = torch.randint(3, 4096, (2, 150), generator=torch.Generator().manual_seed(0)), (150, 97)
    before = model.config._attn_implementation
    found = futures(model, tokens, lengths)
    assert model.config._attn_implementation == before and list(found) == list(range(6))
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        weights = model(input_ids=tokens, past_key_values=cache, output_attentions=True).attentions
    model.set_attn_implementation(before)
    for i, future in found.items():
        keys = cache.layers[i].keys.repeat_interleave(future.queries.shape[1] // cache.layers[i].keys.shape[1], 1)
        ours = (future.queries @ keys.mT * future.queries.shape[-1] ** -0.5 - future.lse[..., None]).exp().tril()
        torch.testing.assert_close(ours[0], weights[i][0], atol=2e-5, rtol=0)
        torch.testing.assert_close(ours[1, :, :97], weights[i][1, :, :97], atol=2e-5, rtol=0)
        assert future.lse[1, :, 97:].eq(torch.inf).all() and future.lse[1, :, :97].isfinite().all()


def test_sums_with_soft_caps_and_sinks_are_those_of_the_reference() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, sinks = torch.randn(2, 4, 150, 16, generator=g) * 4, torch.randn(2, 2, 150, 16, generator=g), torch.randn(4, generator=g)
    side = Side(ExactCodec(16, torch.float32), (k,))
    partial = attend(q, side, side, torch.ones(1, 150, 150, dtype=torch.bool).tril(), Shape(0.3, 5.0))
    found = log_sums(q, k, {"scaling": 0.3, "softcap": 5.0})
    torch.testing.assert_close(found, partial.lse.view_as(found))
    with_sinks = log_sums(q, k, {"scaling": 0.3, "softcap": 5.0, "s_aux": sinks})
    torch.testing.assert_close(with_sinks, torch.logaddexp(found, sinks[:, None]))
    assert merge([partial], sinks).out.isfinite().all()


def test_rows_say_everything(rows: list[Row]) -> None:
    names = [f"{r}({b}, interval=16)" for r in ("random", "oracle") for b in (128, 50)]
    assert list(dict.fromkeys(r["recipe"] for r in rows if r["task"] == "recall")) == ["bf16", *names, "streaming(4000)"]
    for r in rows:
        assert r.keys() - {"against"} == KEYS and r["model"] == "lab" and r["n"] == len(r["samples"]) == 2
        assert r["low"] <= r["accuracy"] == pytest.approx(sum(r["samples"]) / 2) and r["accuracy"] <= r["high"]
        assert r["scorer"] == ("full" if r["recipe"] == "bf16" else r["recipe"].split("(")[0])
        assert (r["budget"] is None) == (r["recipe"] in ("bf16", "streaming(4000)"))
    public = [r for r in rows if r["task"] == "dfs_public" and r["budget"]]
    assert all(r["budget"] in (round(r["length"] / 2), round(r["length"] / 5.12)) and 120 < r["length"] < 256 for r in public)
    assert all(r["length"] == 256 for r in rows if r["task"] != "dfs_public")
    json.dumps(rows, allow_nan=False)


def test_memory_is_measured(rows: list[Row]) -> None:
    full, *_ = rows
    assert full["ratio"] == pytest.approx(1, abs=0.15), "slack and lengths"
    assert full["peak_bytes"] == pytest.approx(6144 * 256, rel=0.15)
    for r in rows:
        if r["recipe"].startswith("random(50"):
            # 50 to 65 tokens are left of 256 (of some 160 where the length is the task's own), in float32 and with slack.
            assert 1.2 < r["ratio"] < 256 / 50 / 2 and r["peak_bytes"] < full["peak_bytes"]


def test_a_budget_for_everything_is_the_full_cache(rows: list[Row]) -> None:
    by = {(r["recipe"], r["task"]): r["samples"] for r in rows}
    for task in (*CFG.tasks, "mean"):
        assert by["streaming(4000)", task] == by["bf16", task]


def test_the_future_helps(rows: list[Row]) -> None:
    recall = {r["recipe"]: r["accuracy"] for r in rows if r["task"] == "recall"}
    assert recall["bf16"] == 1
    assert recall["oracle(128, interval=16)"] >= recall["oracle(50, interval=16)"] > recall["random(50, interval=16)"] + 0.2


def test_the_mean_and_the_rival_are_paired(rows: list[Row]) -> None:
    by = {(r["scorer"], r["budget"], r["task"]): r for r in rows if r["scorer"] in ("random", "oracle") and r["task"] != "dfs_public"}
    for (scorer, budget, task), r in by.items():
        if task == "mean":
            parts = [x["samples"] for x in rows if x["scorer"] == scorer and x["task"] != "mean" and x["budget"] is not None]
            one, two = parts[:2] if budget == 128 else parts[2:]
            assert r["samples"] == pytest.approx([(a + b) / 2 for a, b in zip(one, two, strict=True)])
        e = metrics.paired(r["samples"], by["random", budget, task]["samples"])
        assert r["against"] == {"recipe": f"random({budget}, interval=16)", "mean": e.mean, "low": e.low, "high": e.high}
    assert not any("against" in r for r in rows if r["budget"] is None), "a rival over budgets has no one score to compare with"


def test_padding_changes_nothing(lab: tuple[Any, Any]) -> None:
    cfg = SuiteConfig(length=256, task_samples=3, tasks=("dfs_public",), batch=3, seed=2)
    (together,) = task_batches(lab[1], TEXT, cfg)
    assert len(set(together.lengths)) > 1, "or there is no padding"
    for recipe in (Recipe.parse("bf16"), Recipe.parse("knorm(60, interval=16)")):
        choices, cache, _ = read(lab[0], recipe, together)
        single = [SuiteConfig(**{**vars(cfg), "batch": 1})]
        for i, alone in enumerate(task_batches(lab[1], TEXT, single[0])):
            n = together.lengths[i]
            assert torch.equal(read(lab[0], recipe, alone)[0][0], choices[i, :n])
        assert cache.bf16_nbytes == 6144 * sum(together.lengths)


def test_what_cannot_be_measured_is_refused(lab: tuple[Any, Any]) -> None:
    with pytest.raises(RecipeError, match=r"leaves none to select[\s\S]*This is the task dfs_public with samples of 1\d\d tokens"):
        run(lab, ["knorm(BUDGET, window=30)"], ["1/8"], CFG)
    with pytest.raises(BadInputError, match="none of the recipes"):
        run(lab, RECIPES, ["1/2"], CFG, against="knorm(BUDGET)")
    with pytest.raises(BadInputError, match="has no interval"):
        run(lab, RECIPES, ["1/2"], SuiteConfig(task_samples=1))
    with pytest.raises(BadInputError, match="context of 4096"):
        run(lab, [], ["1/2"], SuiteConfig(length=8192, task_samples=2, tasks=("chain",)))
