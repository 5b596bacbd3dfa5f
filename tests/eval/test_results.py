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
    assert found["command"].startswith("kvstack ") and {"date", "torch", "gpu", "cpu"} <= found["environment"].keys()


def test_the_page_is_made_from_the_files() -> None:
    assert (ROOT / "docs" / "results.md").read_text("utf-8") == markdown(FILES), "run `make results`"


@pytest.mark.parametrize("path", [*FILES, *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")], ids=lambda p: p.name)
def test_no_place_of_a_machine_is_told(path: Path) -> None:
    assert not re.search(r"(?<![\w.])/(root|home|tmp|work|mnt|Users)/", path.read_text("utf-8"))
