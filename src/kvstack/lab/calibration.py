"""What the forecast of a lab model is calibrated on: windows of text, and samples of the tasks that no evaluation sees.

Text alone does not show what a model keeps for a task. Seeds begin with "calibration/", which those of no evaluation do. Batches hold
sequences of one kind, padded on the right.
"""

from collections.abc import Collection, Mapping
from random import Random
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kvstack.calibrate.forecast import SHORTEST
from kvstack.errors import BadInputError
from kvstack.lab.tasks import TASKS, make
from kvstack.lab.tokenizer import BOS, PAD, Words

LENGTH, SAMPLES, ROWS = 2048, 64, 4


def calibration_batches(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    length: int = LENGTH,
    samples: int = SAMPLES,
    tasks: Collection[str] = tuple(TASKS),
    options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> list[dict[str, Tensor]]:
    """`samples` windows of `text`, and as many samples of each of the `tasks`, of at most `length` tokens.

    options: of tasks, by name. Batches of `input_ids` and `attention_mask`, both `[4, T]` or less. Samples too short for a forecast are
    drawn again. Raises BadInputError for unknown tasks, for options of others than these, for lengths below 512, at which there might
    be no others, and when the text is too short.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise BadInputError(f"There is no task {unknown[0]!r}. Choose from: {', '.join(TASKS)}.")
    if unused := [task for task in options if task not in tasks]:
        raise BadInputError(f"There are options of {unused[0]}, which is not calibrated on. Choose from: {', '.join(tasks)}.")
    if length < 2 * SHORTEST:
        raise BadInputError(f"A forecast is calibrated on {2 * SHORTEST} tokens or more, not {length}. Use a model with that context.")
    ids, words = tokenizer.encode(text, add_special_tokens=False), Words(tokenizer)
    if len(ids) <= length:
        raise BadInputError(f"The text has {len(ids)} tokens, and windows of {length} were asked for. Give a longer text.")
    batches = []
    for kind in ("text", *tasks):
        rng = Random(f"calibration/{kind}")
        rows: list[list[int]] = []
        while len(rows) < samples:
            if kind == "text":
                start = rng.randrange(len(ids) - length)
                row = [BOS, *ids[start : start + length - 1]]
            else:
                row = make(kind, words, rng, length, ids, **options.get(kind, {})).tokens
            if len(row) >= SHORTEST:
                rows.append(row)
        batches += [_padded(rows[i : i + ROWS]) for i in range(0, samples, ROWS)]
    return batches


def _padded(rows: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest) < torch.tensor([[len(row)] for row in rows])
    return {"input_ids": ids, "attention_mask": mask.long()}
