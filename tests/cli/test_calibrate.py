"""`kvstack calibrate` and `kvstack inspect` on the bundled model: what a user sees, what files appear, and what bad input says."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvstack import Profile
from kvstack.calibrate import forecast
from kvstack.cli import calibrate, inspect
from kvstack.cli.main import app
from kvstack.lab.registry import bundled_model, load, load_profile

torch.set_num_threads(1)
runner = CliRunner()


def invoke(*args: str, code: int = 0) -> Any:
    result = runner.invoke(app, list(args))
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile of the bundled model and its TriAttention file."""
    folder = tmp_path_factory.mktemp("calibrated") / "new"
    args = ["--tokens", "600", "--length", "256", "--covariance", "--upstream", str(folder / "x" / "stats.pt")]
    result = invoke("calibrate", "bundled", "-o", str(folder), *args)
    assert "512" in result.stdout and "6 of 6" in result.stdout and "calibrating" in result.stderr
    assert result.stdout.count("wrote") == 2
    return folder


def test_calibrate_writes_a_profile_of_this_model(out: Path) -> None:
    profile, bundled = Profile.load(out / "profile.safetensors"), load_profile("bundled")
    profile.check(load("bundled", device="cpu")[0])
    assert profile.tokens == 512 and profile.source.startswith("tuning text ") and profile.query_covariance is not None
    assert bundled is not None and bundled.query_covariance is None
    # So few tokens of the same text have much the same mean queries.
    assert torch.cosine_similarity(profile.query_mean_real, bundled.query_mean_real, -1).mean() > 0.9


def test_upstream_files_give_the_same_statistics(out: Path, tmp_path: Path) -> None:
    result = invoke("calibrate", "bundled", "-o", str(tmp_path), "--from-upstream", str(out / "x" / "stats.pt"))
    assert "calibrating" not in result.stderr
    ours, theirs = (Profile.load(folder / "profile.safetensors") for folder in (out, tmp_path))
    assert torch.equal(ours.query_norm, theirs.query_norm) and torch.equal(ours.query_mean_imag, theirs.query_mean_imag)


def test_calibrate_reads_other_text(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("import os\n" * 200)
    invoke("calibrate", "bundled", "--data", str(tmp_path / "words.txt"), "--tokens", "128", "-o", str(tmp_path))
    profile = Profile.load(tmp_path / "profile.safetensors")
    assert profile.tokens == 128 and profile.source.startswith("words.txt ")


def test_calibrate_trains_a_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "STEPS", 5)
    monkeypatch.setattr(calibrate, "LENGTH", 512)
    args = ["--tokens", "256", "--forecast", "--samples", "1", "--task-options", "recall.share=0.5", "-o", str(tmp_path)]
    result = invoke("calibrate", "bundled", "--tasks", "recall, dfs", *args)
    assert re.search(r"rank correlation -?0\.\d{3}, cross-entropy 0\.\d{4}", result.stdout) and "forecast" in result.stderr
    profile = Profile.load(tmp_path / "profile.safetensors")
    assert profile.forecast_fit is not None and profile.tokens == 256
    assert re.fullmatch("tuning text [0-9a-f]{16}; forecast: tuning text, recall, dfs, recall.share=0.5", profile.source)


def test_forecasts_of_other_models_are_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "STEPS", 5)
    shutil.copytree(bundled_model(), tmp_path / "other")
    (tmp_path / "other" / "training.json").unlink()
    args = ["calibrate", str(tmp_path / "other"), "--tokens", "512", "--length", "256", "--forecast", "-o", str(tmp_path)]
    invoke(*args)
    assert Profile.load(tmp_path / "profile.safetensors").source.endswith("; forecast: tuning text")
    assert "leave --tasks away" in invoke(*args, "--tasks", "recall", code=2).stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-o", "/proc/none"], "cannot be written"),
        (["-o", "out", "--data", "none.txt"], "cannot be read"),
        (["-o", "out", "--length", "8192"], "Give a smaller --length"),
        (["-o", "out", "--length", "512", "--tokens", "100"], "not one window of 512"),
        (["-o", "out", "--tokens", "100000000"], "Give a longer text"),
        (["-o", "out", "--from-upstream", "none.pt"], "cannot be read"),
        (["-o", "out", "--tasks", "recall"], "leave --tasks away"),
        (["-o", "out", "--task-options", "chain.variables=9"], "leave --task-options away"),
        (["-o", "out", "--forecast", "--tasks", "dfs", "--task-options", "chain.variables=9"], "options of chain"),
        (["-o", "out", "--samples", "8"], "leave --samples away"),
        (["-o", "out", "--forecast", "--tasks", "recal"], "There is no task 'recal'"),
    ],
)
def test_calibrate_refuses(args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in invoke("calibrate", "bundled", *args, code=2).stderr


def test_inspect_shows_a_table_a_plot_and_json(tmp_path: Path) -> None:
    stem = tmp_path / "new" / "q"
    result = invoke("inspect", "bundled", "--plot", str(stem), "--layer", "2")
    assert "32,768 tokens" in result.stdout and "dominant band" in result.stdout
    assert stem.with_suffix(".png").stat().st_size > 10_000
    page = stem.with_suffix(".html").read_text()
    assert "<svg" in page and page.count("<tr>") == 7
    rows = json.loads(invoke("inspect", "bundled", "--json").stdout)
    assert [row["layer"] for row in rows] == list(range(6))
    for row in rows:
        assert 0 < row["mean"] < row["dominant"] <= 1 and row["above_0.95"] <= row["above_0.90"]


def test_inspect_takes_files_and_folders(out: Path) -> None:
    one, two = (invoke("inspect", str(p), "--json").stdout for p in (out, out / "profile.safetensors"))
    assert one == two


def test_inspect_refuses(out: Path, tmp_path: Path) -> None:
    assert "does not exist" in invoke("inspect", str(tmp_path / "none"), code=2).stderr
    assert "was not calibrated. Give one of 0, 1, 2, 3, 4, 5" in invoke("inspect", "bundled", "--layer", "6", code=2).stderr
    zero = Profile.load(out / "profile.safetensors")
    zero.query_norm.zero_()
    zero.save(tmp_path / "zero")
    assert "no statistics of queries" in invoke("inspect", str(tmp_path / "zero"), code=2).stderr


def test_preferences_are_means_over_whole_distances(out: Path) -> None:
    profile = Profile.load(out / "profile.safetensors")
    middle, curves = inspect._preference(profile, 1)
    power = (profile.query_mean_real[1] ** 2 + profile.query_mean_imag[1] ** 2).double()

    def exact(distances: torch.Tensor) -> torch.Tensor:
        return (power @ torch.cos(profile.rope_frequency.double()[:, None] * distances)).mean(1) / power.sum(1)

    first = 1
    for i, m in enumerate(middle.tolist()):
        n = round(2 * (m - first) + 1)
        if i % 5 == 0:
            torch.testing.assert_close(curves[:, i], exact(torch.arange(first, first + n).double()), rtol=0, atol=1e-9)
        first += n
    assert first == inspect.FARTHEST and math.isclose(middle[0], 1)
