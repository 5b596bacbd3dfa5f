"""What a model is judged on: windows of text that are as long as asked, and the same samples for whoever asks."""

from random import Random
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from kvstack.errors import BadInputError
from kvstack.eval.suite import Batch, SuiteConfig, retokenised, task_batches, text_batches
from kvstack.lab.registry import bundled_model
from kvstack.lab.tasks import TASKS, make
from kvstack.lab.tokenizer import BOS, EOS, Words, load_tokenizer, train_tokenizer

torch.set_num_threads(1)
LAB = load_tokenizer(bundled_model())
SQL = ["SELECT name, 数学 FROM table WHERE id >= 10;\n" * 40, "Übung macht den Meister. " * 40]
SECOND = train_tokenizer(SQL)


def foreign(**special: str) -> PreTrainedTokenizerFast:
    tok = ByteLevelBPETokenizer()
    tok.train_from_iterator(SQL, vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tok._tokenizer, pad_token="<pad>", eos_token="</s>", **special)


OTHER, BARE = foreign(bos_token="<s>"), foreign()
TEXT = "".join(f"def step_{i}(x, y):\n    return x * {i} + y  # line {i}\n\n\n" for i in range(400))


@pytest.mark.parametrize(("tok", "first"), [(LAB, 1), (OTHER, 1), (BARE, 0)], ids=["lab", "other", "bare"])
def test_windows_are_consecutive_and_full(tok: Any, first: int) -> None:
    batches = text_batches(tok, TEXT, SuiteConfig(length=100, text_sequences=7, batch=3))
    assert [len(b.tokens) for b in batches] == [3, 3, 1]
    rows = [row.tolist() for b in batches for row in b.tokens]
    assert all(len(row) == 100 for row in rows)
    assert all(b.kind == "text" and b.lengths == (100,) * len(b.tokens) and not b.items for b in batches)
    if first:
        assert all(row[0] == tok.bos_token_id == 1 for row in rows)
    read = [t for row in rows for t in row[first:]]
    assert read == tok.encode(TEXT, add_special_tokens=False)[: 7 * (100 - first)]
    # ASCII: as many bytes as characters, and the windows tile the text.
    sizes = [n for b in batches for n in b.nbytes]
    assert sum(sizes) == len(tok.decode(read)) and TEXT.startswith(tok.decode(read))
    assert sizes == [len(tok.decode(row[first:])) for row in rows]


def test_bytes_are_bytes_and_not_characters() -> None:
    text = "naïve Übung 数学 → ∀x∈∅.\n" * 60
    ids = LAB.encode(text, add_special_tokens=False)
    (batch,) = text_batches(LAB, text, SuiteConfig(length=len(ids) + 1, text_sequences=1))
    assert batch.nbytes == (len(text.encode()),) != (len(text),)
    # A window border inside a character costs no more than a few bytes.
    batches = text_batches(LAB, text, SuiteConfig(length=101, text_sequences=len(ids) // 100))
    assert sum(n for b in batches for n in b.nbytes) == pytest.approx(len(text.encode()) * (len(ids) // 100 * 100) / len(ids), rel=0.05)


def test_a_text_that_is_too_short_is_refused() -> None:
    n = len(LAB.encode(TEXT, add_special_tokens=False))
    assert text_batches(LAB, TEXT, SuiteConfig(length=n + 1, text_sequences=1))
    for length, windows in ((n + 2, 1), (n // 2 + 2, 2)):
        with pytest.raises(
            BadInputError, match=rf"The text has {n} tokens, but {windows} windows of {length - 1} were asked for\. Give"
        ):
            text_batches(LAB, TEXT, SuiteConfig(length=length, text_sequences=windows))
    with pytest.raises(BadInputError, match="too few to quote"):
        task_batches(LAB, "short", SuiteConfig(length=256, tasks=("recall", "quote")))
    assert not text_batches(LAB, "", SuiteConfig(text_sequences=0))


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"no task 'recal'\. Choose from: recall, quote, dfs, chain, modular, dfs_public\."):
        task_batches(LAB, TEXT, SuiteConfig(tasks=("dfs", "recal")))
    assert not task_batches(LAB, TEXT, SuiteConfig(tasks=()))


def drawn(tok: Any = LAB, **sizes: Any) -> list[Batch]:
    return task_batches(tok, TEXT, SuiteConfig(**{"length": 300, "task_samples": 5, "batch": 2, **sizes}))


def test_samples_come_by_task_in_batches_padded_on_the_right() -> None:
    batches = drawn()
    assert [(b.kind, len(b.tokens)) for b in batches] == [(name, n) for name in TASKS for n in (2, 2, 1)]
    assert any(len(set(b.lengths)) > 1 for b in batches), "or the padding is not tested"
    for b in batches:
        assert b.tokens.shape == (len(b.lengths), max(b.lengths)) and max(b.lengths) <= 300
        assert len(b.items) == len(b.lengths) and not b.nbytes
        for row, n, items in zip(b.tokens.tolist(), b.lengths, b.items, strict=True):
            assert row[0] == 1 and row[n - 1] == 2 and not any(row[n:]), "BOS, EOS, padding"
            assert items and items[-1][1] < n
        assert len(b.working_sets) == len(b.lengths) and all(0 < w <= n for w, n in zip(b.working_sets, b.lengths, strict=True))


def same(a: list[Batch], b: list[Batch]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x.tokens, y.tokens) and (x.lengths, x.items) == (y.lengths, y.items) for x, y in pairs)


def test_a_seed_decides_the_samples_and_other_tasks_do_not() -> None:
    batches = drawn(seed=3)
    assert same(batches, drawn(seed=3)) and not same(batches, drawn(seed=4))
    assert same([b for b in batches if b.kind == "dfs"], drawn(seed=3, tasks=("dfs",)))
    rows = [row.tolist()[:n] for b in batches for row, n in zip(b.tokens, b.lengths, strict=True)]
    assert len(set(map(tuple, rows))) == len(rows), "no sample comes twice"
    # The first samples are the same ones when more are asked for.
    more = drawn(seed=3, tasks=("chain",), task_samples=9)
    assert same([b for b in batches if b.kind == "chain"][:2], more[:2])


def test_options_reach_their_task() -> None:
    (batch,) = drawn(tasks=("chain",), task_samples=1, options={"chain": {"variables": 17}, "dfs": {"steps": 3}})
    assert len([line for line in LAB.decode(batch.tokens[0]).splitlines() if line.count(" ") == 3 and "=" in line]) == 17


@pytest.mark.parametrize("tok", [OTHER, BARE], ids=["other", "bare"])
def test_another_tokenizer_gets_the_same_text_and_the_same_answers(tok: Any) -> None:
    for ours, theirs in zip(drawn(), drawn(tok), strict=True):
        assert ours.kind == theirs.kind
        for i, (own, their) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
            n, m = ours.lengths[i], theirs.lengths[i]
            first = 0 if tok.bos_token_id is None else 1
            assert tok.decode(their[first:m]) == LAB.decode(own[1 : n - 1])
            assert [tok.decode(their[a:b]) for a, b in theirs.items[i]] == [LAB.decode(own[a:b]) for a, b in ours.items[i]]
            assert theirs.items[i][0][0] >= 1, "something predicts the first answer"


def test_a_second_lab_vocabulary_is_asked_in_its_own_tokens() -> None:
    assert SECOND.get_vocab() != LAB.get_vocab()
    own = Words(SECOND)
    for batch in drawn(SECOND):
        assert all(row[0] == BOS and row[n - 1] == EOS for row, n in zip(batch.tokens.tolist(), batch.lengths, strict=True))
        assert batch.tokens[0, 1] == own.ids[batch.kind]
        if batch.kind == "quote":  # as many of its own tokens as it learnt to quote, out of the same text
            assert {b - a for items in batch.items for a, b in items} == {8}
            assert SECOND.decode(batch.tokens[0, slice(*batch.items[0][0])]) in TEXT
    for there, here in zip(drawn(SECOND, tasks=("chain",)), drawn(tasks=("chain",)), strict=True):
        assert SECOND.batch_decode(there.tokens) == LAB.batch_decode(here.tokens), "the same samples, in other numbers"


def test_retokenising_keeps_what_is_not_tokens() -> None:
    sample = make("recall", Words(LAB), Random(0), 256, [], share=0.5)
    there = retokenised(sample, LAB, OTHER)
    assert there.working_set == sample.working_set and len(there.items) == len(sample.items)
    there.tokens.append(OTHER.eos_token_id)
    assert retokenised(there, OTHER, LAB).tokens == sample.tokens[:-1], "there and back, all but the end"
