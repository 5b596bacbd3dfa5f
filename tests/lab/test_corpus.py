"""The corpus: batches that only seed and step decide, windows where they should be, and files that keep all of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstack.errors import BadInputError
from kvstack.lab import corpus as module
from kvstack.lab.corpus import Corpus, as_tensor, corpus_facts, judged, load_corpus, make_corpus, places, save_corpus, windows
from kvstack.lab.text import held_out_text, training_text, tuning_text
from kvstack.lab.tokenizer import EOS, load_tokenizer

torch.set_num_threads(1)
CPU = torch.device("cpu")
COUNT = Corpus(*(np.arange(n, dtype=np.uint16) for n in (1000, 90, 70)), digest="0" * 16, bytes_per_token=3.5)


@given(
    seed=st.integers(0, 99),
    step=st.integers(0, 10**6),
    rows=st.integers(2, 64),
    spare=st.integers(1, 10**9),
    length=st.integers(1, 512),
)
def test_places_depend_on_seed_and_step_only(seed: int, step: int, rows: int, spare: int, length: int) -> None:
    tokens = length + spare
    state = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    found = places(seed, step, rows, tokens, length)
    np.random.default_rng().random(7)
    torch.rand(3)
    assert (places(seed, step, rows, tokens, length) == found).all() and (np.random.get_state()[1] == state).all()  # type: ignore[index]
    assert found.shape == (rows,) and found.min() >= 0 and found.max() + length + 1 <= tokens
    if spare > 10**6:
        for other in (places(seed + 1, step, rows, tokens, length), places(seed, step + 1, rows, tokens, length)):
            assert (other != found).any()


def test_places_reach_the_first_and_the_last_window() -> None:
    found = np.concatenate([places(0, step, 8, 12, 8) for step in range(20)])
    assert set(found) == {0, 1, 2, 3}


def test_windows_are_the_tokens_at_their_places() -> None:
    x = windows(as_tensor(COUNT.train, CPU), np.array([0, 17, 991]), 8)
    assert x.dtype == torch.long and x.tolist() == [list(range(n, n + 9)) for n in (0, 17, 991)]


def test_judged_windows_follow_each_other() -> None:
    x = judged(COUNT.test, 23, CPU)
    assert x.shape == (3, 24) and x[:, 1:].flatten().tolist() == list(range(1, 70)), "every target once"
    assert torch.equal(judged(COUNT.test, 23, CPU, most=2), x[:2])
    with pytest.raises(BadInputError, match="70 tokens, too few for a window of 70"):
        judged(COUNT.test, 70, CPU)


def test_a_file_keeps_all_of_it(tmp_path: Path) -> None:
    save_corpus(COUNT, tmp_path / "c.npz")
    found = load_corpus(tmp_path / "c.npz")
    for name in ("train", "tuning", "test"):
        assert getattr(found, name).dtype == np.uint16 and (getattr(found, name) == getattr(COUNT, name)).all()
    assert corpus_facts(found) == {
        "digest": "0" * 16, "bytes_per_token": 3.5, "train_tokens": 1000, "tuning_tokens": 90, "test_tokens": 70,
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["c.npz"]


@pytest.mark.parametrize("content", [None, b"not a zip", b"", b"PK\x03\x04 cut"])
def test_what_is_no_corpus_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInputError, match="Make one with `kvstack lab corpus"):
        load_corpus(path)


def test_arrays_of_something_else_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", train=COUNT.train)
    with pytest.raises(BadInputError, match="is no corpus"):
        load_corpus(tmp_path / "c.npz")


def test_documents_end_with_a_mark_and_slices_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, shares, tok = training_text(150_000), [], load_tokenizer(module.bundled_model())
    monkeypatch.setattr(module, "SLICE", 3)
    made = make_corpus(150_000, shares.append)
    assert (made.train == EOS).sum() == len(texts) > 3 and made.train[-1] == made.test[-1] == EOS
    assert tok.decode(made.train[: int(np.argmax(made.train == EOS))]) == texts[0]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert made.bytes_per_token == pytest.approx(len(held_out_text().encode()) / len(made.test))
    assert tok.decode(made.tuning[:-1]) == tuning_text()
    monkeypatch.undo()
    again = make_corpus(150_000)
    assert again.digest == made.digest and (again.train == made.train).all(), "of the tokens, however they were sliced"
