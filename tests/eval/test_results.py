"""The published results: files with a stamp, a page that is made from them, and nothing of whose machine it was."""

import json
import re
from pathlib import Path

import pytest

from kvstack.eval.report import markdown

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "results").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_results_file_says_how_and_on_what(path: Path) -> None:
    found = json.loads(path.read_text("utf-8"))
    assert found.keys() == {"command", "environment", "rows"} and found["rows"]
    assert found["command"].startswith(("kvstack ", "python tests/")) and {"date", "torch", "gpu", "cpu"} <= found["environment"].keys()


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
    }
    environment = {"gpu": None, "cpu": "a CPU", "torch": "2", "date": "2026-01-01"}
    for line, rows in tables.items():
        path = tmp_path / "r.json"
        path.write_text(json.dumps({"command": "kvstack bench", "environment": environment, "rows": rows}))
        assert line in markdown([path]).splitlines()


@pytest.mark.parametrize("path", [*FILES, *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")], ids=lambda p: p.name)
def test_no_place_of_a_machine_is_told(path: Path) -> None:
    assert not re.search(r"(?<![\w.])/(root|home|tmp|work|mnt|Users)/", path.read_text("utf-8"))
