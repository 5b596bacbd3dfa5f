"""The tokenizer: every byte survives, every word of a task is one token, and a small text is enough to train one."""

import re
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvstack.lab.registry import bundled_model
from kvstack.lab.tokenizer import BOS, EOS, PAD, SPECIALS, VOCABULARY, Words, load_tokenizer, task_words, train_tokenizer

torch.set_num_threads(1)
LAB = load_tokenizer(bundled_model())
SMALL = train_tokenizer(["def add(a, b):\n    return a + b  # naïve\n" * 20])
BOTH = pytest.mark.parametrize("tok", [LAB, SMALL], ids=["bundled", "small"])


@BOTH
def test_ids_of_the_special_tokens(tok: Any) -> None:
    assert (tok.pad_token_id, tok.bos_token_id, tok.eos_token_id) == (PAD, BOS, EOS) == (0, 1, 2)
    assert tok.convert_ids_to_tokens([0, 1, 2]) == list(SPECIALS)


def test_the_vocabulary_has_its_size() -> None:
    assert len(LAB) == VOCABULARY == 4096
    assert sorted(LAB.get_vocab().values()) == list(range(4096))
    # A text that runs out of pairs to merge gives fewer tokens, but never more.
    assert 259 + len(task_words()) < len(SMALL) < 4096


@BOTH
def test_a_word_of_a_task_is_one_token_and_the_words_of_a_line_do_not_merge(tok: Any) -> None:
    words = Words(tok)
    assert len(set(words.ids.values())) == len(task_words()) and not {PAD, BOS, EOS} & set(words.ids.values())
    assert len(words.numbers) == 512 and len(words.letters) == 26
    for line in (
        ["recall", "\n", " 511", " 0", " =", " 17", " 300", "\n", " ?", "\n"],
        ["chain", "\n", " A", " =", " Z", " +", " 96", " :", " 3", " 4", "\n"],
        ["dfs", "\n", " start", " 7", " steps", " 10", "\n", " 1", " >", " 5", "\n", " 2", " <", " 7", "\n", " at", " stack", " seen"],
        ["modular", "\n", " keep", " Q", " =", " 5", "\n", " *", " 2", " =", " 10", "\n", "quote", "\n"],
    ):
        assert tok.encode("".join(line), add_special_tokens=False) == words(*line)


@BOTH
@settings(max_examples=200, deadline=None)
@given(text=st.text())
@example(text="a .\t b  ,\r\n\n  c 's \u200d\N{FULL BLOCK}\0 12345 naïve 数学 🂡")
@example(text=" <|bos|> <|pad|>")
def test_any_text_survives(tok: Any, text: str) -> None:
    assert tok.decode(tok.encode(text, add_special_tokens=False)) == text


def test_no_token_has_more_than_three_digits_or_mixes_kinds() -> None:
    for i in range(3, VOCABULARY):
        text = LAB.decode([i])
        assert not re.search(r"\d{4}|\w\s|\d[^\W\d]|[^\W\d_]\d", text), text


def test_training_is_a_function_of_the_text() -> None:
    texts = ["for i in range(10):\n    print(i)\n" * 30]
    vocabulary = train_tokenizer(texts).get_vocab()
    assert vocabulary == train_tokenizer(texts).get_vocab()
    assert vocabulary != SMALL.get_vocab()
    assert len(train_tokenizer(texts).encode(texts[0], add_special_tokens=False)) < len(texts[0]) / 2, "merges were learned"


def test_no_text_still_gives_the_words() -> None:
    Words(train_tokenizer([]))


@BOTH
def test_prompts_begin_as_training_did(tok: Any) -> None:
    assert tok("def f")["input_ids"] == [BOS, *tok.encode("def f", add_special_tokens=False)]
