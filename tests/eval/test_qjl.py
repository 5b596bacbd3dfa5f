"""The QJL study: what is measured agrees with theory, the sketch loses at every number of bits, and the command writes its files."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvstack.cli.main import app
from kvstack.codecs import Context, Exact
from kvstack.eval import qjl, runner
from kvstack.eval.suite import SuiteConfig
from kvstack.lab.registry import load
from kvstack.lab.text import held_out_text

torch.set_num_threads(1)

CONTEXT = Context(qjl.D, 1, torch.float32, torch.device("cpu"))
SKETCHES = ("turboquant", "turboquant, orthogonal")
small_inner = partial(qjl.inner, vectors=1024, queries=512)
small_softmax = partial(qjl.softmax, tokens=1024, keys=4096, queries=32)


def by_member(rows: list[qjl.Row]) -> dict[tuple[str, int], qjl.Row]:
    return {(row["family"], row["bits"]): row for row in rows}


@pytest.fixture(scope="module")
def inner() -> dict[tuple[str, int], qjl.Row]:
    return by_member(small_inner(4))


@pytest.fixture(scope="module")
def softmax() -> dict[tuple[str, int], qjl.Row]:
    return by_member(small_softmax(4))


def fake_scores(_: Any, __: Any, recipes: list[Any], *args: Any, **kwargs: Any) -> dict[str, runner.Scores]:
    """Scores in which every recipe that has a sketch is five times worse than polar."""
    scores = {"bf16": runner.Scores([100.0, 120.0], [90, 95], [0.0, 0.0], {"recall": [1.0, 1.0]})}
    for recipe in map(str, recipes):
        bad = 5 if "turbo" in recipe else 1
        tasks = {"recall": [1.0 / bad, 0.75 / bad]}
        scores[recipe] = runner.Scores([100.0 + bad, 121.0], [90, 95], [0.1 * bad, 0.3 * bad], tasks, 100.0 + bad, 4.0)
    return scores


def test_inner_products_agree_with_theory(inner: dict[tuple[str, int], qjl.Row]) -> None:
    assert inner.keys() == {(family, bits) for family in qjl.FAMILIES for bits in qjl.BITS}
    for row in inner.values():
        assert row["slope"] == pytest.approx(row["slope_theory"], abs=0.01)
        assert row["variance"] == pytest.approx(row["variance_theory"], rel=0.04)
        assert row["variance_low"] < row["variance"] < row["variance_high"]


@pytest.mark.parametrize("bits", qjl.BITS)
def test_a_sketch_loses_at_the_same_code_bytes(
    bits: int, inner: dict[tuple[str, int], qjl.Row], softmax: dict[tuple[str, int], qjl.Row]
) -> None:
    polar = "polar, unbiased"
    for sketch in SKETCHES:
        assert inner[sketch, bits]["bytes"] == inner[polar, bits]["bytes"] + 2
        assert inner[sketch, bits]["variance_low"] > inner[polar, bits]["variance_high"]
        assert softmax[sketch, bits]["kl_low"] > softmax[polar, bits]["kl_high"]
    assert inner[polar, bits]["bits_lost"] == 0
    assert 0.3 < inner["turboquant, orthogonal", bits]["bits_lost"] < 0.6 < 1 < inner["turboquant", bits]["bits_lost"] < 1.4


@pytest.mark.parametrize("bits", [3, 4])
def test_the_gaussian_sketch_is_worse_than_to_leave_it_out(bits: int, inner: dict[tuple[str, int], qjl.Row]) -> None:
    assert inner["turboquant", bits]["variance_low"] > inner["polar, unbiased", bits - 1]["variance_high"]


def test_a_needle_keeps_what_theory_says(softmax: dict[tuple[str, int], qjl.Row]) -> None:
    assert 0.96 < softmax["polar, unbiased", 4]["needle"] < 1.02
    assert softmax["turboquant", 2]["needle_high"] < softmax["polar, unbiased", 2]["needle_low"]
    for row in softmax.values():  # theory has no noise on the needle itself, which costs a little more
        assert 0.85 * row["needle_theory"] < row["needle"] < 1.02 * row["needle_theory"]


def test_softmax_without_an_error_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qjl, "_codec", lambda *_: Exact().build("key", CONTEXT))
    for row in qjl.softmax(2, tokens=64, keys=128, queries=4):
        assert row["kl"] == pytest.approx(0, abs=1e-6) and row["needle"] == pytest.approx(1, abs=1e-5)


def test_model_rows_are_paired_with_polar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "evaluate", fake_scores)
    rows = qjl.model(None, None, "", SuiteConfig(task_samples=2))
    assert [row["part"] for row in rows] == ["model"] * 13 + ["paired"] * 9
    assert {row["family"] for row in rows[1:13]} == qjl.RECIPES.keys()
    paired = by_member(rows[13:])
    for bits in qjl.BITS:
        row = paired["turboquant", bits]
        assert (row["kl"], row["kl_ratio"], row["accuracy"]) == pytest.approx((0.8, 5, -0.7))
        assert row["kl_low"] < row["kl"] < row["kl_high"] and row["bytes_difference"] == 4
        assert paired["polar, unbiased", bits]["kl"] == 0
    assert len(qjl.tables(rows)) == 2 and "K: turboquant4(sketch=orthogonal), V: polar4" in str(qjl.tables(rows))


def test_the_sketch_of_keys_runs_in_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qjl, "BITS", (2,))
    rows = qjl.model(*load("bundled", device="cpu"), held_out_text(), SuiteConfig(128, 2, 1, ("recall",)))
    _, polar, _, keys, turboquant = rows[:5]
    assert polar["kl"] < keys["kl"] < turboquant["kl"]
    assert polar["bytes_per_token"] < keys["bytes_per_token"]
    names = [[f.name for f in qjl.SketchOfKeys(2).build(side, CONTEXT).fields] for side in ("key", "value")]
    assert names == [["codes", "scale", "signs", "norm"], ["codes", "scale"]]


def test_figure_has_a_panel_for_each_measurement(
    monkeypatch: pytest.MonkeyPatch, inner: dict[tuple[str, int], qjl.Row], softmax: dict[tuple[str, int], qjl.Row]
) -> None:
    monkeypatch.setattr(runner, "evaluate", fake_scores)
    rows = [*inner.values(), *softmax.values()]
    assert len(qjl.figure(rows).axes) == 3
    fig = qjl.figure(rows + qjl.model(None, None, "", SuiteConfig()))
    assert len(fig.axes) == 4 and len(fig.legends[0].texts) == 6
    fig.draw_without_rendering()


def test_command_writes_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(qjl, "inner", small_inner)
    monkeypatch.setattr(qjl, "softmax", small_softmax)
    arguments = ["qjl", "--no-model", "--seeds", "2", "--out", str(tmp_path / "new" / "folder")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "turboquant4(sketch=orthogonal)" in result.stdout and "…" not in result.stdout
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {"qjl.json", "qjl.png", "qjl.html"}
    assert "<svg" in (tmp_path / "new" / "folder" / "qjl.html").read_text("utf-8")
    rows = json.loads((tmp_path / "new" / "folder" / "qjl.json").read_text("utf-8"))["rows"]
    assert [row["part"] for row in rows] == ["inner"] * 15 + ["softmax"] * 15
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout) == rows


def test_bad_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["qjl", "--no-model", "--out", str(tmp_path / "file")])
    assert result.exit_code == 2 and "Give another folder" in result.stderr
    result = CliRunner().invoke(app, ["qjl", "--length", "8192", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "context of 4096" in result.stderr
