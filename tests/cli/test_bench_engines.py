"""`kvstack bench serve` and `kvstack bench churn`: what they say of bad options and without vLLM, and what they show."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstack.cli import bench_churn, bench_serve
from kvstack.cli.main import app
from kvstack.lab.registry import bundled_model

CHURNED: dict[str, Any] = {
    "engine": "vLLM + kvstack", "kv": "polar4", "model": "a", "rows": 8, "longest": 512, "blocks": 16, "seed": 0, "seconds": 60.4,
    "requests": 1234, "finished": 1100, "aborted": 134, "preempted": 21, "new_tokens": 56789, "cached_tokens": 4321,
    "leaked_blocks": 0, "gpu_bytes": [0, 5000000, 7000000, 7000000, 7500000], "host_bytes": [1, 2, 3, 4], "checked": 50,
    "tokens": 2345, "differing": 2, "gaps": [0.0123, 0.001], "together": [0.0456], "others": 5.25,
}  # fmt: skip


def invoke(*args: str) -> Any:
    """A command that ends with 2."""
    result = CliRunner().invoke(app, ["bench", *args])
    assert result.exit_code == 2, result.output
    return result


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "./qwen3"], "Could not load ./qwen3"),
        (["--engines", ""], "There is nothing to measure"),
        (["--engines", "bf16, fp9"], "`fp9` is none of vLLM's caches (bf16, fp8, turboquant_4bit_nc, int4_per_token_head)"),
        (["--engines", "polar4(window=128, sinks=4), bf16"], "`polar4(window=128, sinks=4)` keeps a window or sinks exact"),
        (["--engines", "int4"], "Pages hold `polar` with 2, 3 or 4 bits"),
        (["--engines", "tri(3000)+polar4"], "multiples of 128"),
        (["--model", str(bundled_model()), "--engines", "bf16, tri(3072)+polar4"], "`tri(3072)+polar4` needs a profile of"),
        (["--model", str(bundled_model()), "--engines", "polar4(centre=on)"], "`polar4(centre=on)` needs a profile of"),
        (["--profile", "none.safetensors"], "none.safetensors does not exist"),
        (["--prefill", "16384"], "'16384' is no shape. Give rows and tokens, such as 32x16384"),
        (["--step", "8x"], "'8x' is no shape. Give rows and tokens, such as 32x16384"),
        (["--step", "8x40960"], "40960 tokens are too many: a request holds 40960, of which 72 are new"),
        (["--generation", "65536"], "65536 tokens are too many"),
        (["--rows", "64"], "A step of 128 rows needs as many at once, and 64 are allowed"),
        (["--largest", "0"], "'0' is no number of tokens"),
        (["--prefill", "", "--step", "", "--largest", "", "--generation", ""], "There is nothing to measure"),
        (["--memory", "1.5"], "Invalid value for '--memory'"),
    ],
)
def test_bad_options_of_serve(args: list[str], message: str) -> None:
    assert message in " ".join(invoke("serve", *args).stderr.split())


def test_serve_says_what_is_measured_by_default() -> None:
    text = " ".join(CliRunner().invoke(app, ["bench", "serve", "--help"]).output.split())
    assert all(word in text for word in ("4x16384, 2x32768", "1x32768, 8x32768", "tri(3072)+polar4", "int4_per_token_head", "--plot"))


@pytest.mark.parametrize("command", [["serve"], ["churn", "qwen3-8b"]])
def test_without_vllm(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # so Python finds none
    path = tmp_path / "r.json"
    assert "needs vLLM. Install it with" in invoke(*command, "--json", str(path)).stderr and not path.exists()


def test_serve_shows_and_writes_what_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads((Path(__file__).parents[2] / "results" / "serving_h200.json").read_text("utf-8"))["rows"]
    rows.append({"engine": "vLLM", "kv": "fp8", "kind": "failed", "B": None, "N": None, "reason": "ValueError: no such [cache]"})
    bench_serve.show(rows, "a title", tmp_path / "r.json", tmp_path / "p.png")
    text = capsys.readouterr().out
    assert "a title" in text and "3,038,208" in text and "vLLM, fp8: not measured: ValueError: no such [cache]" in text
    assert json.loads((tmp_path / "r.json").read_text("utf-8"))["rows"] == rows
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["./qwen3"], "Could not load ./qwen3"),
        (["qwen3-8b", "--engines", ""], "There is nothing to measure"),
        (["qwen3-8b", "--engines", "bf16, fp9"], "`fp9` is none of vLLM's caches"),
        (["qwen3-8b", "--longest", "65536"], "Requests have up to 40960 tokens"),
        (["qwen3-8b", "--longest", "64", "--new-tokens", "64"], "answers fewer than requests"),
        ([str(bundled_model()), "--engines", "tri(1024)+polar4"], "`tri(1024)+polar4` needs a profile of"),
        (["qwen3-8b", "--profile", "none.safetensors"], "none.safetensors does not exist"),
        (["qwen3-8b", "--minutes", "0"], "Invalid value for '--minutes'"),
    ],
)
def test_bad_options_of_churn(args: list[str], message: str) -> None:
    assert message in " ".join(invoke("churn", *args).stderr.split())


def test_churn_shows_and_writes_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = CHURNED | {"kv": "bf16", "gaps": [], "together": [], "others": None, "differing": 0}
    failed = {"engine": "vLLM", "kv": "fp8", "reason": "fp8: churn: ValueError: no such [cache]"}
    bench_churn.show([clean, CHURNED, failed], "a title", tmp_path / "r.json")
    text = capsys.readouterr().out
    assert "a title" in text and "fp8: churn: ValueError: no such [cache]" in text
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    found = {name: (first, second) for name, first, second in lines}
    assert found["requests"] == ("1,234", "1,234") and found["blocks that are missing"] == ("0", "0")
    assert found["MB more on the GPU, from a fifth on"] == ("0.5", "0.5")
    assert found["nats less likely, the worst"] == ("0.0000", "0.0123")
    assert found["that are not the likeliest"] == ("0", "2") and found["by nats, the worst"] == ("0.0000", "0.0456")
    assert found["tokens of other requests, by nats"] == ("-", "5.2500")
    assert json.loads((tmp_path / "r.json").read_text("utf-8"))["rows"] == [clean, CHURNED, failed]
