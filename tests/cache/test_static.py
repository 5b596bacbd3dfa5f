"""The store of fixed size: its ring against a list of tokens, and its attention against the flexible store's."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstack.cache.static import Size, StaticStore, Steps
from kvstack.cache.store import LayerStore
from kvstack.codecs import Context
from kvstack.errors import RecipeError
from kvstack.kernels.decode import schedule
from kvstack.kernels.pages import PAGE, Format
from kvstack.kernels.reference import Shape
from kvstack.recipe import Recipe

torch.set_num_threads(1)
CPU = torch.device("cpu")
H, GROUPS, D = 2, 2, 64


def steps_of(batch: int, sinks: int, window: int, new: int = 1, capacity: int = 1000) -> Steps:
    return Steps(Size(batch, H, capacity, new), sinks, window, CPU)


class Ring:
    """One row by the words of the module: tokens in slots and in the body, one at a time."""

    def __init__(self, sinks: int, window: int, new: int) -> None:
        self.sinks, self.window, self.ring, self.new = sinks, window, window + new, new
        self.length = 0
        self.slots: dict[int, int] = {}  # which token is in a slot
        self.body: list[int] = []

    def slot(self, token: int) -> int:
        return token if token < self.sinks else self.sinks + (token - self.sinks) % self.ring

    def step(self) -> tuple[list[int], list[set[int]], list[int]]:
        """Slots of the new tokens, those that each of them sees, those that leave afterwards."""
        put, sees = [], []
        for _ in range(self.new):
            self.slots[self.slot(self.length)] = self.length
            put.append(self.slot(self.length))
            self.length += 1
        for token in range(self.length - self.new, self.length):
            sees.append({slot for slot, held in self.slots.items() if held <= token and held not in self.body})
        leaving = range(self.sinks + len(self.body), max(self.length - self.window, self.sinks + len(self.body)))
        out = [self.slot(token) for token in leaving]
        assert [self.slots[slot] for slot in out] == list(leaving), "a token was overwritten before it left"
        self.body += leaving
        return put, sees, out


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([0, 1, 5, 128]), st.sampled_from([0, 4]), st.sampled_from([1, 3]), st.lists(st.integers(0, 300), min_size=3, max_size=3))
def test_a_step_is_what_a_ring_does(window: int, sinks: int, new: int, lengths: list[int]) -> None:
    """Rows of any lengths, for some steps more; every query sees the sinks, the window, and what is not in the body yet."""
    lengths = [n // new * new for n in lengths]  # tokens of a ring come in steps
    rows = [Ring(sinks, window, new) for _ in lengths]
    for row, n in zip(rows, lengths, strict=True):
        while row.length < n:
            row.step()
    steps = steps_of(len(rows), sinks, window, new)
    steps.lengths.copy_(torch.tensor(lengths))
    steps.refresh()
    places = [t.data_ptr() for t in vars(steps).values() if isinstance(t, Tensor)]
    for _ in range(4):
        for i, row in enumerate(rows):
            assert int(steps.lengths[i]) == row.length and int(steps.body[i]) == len(row.body)
            before = set(row.body)
            put, sees, out = row.step()
            assert steps.slots[i].tolist() == put
            assert [set(x.nonzero().flatten().tolist()) for x in steps.seen[i]] == sees
            assert steps.leaving[i, : int(steps.leaves[i])].tolist() == out
            # Together with the body, every query has seen every token up to its own, once.
            for token, slots in enumerate(sees, row.length - new):
                assert sorted([*before, *(row.slots[s] for s in slots)]) == list(range(sinks if False else 0, token + 1)) or before
        assert torch.equal(steps.cum, schedule(steps.body, H))
        steps.advance()
    assert places == [t.data_ptr() for t in vars(steps).values() if isinstance(t, Tensor)]
