"""The published results: files with a stamp, a page that is made from them, and nothing of whose machine it was."""

import json
import re
from pathlib import Path

import pytest

from kvstack.eval.report import markdown

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "results").glob("*.json"))
LOW_RANK = {
    "kernel": "kvstack", "variant": "nope", "B": 32, "N": 32768, "H": 32, "D": 128, "rank": 60, "bytes": 8.6e9, "us": 2000.0,
    "tb_per_s": 4.3, "speedup_over_best_mha": 1.9, "error": 1.3e-3, "detail": "",
}  # fmt: skip
MHA = {
    "method": "mha", "rank": 64, "reference": False, "cache_ratio": 1.0, "cache_bytes_per_token": 16384.0, "lost_key": 0.0,
    "lost_value": 0.0, "test_loss": 1.85,
}  # fmt: skip
RETROFIT = MHA | {
    "method": "lrkv", "rank": 24, "cache_ratio": 0.5, "cache_bytes_per_token": 8192.0, "lost_key": 0.03, "lost_value": 0.07,
    "test_loss": 1.9, "loss_increase": 0.05, "loss_increase_low": 0.04, "loss_increase_high": 0.06,
}  # fmt: skip
SVD = RETROFIT | {"method": "per-head", "reference": True, "cache_bytes_per_token": 16384.0}
ENGINE = {"engine": "vLLM", "kv": "bf16", "B": None, "N": None}
STEP = ENGINE | {"kind": "step", "B": 8, "N": 4096, "ms_per_step": 9.5, "tokens_per_s": 842.1, "capacity_tokens": 777296}
PROMPT = ENGINE | {"kind": "prefill", "B": 8, "N": 4096, "prefill_tokens_per_s": 1234.4}
CHURNED = {
    "engine": "vLLM", "kv": "bf16", "model": "m", "rows": 8, "longest": 512, "blocks": 6, "seed": 0, "seconds": 60.0, "requests": 100,
    "finished": 90, "aborted": 10, "preempted": 3, "new_tokens": 4000, "cached_tokens": 128, "leaked_blocks": 0,
    "gpu_bytes": [0, 1e6, 3e6, 5e6], "host_bytes": [0, 0, 0, 0], "checked": 9, "tokens": 900, "differing": 1, "gaps": [0.02],
    "together": [], "others": 4.0,
}  # fmt: skip
AFTER = {
    "test_loss_after": 1.87, "loss_increase_after": 0.02, "loss_increase_after_low": 0.01, "loss_increase_after_high": 0.03,
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_results_file_says_how_and_on_what(path: Path) -> None:
    found = json.loads(path.read_text("utf-8"))
    assert found.keys() == {"command", "environment", "rows"} and found["rows"]
    assert found["command"].startswith(("kvstack ", "python tests/"))
    assert {"date", "torch", "gpu", "cpu"} <= found["environment"].keys()


def test_the_page_is_made_from_the_files() -> None:
    assert (ROOT / "docs" / "results.md").read_text("utf-8") == markdown(FILES), "run `make results`"


def test_rows_of_benchmarks_have_a_column_per_problem(tmp_path: Path) -> None:
    tables = {
        "| 4 | 1.2e-03 | - |": [
            {"N": 4096, "name": "kvstack", "bits": "4", "error": 1.23e-3},
            {"N": 8192, "name": "kvstack", "bits": "4", "error": None, "reason": "no GPU"},
        ],
        "| kvstack | 4 | 2.500 (1.60x) | - |": [
            {"T": 2048, "N": 32768, "name": "kvstack", "bits": "4", "ms": 2.5, "tflops": 400.0, "vs_bf16": 1.6},
            {"T": 2048, "N": 65536, "name": "kvstack", "bits": "4", "ms": None, "tflops": None, "vs_bf16": None},
        ],
        "| kvstack | 4 | 1,250.0 (84.0%) | - |": [
            {"B": 1, "n": 32768, "name": "kvstack", "bits": "4", "us": 1250.0, "tb_s": 3.4, "of_copy": 0.84},
            {"B": 32, "n": 1, "name": "kvstack", "bits": "4", "us": None, "tb_s": None, "of_copy": None},
        ],
        "| kvstack | nope | 60 | 8.60 | 2,000.0 | 4.30 | 1.90 | 1.3e-03 |": [
            LOW_RANK,
            LOW_RANK | {"kernel": "FlashAttention-3", "variant": "mha", "rank": None, "us": None, "reason": "not installed"},
        ],
        "| lrkv | 24 | 0.500 | 8,192 | 3.00 | 7.00 | 1.9000 | +0.0500 [+0.0400, +0.0600] |  |  |": [MHA, RETROFIT, SVD | AFTER],
        "| per-head* | 24 | 0.500 | 16,384 | 3.00 | 7.00 | 1.9000 | +0.0500 [+0.0400, +0.0600] |": [MHA, RETROFIT, SVD],
    }
    tables |= {
        "| vLLM | `bf16` | step | 8 x 4,096 | 777,296 | 9.50 | 842 |  |": [STEP],
        "| vLLM | `fp8` | failed |  |  |  |  |  | a / b |": [STEP, ENGINE | {"kv": "fp8", "kind": "failed", "reason": "a | b"}],
        "| vLLM | `bf16` | prefill | 8 x 4,096 |  |  |  | 1,234 |": [PROMPT],
    }
    tables |= {
        "|   nats less likely, the worst | 0.0200 |  |": [
            CHURNED,
            {k: v for k, v in CHURNED.items() if k != "gaps"} | {"kv": "fp8", "reason": "a | b"},
        ],
        "| MB more on the GPU, from a fifth on | 2.0 |": [CHURNED],
        "| not measured |  | a / b |": [CHURNED, ENGINE | {"model": "m", "rows": 8, "longest": 512, "blocks": 6, "reason": "a | b"}],
    }
    environment = {"gpu": None, "cpu": "a CPU", "torch": "2", "date": "2026-01-01"}
    for line, rows in tables.items():
        path = tmp_path / "r.json"
        path.write_text(json.dumps({"command": "kvstack bench", "environment": environment, "rows": rows}))
        assert line in markdown([path]).splitlines()


@pytest.mark.parametrize("path", [*FILES, *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")], ids=lambda p: p.name)
def test_no_place_of_a_machine_is_told(path: Path) -> None:
    assert not re.search(r"(?<![\w.])/(root|home|tmp|work|mnt|Users)/", path.read_text("utf-8"))
