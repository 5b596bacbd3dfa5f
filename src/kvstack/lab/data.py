"""The endless mixture of text and tasks that a lab model is trained on, made by worker processes.

A batch is `tokens [B, T + 1]` (uint16, padded on the right) and `weights [B, T + 1]` (float16): how much predicting each token
counts. Answers count fully, text by half, the rest of a task next to nothing, padding not at all. The number of tokens in a batch
is constant: shorter sequences come in larger batches. With a fixed number of workers the stream is decided by the seed.
"""

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from random import Random

import numpy as np
from numpy.typing import NDArray

from kvstack.lab.tasks import TASKS, make
from kvstack.lab.tokenizer import BOS, PAD, Words

TEXT_WEIGHT, FILLER_WEIGHT = 0.5, 0.01

Batch = tuple[NDArray[np.uint16], NDArray[np.float16]]


@dataclass(frozen=True)
class Mixture:
    """Share of sequences that are text; the tasks share the rest equally. tokens: per batch."""

    text: float = 0.28
    tokens: int = 4096 * 24
    seed: int = 0


def batch(words: Words, rng: Random, length: int, text: NDArray[np.uint16], mix: Mixture) -> Batch:
    """One batch of sequences of `length` tokens, and one more to predict."""
    rows = max(1, mix.tokens // length)
    tokens = np.full((rows, length + 1), PAD, np.uint16)
    weights = np.zeros((rows, length + 1), np.float16)
    names = list(TASKS)
    for i in range(rows):
        if rng.random() < mix.text:
            at = rng.randrange(len(text) - length)
            tokens[i, 0], tokens[i, 1:] = BOS, text[at : at + length]
            weights[i, 1:] = TEXT_WEIGHT
            continue
        sample = make(rng.choice(names), words, rng, length + 1, text)  # type: ignore[arg-type]
        n = min(len(sample.tokens), length + 1)
        tokens[i, :n] = sample.tokens[:n]
        weights[i, 1:n] = FILLER_WEIGHT
        for a, b in sample.items:
            weights[i, a:b] = 1.0
    return tokens, weights


class Stream:
    """Batches of the current `length`, made ahead by `workers` processes. Use as a context manager."""

    def __init__(self, words: Words, text: NDArray[np.uint16], mix: Mixture, workers: int) -> None:
        # fork shares the text without a copy, and the workers never touch a GPU.
        ctx = multiprocessing.get_context("fork")
        self.length: Synchronized[int] = ctx.Value("i", 256)
        self._queues = [ctx.Queue(4) for _ in range(workers)]
        self._workers = [ctx.Process(target=self._work, args=(q, words, text, mix, i), daemon=True) for i, q in enumerate(self._queues)]
        for p in self._workers:
            p.start()

    def _work(self, queue: "multiprocessing.Queue[Batch]", words: Words, text: NDArray[np.uint16], mix: Mixture, index: int) -> None:
        rng = Random(f"{mix.seed}/{index}")
        while True:
            longest = self.length.value
            # A quarter of the batches is shorter, so that short contexts are not forgotten.
            shorter = [n for n in (256, 512, 1024, 2048) if n < longest]
            length = rng.choice(shorter) if shorter and rng.random() < 0.25 else longest
            queue.put(batch(words, rng, length, text, mix))

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for queue in self._queues:
                yield queue.get()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        for p in self._workers:
            p.terminate()
            p.join()
