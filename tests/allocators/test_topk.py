"""Which tokens stay, against a sort of a list, in all four modes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstack.allocators import indices, kept

torch.set_num_threads(1)
SCORES = torch.tensor([-math.inf, -2.0, -0.0, 0.0, 0.5, 3.0, math.inf])  # few, so that many are equal
SEEDS = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


def draw(g: torch.Generator, *shape: int) -> Tensor:
    return SCORES[torch.randint(0, len(SCORES), shape, generator=g)]


def best(scores: Tensor, count: int) -> Tensor:
    """The rule of the module for one list of scores, `[N]`: sort by score, then by place, and leave out what is no token."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:count]
    out = torch.zeros(len(scores), dtype=torch.bool)
    out[[i for i in order if scores[i] > -math.inf]] = True
    return out


@settings(max_examples=80, deadline=None)
@given(SEEDS, st.integers(1, 3), st.lists(st.integers(0, 6), min_size=1, max_size=3))
def test_heads_apart_and_pooled_keep_the_greatest(g: torch.Generator, h: int, lengths: list[int]) -> None:
    """Layers of different lengths, N = 0 among them; the pooled list is layer by layer, head by head, old to new."""
    b = 2
    scores = [draw(g, b, h, n) for n in lengths]
    counts = [torch.randint(0, 9, (b, h), generator=g) for _ in lengths]
    apart, pooled = kept(scores, counts, "separate"), kept(scores, counts, "pooled")
    for row in range(b):
        for s, c, mask in zip(scores, counts, apart, strict=True):
            for head in range(h):
                assert torch.equal(mask[row, head], best(s[row, head], int(c[row, head])))
        flat, total = torch.cat([s[row].flatten() for s in scores]), sum(int(c[row].sum()) for c in counts)
        assert torch.equal(torch.cat([m[row].flatten() for m in pooled]), best(flat, total))
        assert sum(int(m[row].sum()) for m in pooled) == min(total, int((flat > -math.inf).sum()))
    assert [m.shape for m in pooled] == [s.shape for s in scores]


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(0, 9), st.integers(1, 3), st.integers(0, 9))
def test_agreement_is_by_the_mean_of_layers_and_by_the_greatest_of_all(g: torch.Generator, n: int, layers: int, count: int) -> None:
    b, h = 2, 2
    special = draw(g, b, 1, n).expand(b, h, n)  # what is infinite is so in all layers: such tokens are not there, or protected
    scores = [torch.where(special.isinf(), special, draw(g, b, h, n).nan_to_num(posinf=5, neginf=-5)) for _ in range(layers)]
    counts = [torch.full((b, h), count)] * layers
    shared, union = kept(scores, counts, "shared"), kept(scores, counts, "union")
    for row in range(b):
        for head in range(h):
            mean = torch.stack([s[row, head] for s in scores]).mean(0)
            greatest = torch.stack([s[row, i] for s in scores for i in range(h)]).amax(0)
            assert all(torch.equal(m[row, head], best(mean, count)) for m in shared)
            assert all(torch.equal(m[row, head], best(greatest, count)) for m in union)


@pytest.mark.parametrize("heads", ["separate", "shared", "union", "pooled"])
def test_the_older_token_wins_and_infinity_stays(heads: str) -> None:
    n = 3000  # beyond what a stable sort gets right by chance
    scores = torch.zeros(1, 2, n)
    scores[..., -7:], scores[..., 5] = torch.inf, -torch.inf
    for mask in kept([scores, scores], [torch.full((1, 2), 20)] * 2, heads):
        if heads == "pooled":
            assert mask[..., -7:].all() and not mask[..., 5].any()
        else:
            assert mask.nonzero()[:, 2].reshape(2, 20).tolist() == [[*range(5), *range(6, 14), *range(n - 7, n)]] * 2
    if heads == "pooled":  # 28 of 80 places are protected, and the rest is of the first head of the first layer
        first, second = kept([scores, scores], [torch.full((1, 2), 20)] * 2, heads)
        assert (first.sum(-1).tolist(), second.sum(-1).tolist()) == ([[7 + 52, 7]], [[7, 7]])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(0, 9))
def test_indices_are_those_of_a_mask(rows: list[list[bool]], width: int) -> None:
    mask = torch.tensor(rows)[:, None, :width]
    most = int(mask.sum(-1).max()) + 1
    found = indices(mask, most)
    assert found.dtype == torch.int32 and found.shape == (len(rows), 1, most) and found.is_contiguous()
    for row, at in zip(mask, found, strict=True):
        real = row[0].nonzero().flatten()
        assert at[0, : len(real)].tolist() == real.tolist()
        assert width == 0 or bool((at >= 0).all() and (at < width).all())
