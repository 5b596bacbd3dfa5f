"""What a model is judged on: windows of text and task samples, as batches of token sequences with the places that count.

A `Batch` holds sequences of one kind, padded on the right. Text: every token counts, and the bytes that the tokens stand for.
Tasks: the items of each sample. Samples are drawn by name and seed, so any two recipes see the same ones.
A lab model with a vocabulary of its own is asked in that. Models with any other tokenizer get the bundled lab model's samples as text,
split at the borders of the answers.
The task `dfs_public` has a length of its own; all others fill the length that is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor

from kvstack.errors import BadInputError
from kvstack.lab.public_dfs import DEPTHS, dfs_public
from kvstack.lab.registry import bundled_model
from kvstack.lab.tasks import QUOTED, TASKS, Sample, make
from kvstack.lab.tokenizer import Words, is_lab_tokenizer, load_tokenizer

DFS_PUBLIC = "dfs_public"
EVERY_TASK = (*TASKS, DFS_PUBLIC)
# What users may set of a task, from least to most; whole numbers where these are whole.
OPTIONS: dict[str, dict[str, tuple[float, float]]] = {
    "recall": {"share": (0.0, 1.0)},
    "quote": {"share": (0.0, 1.0)},
    "chain": {"variables": (2, 26)},
    "modular": {"labels": (1, 26)},
    DFS_PUBLIC: {"depth": (DEPTHS[0], DEPTHS[-1])},
}


@dataclass(frozen=True)
class Batch:
    """tokens `[B, T]` padded on the right; lengths: tokens per row; items: answer spans per row; nbytes: text bytes per row.

    working_sets: tokens of each row that any solver must keep.
    """

    kind: str
    tokens: Tensor
    lengths: tuple[int, ...]
    items: tuple[tuple[tuple[int, int], ...], ...] = ()
    nbytes: tuple[int, ...] = ()
    working_sets: tuple[float, ...] = ()


@dataclass(frozen=True)
class SuiteConfig:
    """Sizes of a suite. length: tokens per sequence. options: arguments of single tasks, e.g. {"chain": {"variables": 26}}."""

    length: int = 1024
    text_sequences: int = 8
    task_samples: int = 8
    tasks: tuple[str, ...] = tuple(TASKS)
    batch: int = 4
    seed: int = 0
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


def _pad(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    out = torch.full((len(rows), max(map(len, rows))), pad)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out


def text_batches(tokenizer: Any, text: str, cfg: SuiteConfig) -> list[Batch]:
    """Consecutive windows of `text`, each of `cfg.length` tokens with the beginning token in front if there is one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    step = cfg.length - len(first)
    if len(ids) < step * cfg.text_sequences:
        raise BadInputError(
            f"The text has {len(ids)} tokens, but {cfg.text_sequences} windows of {step} were asked for. "
            "Give a longer text, or fewer or shorter windows."
        )
    rows = [ids[i * step : (i + 1) * step] for i in range(cfg.text_sequences)]
    out = []
    for at in range(0, len(rows), cfg.batch):
        part = rows[at : at + cfg.batch]
        sizes = tuple(len(tokenizer.decode(r).encode()) for r in part)
        out.append(Batch("text", _pad([first + r for r in part], 0), (cfg.length,) * len(part), nbytes=sizes))
    return out


def retokenised(sample: Sample, lab: Any, tokenizer: Any) -> Sample:
    """The same sample in the tokens of another tokenizer, item borders kept."""
    edges = sorted({1, len(sample.tokens) - 1, *(e for item in sample.items for e in item)})
    items = set(sample.items)
    out = Sample([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else [], working_set=sample.working_set)
    for a, b in pairwise(edges):
        ids = tokenizer.encode(lab.decode(sample.tokens[a:b]), add_special_tokens=False)
        if (a, b) in items:
            out.answer(ids)
        else:
            out.tokens += ids
    return out


def check_task(name: str) -> None:
    """Raise BadInputError unless there is a task `name`."""
    if name not in EVERY_TASK:
        raise BadInputError(f"There is no task {name!r}. Choose from: {', '.join(EVERY_TASK)}.")


def task_batches(tokenizer: Any, text: str, cfg: SuiteConfig) -> list[Batch]:
    """`cfg.task_samples` of every task in `cfg.tasks`."""
    for name in cfg.tasks:
        check_task(name)
    native = is_lab_tokenizer(tokenizer)
    lab = tokenizer if native else load_tokenizer(bundled_model())
    words, quotes = Words(lab), lab.encode(text[:400_000], add_special_tokens=False)
    if "quote" in cfg.tasks and len(quotes) <= QUOTED:
        raise BadInputError(f"The text has {len(quotes)} tokens, too few to quote. Give a longer text, or leave out the task quote.")
    out = []
    for name in cfg.tasks:
        rng = Random(f"{cfg.seed}/{name}/{cfg.length}")
        options = cfg.options.get(name, {})
        samples = [
            dfs_public(words, rng, **options) if name == DFS_PUBLIC else make(name, words, rng, cfg.length, quotes, **options)
            for _ in range(cfg.task_samples)
        ]
        if not native:
            samples = [retokenised(s, lab, tokenizer) for s in samples]
        for at in range(0, len(samples), cfg.batch):
            part = samples[at : at + cfg.batch]
            out.append(
                Batch(
                    name,
                    _pad([s.tokens for s in part], 0),
                    tuple(len(s.tokens) for s in part),
                    items=tuple(tuple(s.items) for s in part),
                    working_sets=tuple(s.working_set * len(s.tokens) for s in part),
                )
            )
    return out
