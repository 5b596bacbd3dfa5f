"""Attention as a word: what is read is what is shown, and mistakes are pointed at."""

from typing import Any

import pytest

from kvstack.attention import words
from kvstack.attention.config import KINDS, DecoderConfig
from kvstack.errors import RecipeError

READ: dict[str, dict[str, Any]] = {
    "mha": {"attention": "mha"},
    "gqa(kv_heads=2)": {"attention": "gqa", "num_key_value_heads": 2},
    "mha(qk_norm=on)": {"attention": "mha", "qk_norm": True},
    "lrkv(rank=24, qk_norm=off)": {"attention": "lrkv", "rank": 24, "qk_norm": False},
    "mla(latent=480, rope=32)": {"attention": "mla", "latent_dim": 480, "rope_dim": 32},
    "lrkv(rank=24, variant=nope)": {"attention": "lrkv", "rank": 24, "variant": "nope"},
    "csa(pool=4, entries=8, window=16, rope=8, index_heads=2, index_dim=8)": {
        "attention": "csa", "pool": 4, "entries": 8, "window": 16, "rope_dim": 8, "index_heads": 2, "index_dim": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("text", READ)
def test_round_trip(text: str) -> None:
    assert words.read(text) == READ[text] and words.name(READ[text]) == text
    DecoderConfig(hidden_size=512, num_attention_heads=8, **READ[text])


def test_every_kind_has_a_word() -> None:
    assert set(words.WORDS) == set(KINDS)


def test_places_stand_for_names() -> None:
    assert words.read("lrkv(24, nope)") == READ["lrkv(rank=24, variant=nope)"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lkrv(24)", "lrkv"),
        ("lrkv(rnk=24)", "rank"),
        ("lrkv(rank=nope)", "whole number"),
        ("lrkv(24, 3)", "name"),
        ("gqa(4, 5)", "on or off"),
        ("mla(480, 32, 5)", "takes 2"),
        ("mla(480, 32, qk_norm=on)", "no argument"),
        ("mha+gqa(4)", "one word"),
        ("mla(480", "do not end"),
    ],
)
def test_mistakes(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        words.read(text)
