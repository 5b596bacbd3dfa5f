"""`kvstack bench`: its options, and what it says without a GPU or with bad ones."""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvstack.cli import bench
from kvstack.cli.main import BENCH_COMMANDS, app

runner = CliRunner()
OPTIONS = {
    "decode": ["shape", "heads", "kv_heads", "head_dim", "bits", "names", "json_out", "plot", "quick"],
    "prefill": ["chunk", "past", "heads", "kv_heads", "head_dim", "bits", "names", "json_out", "quick"],
    "encode": ["shape", "kv_heads", "head_dim", "bits", "json_out", "quick"],
    "lowrank": ["batch", "tokens", "heads", "head_dim", "ranks", "variants", "json_out"],
    "error": ["tokens", "head_dim", "bits", "json_out"],
    "long": ["shape", "recipe", "generated", "points", "batch", "every_step", "json_out"],
    "generate": ["shape", "recipe", "context", "batch", "steps", "json_out"],
    "serve": [
        "model", "engines", "prefill", "step", "largest", "generation", "rows", "memory", "profile", "log", "json_out", "plot",
    ],
    "churn": [
        "model", "engines", "minutes", "rows", "longest", "new_tokens", "checked", "blocks", "text", "seed", "dtype", "memory",
        "profile", "log", "json_out",
    ],
}  # fmt: skip


def invoke(*args: str, code: int = 0) -> Any:
    result = runner.invoke(app, ["bench", *args], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("name", BENCH_COMMANDS)
def test_options(name: str) -> None:
    module, _, function = BENCH_COMMANDS[name][0].partition(":")
    assert list(inspect.signature(getattr(import_module(module), function)).parameters) == OPTIONS[name]


def test_help_needs_no_gpu() -> None:
    assert "decode" in invoke("--help").output
    text = invoke("decode", "--help").output
    assert all(word in text for word in ("--shape", "--bits", "--peers", "--json", "--plot", "--quick", "256x2048", "turboquant"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "8x4096", "--shape", "9"], "'9' is no shape"),
        (["--bits", "4, 9"], "no page format for 9-bit keys"),
        (["--bits", "k4"], "'k4' are no bits"),
        (["--head-dim", "80"], "head sizes of 64, 128 and 256"),
        (["--heads", "30"], "30 query heads cannot share 8"),
        (["--peers", "sdpa, flash4"], "no peer 'flash4'"),
        (["--bits", "", "--peers", ""], "nothing to measure"),
        (["--json", "/dev/null/x.json"], "Give another place"),
    ],
)
def test_bad_options(args: list[str], message: str) -> None:
    assert message in " ".join(invoke("decode", *args, code=2).stderr.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is one")
def test_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    result = invoke("decode", "--quick", "--json", str(path), code=2)
    assert "no CUDA GPU" in result.stderr and "kvstack doctor" in result.stderr and not path.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "qwen3"], "There is no shape 'qwen3'. Give one of qwen3-8b, small, llama-3.2-1b."),
        (["--recipe", "polar4", "--recipe", "polr4"], "There is no word 'polr4'"),
        (["--context", "31"], "Invalid value for '--context'"),
        (["--steps", "1"], "Invalid value for '--steps'"),
        (["--batch", "0"], "Invalid value for '--batch'"),
        (["--json", "/dev/null/x.json"], "Give another place"),
    ],
)
def test_bad_options_of_generate(args: list[str], message: str) -> None:
    assert message in " ".join(invoke("generate", *args, code=2).stderr.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is one")
def test_generate_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    result = invoke("generate", "--json", str(path), "--recipe", "exact", code=2)
    assert "no CUDA GPU" in result.stderr and not path.exists()


@pytest.mark.parametrize("name", ["prefill", "encode"])
def test_help_of_kernels_says_what_is_checked(name: str) -> None:
    text = invoke(name, "--help").output
    assert all(word in text for word in ("first checked against", "Times are medians", "--json", "--quick", f"kvstack bench {name}"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["prefill", "--chunk", "0"], "Invalid value for '--chunk'"),
        (["prefill", "--heads", "30"], "30 query heads cannot share 8"),
        (["prefill", "--bits", "4, 16"], "Prefill kernels read codes of 2 to 8 bits, not 16"),
        (["prefill", "--peers", "turboquant"], "Give some of: sdpa, flash3"),
        (["prefill", "--bits", "", "--peers", ""], "nothing to measure"),
        (["prefill", "--json", "/dev/null/x.json"], "Give another place"),
        (["encode", "--shape", "9"], "'9' is no shape"),
        (["encode", "--bits", "4+"], "'4+' are no bits"),
        (["encode", "--bits", "8+search"], "not searched for"),
        (["encode", "--head-dim", "80"], "head sizes of 64, 128 and 256"),
        (["encode", "--bits", ""], "nothing to measure"),
        (["encode", "--json", "/dev/null/x.json"], "Give another place"),
        (["lowrank", "--batch", "0"], "Invalid value for '--batch'"),
        (["lowrank", "--head-dim", "80"], "no low-rank kernel for heads of 80. Give a size of 64, 128 or 256"),
        (["lowrank", "--variants", "nope, rope"], "no variant 'rope'. Give some of nope, exact"),
        (["lowrank", "--ranks", "60, x"], "'x' is no rank"),
        (["lowrank", "--ranks", "129"], "'129' is no rank. Give numbers from 1 to the size of a head, 128"),
        (["lowrank", "--ranks", ""], "nothing to measure"),
        (["lowrank", "--json", "/dev/null/x.json"], "Give another place"),
        (["error", "--tokens", "0"], "Invalid value for '--tokens'"),
        (["error", "--bits", "9"], "no page format for 9-bit keys"),
        (["error", "--json", "/dev/null/x.json"], "Give another place"),
    ],
)
def test_bad_options_of_kernels(args: list[str], message: str) -> None:
    assert message in " ".join(invoke(*args, code=2).stderr.split())


def test_lowrank_help_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = invoke("lowrank", "--help").output
    options = ("--batch", "--tokens", "--heads", "--head-dim", "--ranks", "--variants", "--json")
    assert all(word in text for word in (*options, "is first checked", "Times are medians", "56, 60, 64", "kvstack bench lowrank"))
    what = {"B": 2, "N": 4096, "H": 32, "D": 128, "error": 1e-4, "detail": "made up"}
    ours = {
        "kernel": "kvstack",
        "variant": "nope",
        "rank": 60,
        "bytes": 10**9,
        "us": 250.0,
        "tb_per_s": 4.0,
        "speedup_over_best_mha": 2.0,
    }
    mha = ours | {"kernel": "SDPA", "variant": "mha", "rank": None, "us": 500.0, "speedup_over_best_mha": 1.0}
    none = dict.fromkeys(ours) | {"kernel": "FA", "variant": "mha", "reason": "it is not installed"}
    bench.show_lowrank([what | row for row in (none, mha, ours)], "a title", tmp_path / "r.json")
    out = capsys.readouterr().out
    assert "a title, 2 x 4,096 tokens, 32 heads of 128" in out and "FA (mha) did not run: it is not installed" in out
    assert out.index("250.0") < out.index("500.0") and "2.00" in out and (tmp_path / "r.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is one")
@pytest.mark.parametrize("args", [["prefill", "--quick"], ["encode", "--quick"], ["lowrank"]])
def test_kernels_without_a_gpu(args: list[str], tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    result = invoke(*args, "--json", str(path), code=2)
    assert "no CUDA GPU" in result.stderr and "kvstack doctor" in result.stderr and not path.exists()


def test_show_writes_what_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"B": 1, "N": 4096, "Hq": 32, "Hkv": 8, "D": 128, "name": "kvstack", "bits": "4", "us": 12.5, "tb_s": 1.0, "of_copy": 0.25}
    row |= {"vs_bf16": 2.0, "vs_fp8": None, "calls": 4, "replays": 5, "error": 1e-4, "detail": "hopper kernel"}
    bench.show([row], "a title", tmp_path / "r.json", tmp_path / "p.png")
    text = capsys.readouterr().out
    assert "a title" in text and "12.5" in text and "25%" in text and f"wrote {tmp_path / 'p.png'}" in text
    assert (tmp_path / "r.json").exists() and (tmp_path / "p.png").stat().st_size > 1000
