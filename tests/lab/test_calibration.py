"""What forecasts of lab models are calibrated on: every family, long enough, padded behind, the same every time, and no result's."""

from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstack.errors import BadInputError
from kvstack.lab.calibration import calibration_batches
from kvstack.lab.registry import bundled_model
from kvstack.lab.tasks import TASKS, make
from kvstack.lab.text import tuning_text
from kvstack.lab.tokenizer import BOS, Words, load_tokenizer

torch.set_num_threads(1)
TOKENIZER = load_tokenizer(bundled_model())
TEXT = tuning_text()[:60_000]


def rows(**arguments: Any) -> list[Tensor]:
    """The sequences of the batches, without padding."""
    out = []
    for batch in calibration_batches(TOKENIZER, TEXT, **arguments):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert len(ids) <= 4 and ids.shape == mask.shape and (mask[:, 1:] <= mask[:, :-1]).all(), "padding is on the right"
        assert mask.any(0).all() and not ids[mask == 0].any()
        out += [row[real.bool()] for row, real in zip(ids, mask, strict=True)]
    return out


def kind(row: Tensor) -> str:
    header = TOKENIZER.decode(row[1:2])
    return header if header in TASKS else "text"


def test_every_family_has_its_samples() -> None:
    found = rows(length=600, samples=6)
    assert [kind(row) for row in found] == [k for k in ("text", *TASKS) for _ in range(6)]
    for row in found:
        assert 256 <= len(row) <= 600 and row[0] == BOS
    assert len({tuple(row.tolist()) for row in found}) == len(found)
    assert all(torch.equal(a, b) for a, b in zip(found, rows(length=600, samples=6), strict=True))


def test_families_can_be_left_out_and_others_stay_what_they_are() -> None:
    every, some = rows(length=600, samples=3), rows(length=600, samples=3, tasks=("dfs", "recall"))
    assert [kind(row) for row in some] == ["text"] * 3 + ["dfs"] * 3 + ["recall"] * 3
    assert {tuple(row.tolist()) for row in some} < {tuple(row.tolist()) for row in every}
    assert [kind(row) for row in rows(length=600, samples=3, tasks=())] == ["text"] * 3


def test_tasks_have_options() -> None:
    plain, few = (rows(length=600, samples=2, tasks=("chain", "dfs"), options=o) for o in ({}, {"chain": {"variables": 5}}))
    for i, (a, b) in enumerate(zip(plain, few, strict=True)):
        assert torch.equal(a, b) == (i // 2 != 1), "only chain has others"
    for row in few[2:4]:
        steps = TOKENIZER.decode(row).split(" ?")[0]
        assert steps.count("\n") - steps.count(" +") == 6, "the header and five variables"


def test_no_evaluation_sees_them() -> None:
    mine = {tuple(row.tolist()) for row in rows(length=600, samples=3)}
    words, ids = Words(TOKENIZER), TOKENIZER.encode(TEXT, add_special_tokens=False)
    for seed in range(3):
        for task in TASKS:
            rng = Random(f"{seed}/{task}/600")  # as in eval/suite.py
            assert mine.isdisjoint(tuple(make(task, words, rng, 600, ids).tokens) for _ in range(3))


def test_refused() -> None:
    with pytest.raises(BadInputError, match=r"no task 'recal'\. Choose from: recall, quote"):
        rows(tasks=("recal",))
    with pytest.raises(BadInputError, match=r"options of dfs, which is not calibrated on\. Choose from: recall"):
        rows(tasks=("recall",), options={"dfs": {}})
    with pytest.raises(BadInputError, match="512 tokens or more, not 511"):
        rows(length=511)
    with pytest.raises(BadInputError, match="Give a longer text"):
        calibration_batches(TOKENIZER, "x = 1\n" * 100)
