"""Tokens that stay by their scores: the torch twin by a sort of a list and by `allocators`, and the kernel by the twin.

Scores behind the ends of rows are NaN or the greatest of all: nobody may look at them.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstack.allocators import indices, kept
from kvstack.kernels.select import select
from kvstack.kernels.top import top
from kvstack.scorers.base import standardised

torch.set_num_threads(1)
pytestmark = [  # all of Triton's interpreter
    pytest.mark.filterwarnings(f"ignore:{what}")
    for what in ("Conversion of an array:DeprecationWarning", "invalid value:RuntimeWarning", "divide by zero:RuntimeWarning")
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPECIAL = torch.tensor([-math.inf, math.nan, -3e38, -2.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 3e38, math.inf])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def poisoned(raw: Tensor, lengths: Tensor) -> Tensor:
    """Scores with NaN and +inf behind the ends of rows."""
    place = torch.arange(raw.shape[-1])
    return torch.where(place < lengths[:, None, None, None], raw, torch.where(place % 2 == 0, math.nan, math.inf))


def check(raw: Tensor, lengths: Tensor, places: int, standardise: bool) -> Tensor:
    """What the twin returns in order, if the kernel returns the same tokens, in order or in place."""
    raw, n = poisoned(raw, lengths), raw.shape[-1]
    for ordered in (False, True):
        wanted = select(raw, lengths, places, standardise, ordered)
        found = top(raw.to(DEVICE), lengths.to(DEVICE), places, standardise, ordered).cpu()
        for x in (wanted, found):
            assert x.shape == (*raw.shape[:2], places) and x.dtype == torch.int32 and x.is_contiguous()
            assert bool(((x >= 0) & (x < n)).all())
        for b, length in enumerate(lengths.tolist()):
            assert torch.equal(found[b, :, : min(places, length)], wanted[b, :, : min(places, length)])
    return wanted


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 12))
def test_the_twin_sorts(seed: int, groups: int, n: int) -> None:
    """Greatest first, NaN as -inf, of equal ones the older first; as many as there are places or tokens."""
    g = generator(seed)
    raw = SPECIAL[torch.randint(len(SPECIAL), (3, 2, groups, n), generator=g)]
    lengths, places = torch.randint(n + 1, (3,), generator=g).int(), int(torch.randint(n + 1, (), generator=g))
    found, in_place = (select(poisoned(raw, lengths), lengths, places, False, ordered) for ordered in (True, False))
    for b, length in enumerate(lengths.tolist()):
        for h in range(2):
            scores = [max(-math.inf if math.isnan(x) else x for x in raw[b, h, :, i].tolist()) for i in range(length)]
            best = sorted(range(length), key=lambda i: (-scores[i], i))[:places]
            assert found[b, h, : len(best)].tolist() == sorted(best)
            moving = iter(sorted(i for i in best if i >= len(best)))
            assert in_place[b, h, : len(best)].tolist() == [i if i in best else next(moving) for i in range(len(best))]


@pytest.mark.parametrize("standardise", [False, True])
def test_the_twin_is_what_allocators_say(standardise: bool) -> None:
    raw, lengths = torch.randn(4, 3, 2, 50, generator=generator(1)), torch.tensor([50, 31, 20, 7], dtype=torch.int32)
    valid = (torch.arange(50) < lengths[:, None, None]).expand(-1, 3, -1)
    scores = (standardised(raw, valid[:, :, None]) if standardise else raw).amax(2).masked_fill(~valid, -math.inf)
    counts = lengths.clamp_max(20)
    (mask,) = kept([scores], [counts[:, None].expand(-1, 3)], "separate")
    found, wanted = check(raw, lengths, 20, standardise), indices(mask, 20)
    for b, count in enumerate(counts.tolist()):
        assert torch.equal(found[b, :, :count], wanted[b, :, :count])


@pytest.mark.parametrize(("groups", "n"), [(1, 1), (1, 7), (3, 7), (1, 128), (1, 1024), (1, 1025), (3, 1025), (3, 2100)])
def test_the_kernel_with_scores_that_are_equal_and_infinite(n: int, groups: int) -> None:
    raw = SPECIAL[torch.randint(len(SPECIAL), (5, 2, groups, n), generator=generator(n))]
    raw[0] = 0.25
    lengths = torch.tensor([n, n, n - 1, n // 2, 0], dtype=torch.int32)
    for places in sorted({0, 1, n // 3, n - 1, n}):
        found = check(raw, lengths, places, False)
        assert found[0].tolist() == [list(range(places))] * 2


@pytest.mark.parametrize(("groups", "n"), [(1, 640), (2, 77), (4, 1500), (5, 384), (16, 256), (20, 300)])
def test_the_kernel_standardises(groups: int, n: int) -> None:
    """Scores of every size and place; on a grid, so that their order is the same whatever the last bits are."""
    g = generator(groups)
    raw = torch.stack([torch.randperm(n * groups, generator=g).view(groups, n).float() for _ in range(6)]).view(3, 2, groups, n)
    offset, size = torch.randn(2, 3, 2, groups, 1, generator=g)
    raw = offset + raw / n * torch.exp(2 * size)
    lengths = torch.tensor([n, n - 60, 5], dtype=torch.int32)
    found = check(raw, lengths, n // 2, True)
    assert groups == 1 or not torch.equal(found[0], select(raw, lengths, n // 2, False, True)[0]), "as it is, one query head decides"


def test_what_has_no_deviation_keeps_the_oldest() -> None:
    """All scores of a query head are equal, or one is NaN or infinite, so that none says anything."""
    raw = torch.full((3, 1, 2, 200), 3.0)
    raw[1, 0, :, 7], raw[2, 0, :, 9] = math.nan, math.inf
    found = check(raw, torch.tensor([200, 200, 200], dtype=torch.int32), 50, True)
    assert found.tolist() == [[list(range(50))]] * 3


def test_rows_that_are_long() -> None:
    """More tokens than a program of short rows takes; among few values, so that the last one is shared by many."""
    raw = torch.randint(20, (2, 1, 2, 9000), generator=generator(5)).float()
    check(raw, torch.tensor([9000, 8200], dtype=torch.int32), 4000, False)
