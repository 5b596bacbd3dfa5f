"""Batches for training: shapes, what counts how much, and the stream of the worker processes."""

from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from kvstack.lab import data
from kvstack.lab.data import Mixture, Stream, batch
from kvstack.lab.registry import bundled_model
from kvstack.lab.tasks import Sample, make
from kvstack.lab.tokenizer import BOS, PAD, VOCABULARY, Words, load_tokenizer

torch.set_num_threads(1)
WORDS = Words(load_tokenizer(bundled_model()))
TEXT = np.random.default_rng(0).integers(3, VOCABULARY, 5000).astype(np.uint16)


@pytest.mark.parametrize("length", [256, 512, 1024])
def test_shapes_and_a_constant_number_of_tokens(length: int) -> None:
    tokens, weights = batch(WORDS, Random(0), length, TEXT, Mixture(tokens=4096))
    assert tokens.shape == weights.shape == (4096 // length, length + 1)
    assert (tokens.dtype, weights.dtype) == (np.uint16, np.float16)
    assert tokens.max() < VOCABULARY
    assert not weights[:, 0].any(), "nothing predicts the first token"
    assert len(batch(WORDS, Random(0), 4096, TEXT, Mixture(tokens=1024))[0]) == 1, "at least one sequence"


def test_text_is_a_piece_of_the_text_and_counts_half() -> None:
    tokens, weights = batch(WORDS, Random(1), 256, TEXT, Mixture(text=1.0, tokens=2048))
    assert (tokens[:, 0] == BOS).all() and (weights[:, 1:] == 0.5).all()
    pieces = np.lib.stride_tricks.sliding_window_view(TEXT, 256)
    starts = {int(np.flatnonzero((pieces == row[1:]).all(1))[0]) for row in tokens}
    assert len(starts) == 8, "drawn from all over"


@pytest.mark.parametrize("length", [256, 1024])
def test_answers_count_fully_and_the_rest_of_a_task_hardly(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, Sample]] = []

    def recorded(name: Any, *args: Any, **options: Any) -> Sample:
        made.append((name, make(name, *args, **options)))
        return made[-1][1]

    monkeypatch.setattr(data, "make", recorded)
    tokens, weights = batch(WORDS, Random(2), length, TEXT, Mixture(text=0.0, tokens=60 * length))
    assert len(made) == 60 and len({name for name, _ in made}) == 5, "every task takes part"
    for row, weight, (_, sample) in zip(tokens, weights, made, strict=True):
        n = len(sample.tokens)
        assert row[:n].tolist() == sample.tokens and (row[n:] == PAD).all()
        answers = np.zeros(length + 1, bool)
        for a, b in sample.items:
            answers[a:b] = True
        assert ((weight == 1.0) == answers).all()
        assert (weight[1:n][~answers[1:n]] == np.float16(0.01)).all() and not weight[n:].any()


def test_the_share_of_text() -> None:
    _, weights = batch(WORDS, Random(3), 64, TEXT, Mixture(text=0.28, tokens=64 * 1000))
    assert (weights[:, 1] == 0.5).mean() == pytest.approx(0.28, abs=0.04)


def first(seed: int, n: int = 6) -> list[bytes]:
    with Stream(WORDS, TEXT, Mixture(tokens=1024, seed=seed), workers=1) as stream:
        return [tokens.tobytes() + weights.tobytes() for (tokens, weights), _ in zip(stream, range(n), strict=False)]


def test_a_seed_decides_the_stream() -> None:
    once = first(0)
    assert once == first(0) and once != first(1)
    assert len(set(once)) == len(once)


def test_workers_draw_different_samples_and_stop() -> None:
    with Stream(WORDS, TEXT, Mixture(tokens=1024), workers=2) as stream:
        processes = stream._workers
        assert len(processes) == 2 and all(p.is_alive() for p in processes)
        a, b = (tokens.tobytes() for (tokens, _), _ in zip(stream, range(2), strict=False))
        assert a != b
    assert not any(p.is_alive() for p in processes)


def test_longer_batches_come_when_asked_with_some_shorter_ones() -> None:
    with Stream(WORDS, TEXT, Mixture(tokens=1024), workers=1) as stream:
        lengths = []
        for tokens, _ in stream:
            stream.length.value = 1024
            lengths.append(tokens.shape[1] - 1)
            if len(lengths) == 80:
                break
    assert lengths[0] == 256
    later = lengths[20:]
    assert set(later) == {256, 512, 1024} and 0.5 < later.count(1024) / len(later) < 0.95
