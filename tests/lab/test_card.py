"""The card of a lab model: the facts of its training and the accuracies that were measured, and nothing it was not told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstack.errors import BadInputError
from kvstack.lab.card import write_card
from kvstack.lab.text import HELD_OUT, TUNING
from kvstack.lab.train import small

torch.set_num_threads(1)
POINT = {"step": 6, "seconds": 30.0, "progress": 0.5, "length": 128, "loss": 7.5, "answers": 0.25, "tokens": 6000}


def lab_folder(folder: Path, **changes: Any) -> Path:
    facts = {
        "config": vars(small()), "parameters": 1_234_567, "text_digest": "0123456789abcdef", "text_tokens": 7_654_321,
        "steps": 4321, "tokens": 88_000_000, "seconds": 90.0, "curve": [POINT, {**POINT, "seconds": 60.0, "loss": 6.5}],
    }  # fmt: skip
    folder.mkdir()
    (folder / "training.json").write_text(json.dumps({**facts, **changes}))
    return folder


def test_a_card_before_and_after_it_was_measured(tmp_path: Path) -> None:
    folder = lab_folder(tmp_path / "mine")
    write_card(folder)
    text = (folder / "README.md").read_text("utf-8")
    for part in (
        "# mine\n", "1,234,567 parameters", "7,654,321 tokens", "0123456789abcdef", "4,321 steps", "88 M tokens",
        "1.5 minutes", "2 layers, width 128", "Not measured yet",
    ):  # fmt: skip
        assert part in text
    assert all(name in text for name in (*HELD_OUT, *TUNING)), "what was held out is named"
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    tasks = {
        "recall": {"accuracy": 0.995, "low": 0.94, "high": 1.0, "n": 32},
        "dfs": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 32},
    }
    write_card(folder, [{"tokens": n, "bits_per_byte": 1.25, "tasks": tasks} for n in (1024, 4096)])
    text = (folder / "README.md").read_text("utf-8")
    assert "Not measured" not in text and "32 fresh samples" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines == [
        "| tokens | bits per byte | recall | dfs |",
        "|---|---|---|---|",
        "| 1024 | 1.2500 | 99.5 [94, 100] | 50.0 [40, 60] |",
        "| 4096 | 1.2500 | 99.5 [94, 100] | 50.0 [40, 60] |",
    ]


def test_a_run_too_short_for_a_curve_has_a_card_too(tmp_path: Path) -> None:
    folder = lab_folder(tmp_path / "brief", curve=[])
    write_card(folder)
    assert (folder / "curve.png").is_file()


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="Leave --card away"):
        write_card(tmp_path)
