"""The commands that run a model, on the bundled one: what a user sees, what files appear, and what bad input says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvstack import Cache
from kvstack.cli import compare, demo
from kvstack.cli.main import app
from kvstack.eval.suite import SuiteConfig
from kvstack.lab.registry import bundled_model, load

torch.set_num_threads(1)
runner = CliRunner()
SMALL = ["--length", "256", "--text-sequences", "2", "--samples", "1", "--tasks", "recall, dfs"]


def invoke(*args: str, code: int = 0, given: str | None = None) -> Any:
    result = runner.invoke(app, list(args), input=given)
    assert result.exit_code == code, result.output
    return result


def test_run_prints_text_and_a_table() -> None:
    result = invoke("run", "bundled", "--prompt", "def main():", "--max-new-tokens", "12", "--recipe", "polar4(window=4)")
    assert result.stdout.strip() and "smaller than bf16" not in result.stdout
    assert "polar4(window=4)" in result.stderr and "ratio" in result.stderr


def test_run_json_reads_standard_input_and_saves_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    result = invoke(
        "run", "bundled", "--prompt", "-", "--max-new-tokens", "5", "--json", "--save-cache", str(path), given="import os\n" * 40
    )
    found = json.loads(result.stdout)
    assert found["new_tokens"] == 5 and found["prompt_tokens"] > 100 and found["cache_bytes"] > 0 and found["text"]
    model, _ = load("bundled")
    assert Cache.load(path, model).get_seq_length() == found["prompt_tokens"] + 4


def test_run_takes_yaml_and_draws(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("precision: k4v2\nwindow: 8\n")
    result = invoke(
        "run", "bundled", "--prompt", "x = ", "--max-new-tokens", "4", "--recipe", str(path), "--temperature", "1", "--json"
    )
    assert json.loads(result.stdout)["recipe"] == "k4v2(window=8)"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "  "], "prompt is empty"),
        (["--prompt", "x " * 5000], "do not fit the model's context of 4096"),
        (["--prompt", "x", "--recipe", "poler4"], "Did you mean polar4"),
        (["--prompt", "x", "--recipe", "polar9"], "1 to 5"),
        (["--prompt", "x", "--recipe", "none.yaml"], "cannot be read"),
        (["--prompt", "x", "--profile", "none"], "does not exist"),
    ],
)
def test_run_refuses(args: list[str], message: str) -> None:
    assert message in invoke("run", "bundled", *args, code=2).stderr


def test_run_refuses_what_is_no_model(tmp_path: Path) -> None:
    assert "no config.json" in invoke("run", str(tmp_path), "--prompt", "x", code=2).stderr
    (tmp_path / "config.json").write_text("{}")
    assert "Could not load" in invoke("run", str(tmp_path), "--prompt", "x", code=2).stderr


def test_compare_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["kvstack", "compare", "bundled", "--recipes", "polar4, int4"])
    json_out, plot = tmp_path / "new" / "c.json", tmp_path / "new" / "c"
    recipes = "polar2, polar4(window=8, sinks=2), bf16, polar3(centre=on), polar2"
    result = invoke(
        "compare", "bundled", *SMALL, "--recipes", recipes, "--against", "polar2", "--ratio-at", "512", "--json", str(json_out),
        "--plot", str(plot),
    )  # fmt: skip
    results = json.loads(json_out.read_text())
    assert results["command"] == "kvstack compare bundled --recipes 'polar4, int4'" and results["environment"]["torch"]
    rows = {row["recipe"]: row for row in results["rows"]}
    assert list(rows) == ["bf16", "polar2", "polar4(window=8, sinks=2)", "polar3(centre=on)"]
    for name, row in rows.items():
        assert name in result.stdout
        wanted = {
            "recipe",
            "tokens",
            "bytes_per_token",
            "ratio",
            "bits_per_byte",
            "delta_pct",
            "kl",
            "tasks",
            "tokens_per_s",
            "decoding",
            "ratios",
        }
        assert wanted <= row.keys() and set(row["tasks"]) == {"recall", "dfs"}
        assert all(t.keys() == {"accuracy", "low", "high", "n"} for t in row["tasks"].values())
    assert rows["bf16"]["kl"] == 0 and rows["polar2"]["kl"] > rows["polar3(centre=on)"]["kl"] > 0
    assert rows["polar2"]["against"]["kl"]["mean"] == 0 and rows["polar3(centre=on)"]["against"]["kl"]["mean"] < 0
    assert rows["polar2"]["ratios"]["512"] > rows["polar3(centre=on)"]["ratios"]["512"] > 3
    assert plot.with_suffix(".png").stat().st_size > 10_000 and "<svg" in plot.with_suffix(".html").read_text()


def test_compare_over_budgets(tmp_path: Path) -> None:
    json_out, plot = tmp_path / "new" / "b.json", tmp_path / "new" / "b"
    recipes = "tri(BUDGET, window=16, interval=32), oracle(BUDGET, interval=32)+polar4"
    result = invoke(
        "compare", "bundled", "--recipes", recipes, "--budgets", "1/4, 96", "--tasks", "recall, dfs_public", "--length", "256",
        "--samples", "2", "--task-options", "recall.share=0.2, dfs_public.depth=16", "--profile-for",
        f"recall={bundled_model() / 'profile' / 'profile.safetensors'}",
        "--against", "bf16", "--json", str(json_out), "--plot", str(plot),
    )  # fmt: skip
    rows = json.loads(json_out.read_text())["rows"]
    assert [r["scorer"] for r in rows] == ["full"] * 3 + ["tri"] * 6 + ["oracle"] * 6
    assert all(r["against"]["recipe"] == "bf16" and r["working_set"] < 200 for r in rows)
    assert {r["budget"] for r in rows if r["task"] != "dfs_public"} == {None, 64, 96}
    for shown in (
        "tri(BUDGET, interval=32, window=16)",
        "oracle(BUDGET, interval=32)+polar4",
        "mean, points above bf16",
        "b-working-set",
    ):
        assert shown in result.stdout
    assert "measuring" in result.stderr and plot.with_suffix(".html").read_text().count("<svg") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--recipes", "tri(BUDGET)"], "Give some, such as --budgets"),
        (["--recipes", "polar4", "--budgets", "half"], "'half' is no budget"),
        (["--recipes", "polar4", "--budgets", "64", "--ratio-at", "512"], "not measured over budgets"),
        (["--recipes", "polar4", "--budgets", "64", "--profile-for", "sudoku=x"], "There is no task 'sudoku'"),
        (["--recipes", "polar4", "--budgets", "64", "--samples", "1"], "has no interval"),
        (["--recipes", "polar4", "--profile-for", "recall=x"], "goes with --budgets"),
        (["--recipes", "polar4", "--task-options", "chain.length=2"], "There is no option 'chain.length'"),
        (["--recipes", "polar4", "--task-options", "chain.variables=2.5"], "Give a whole number from 2 to 26"),
        (["--recipes", "polar4", "--task-options", "recall.share=nan"], "Give a number from 0.0 to 1.0"),
        (["--recipes", " "], "no recipes to compare"),
        (["--recipes", "polar4", "--json", "/proc/none/x.json"], "cannot be written"),
        (["--recipes", "polar4, nonsense"], "There is no word 'nonsense'"),
        (["--recipes", "polar4", "--tasks", "sudoku"], "There is no task 'sudoku'"),
        (["--recipes", "polar4", "--length", "8192"], "context of 4096"),
        (["--recipes", "polar4", "--text", "none.txt"], "cannot be read"),
        (["--recipes", "polar4", "--ratio-at", "4k"], "'4k' is no number"),
        (["--recipes", "polar4", "--text-sequences", "1"], "has no interval"),
        (["--recipes", "polar4", "--text-sequences", "0", "--tasks", ""], "nothing to measure"),
        (["--recipes", "polar4", "--against", "int4"], "none of the recipes"),
        (["--recipes", "kivi2(group=48)"], "does not divide the head size 128"),
    ],
)
def test_compare_refuses(args: list[str], message: str) -> None:
    assert message in invoke("compare", "bundled", *args, code=2).stderr


def test_lists_are_split_outside_parentheses() -> None:
    assert compare.split("polar4(window=128, sinks=4), fp8,, int4 ") == ["polar4(window=128, sinks=4)", "fp8", "int4"]
    assert compare.split("") == [] and compare.split("a(b))c,d") == ["a(b))c", "d"]


def test_demo_is_compare_with_a_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "RECIPES", demo.RECIPES[:2])
    monkeypatch.setattr(demo, "SUITE", SuiteConfig(length=256, text_sequences=2, task_samples=1))
    result = invoke("demo", "--out", str(tmp_path))
    assert "polar4" in result.stdout and "measuring" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.html", "demo.json", "demo.png"]


def test_lab_eval_and_train(tmp_path: Path) -> None:
    out = tmp_path / "model"
    invoke("lab", "train", "--small", "--minutes", "0.03", "--out", str(out))
    assert {"README.md", "curve.png", "profile", "training.json", "model.safetensors"} <= {p.name for p in out.iterdir()}
    assert "Not measured yet" in (out / "README.md").read_text()
    json_out = tmp_path / "eval.json"
    args = ["--lengths", "128", "--samples", "2", "--text-sequences", "2", "--json", str(json_out), "--card"]
    assert "128" in invoke("lab", "eval", str(out), *args).stdout
    rows = json.loads(json_out.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [128] and rows[0]["recipe"] == "bf16"
    assert "2 fresh samples" in (out / "README.md").read_text()
    assert "no numbers" in invoke("lab", "eval", "bundled", "--lengths", "4k", code=2).stderr
    assert "not the folder of a lab model" in invoke("lab", "train", "--out", str(out), "--resume", str(tmp_path), code=2).stderr
