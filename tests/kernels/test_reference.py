"""The torch reference of attention over tiers: equal to softmax attention in float64, and indifferent to what it must not read."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstack.codecs import Context, Polar
from kvstack.codecs.exact import ExactCodec
from kvstack.kernels.reference import Shape, Side, attend, attend_first, merge

torch.set_num_threads(1)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x: Tensor) -> Side:
    return Side(ExactCodec(x.shape[-1], x.dtype), (x,))


def truth(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None = None, sink: Tensor | None = None
) -> Tensor:
    """Softmax attention in float64, written out."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    logits = q.double() @ k.transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask[:, None], -math.inf)
    if sink is not None:
        logits = torch.cat([logits, sink.double()[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
    weights = torch.softmax(logits, -1)
    return weights[..., : k.shape[2]] @ v


def error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 5]), st.integers(1, 6), st.integers(1, 40),
    st.sampled_from([None, 5.0]), st.booleans(), st.lists(st.integers(1, 39), max_size=3),
)  # fmt: skip
def test_any_split_of_a_tier_gives_the_same(
    seed: int, b: int, h: int, g: int, t: int, n: int, softcap: float | None, sinks: bool, cuts: list[int]
) -> None:
    q, k, v = draw(seed, b, h * g, t, 32), draw(seed + 1, b, h, n, 32), draw(seed + 2, b, h, n, 32)
    mask = draw(seed + 3, b, t, n) > -0.5
    mask[:, :, 0] = True
    sink = draw(seed + 4, h * g) if sinks else None
    shape = Shape(0.3, softcap)
    edges = [0, *sorted({c for c in cuts if c < n}), n]
    parts = [attend(q, exact(k[:, :, i:j]), exact(v[:, :, i:j]), mask[:, :, i:j], shape) for i, j in itertools.pairwise(edges)]
    assert error(merge(parts, sink).out, truth(q, k, v, mask, 0.3, softcap, sink)) < 2e-6


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("precision", [Polar(), Polar(3, 2, scale="unbiased", centre=True)])
def test_codes_are_read_as_their_decoded_vectors(precision: Polar, head_dim: int, groups: int) -> None:
    b, h, t, n = 2, 2, 3, 50
    centre = draw(7, h, head_dim)
    codecs = [precision.build(side, Context(head_dim, h, torch.float32, torch.device("cpu"), centre)) for side in ("key", "value")]
    q, k, v = draw(1, b, h * groups, t, head_dim), draw(2, b, h, n, head_dim), draw(3, b, h, n, head_dim)
    sides = [Side(c, c.encode(x)) for c, x in zip(codecs, (k, v), strict=True)]
    decoded = [s.codec.decode(s.codes) for s in sides]
    mask = torch.ones(b, t, n, dtype=torch.bool)
    half = (torch.arange(n) < 20)[None, None]
    parts = [attend(q, *sides, half, Shape(0.1)), attend(q, exact(k[:, :, 20:]), exact(v[:, :, 20:]), None, Shape(0.1))]
    mixed = [torch.cat([d[:, :, :20], x[:, :, 20:]], 2) for d, x in zip(decoded, (k, v), strict=True)]
    assert error(merge(parts).out, truth(q, *mixed, mask, 0.1)) < 2e-6


def test_nothing_behind_the_mask_is_read() -> None:
    q, k, v = draw(1, 2, 4, 3, 32), draw(2, 2, 2, 20, 32), draw(3, 2, 2, 20, 32)
    mask = torch.arange(20) < torch.tensor([7, 20])[:, None, None]
    mask = mask.expand(2, 3, 20)
    expected = truth(q, k, v, mask, 1.0)
    k[0, :, 7:], v[0, :, 7:] = math.nan, math.nan
    out = attend(q, exact(k), exact(v), mask, Shape(1.0)).out
    assert error(out, expected) < 2e-6


def test_a_query_that_sees_nothing_gives_zero_and_weighs_nothing() -> None:
    q, k, v = draw(1, 1, 2, 2, 32), draw(2, 1, 1, 5, 32), draw(3, 1, 1, 5, 32)
    nothing = attend(q, exact(k), exact(v), torch.zeros(1, 2, 5, dtype=torch.bool), Shape(1.0))
    assert not nothing.out.any() and bool((nothing.lse == -math.inf).all())
    assert not merge([nothing, nothing]).out.any()
    some = attend(q, exact(k), exact(v), None, Shape(1.0))
    assert torch.equal(merge([nothing, some]).out, some.out)


def test_large_logits_do_not_overflow() -> None:
    q, k, v = 100 * draw(1, 1, 2, 2, 32), 100 * draw(2, 1, 1, 9, 32), draw(3, 1, 1, 9, 32)
    mask = torch.ones(1, 2, 9, dtype=torch.bool)
    assert error(attend(q, exact(k), exact(v), mask, Shape(1.0)).out, truth(q, k, v, mask, 1.0)) < 1e-5


@pytest.mark.parametrize("groups", [1, 3])
def test_the_first_chunk_is_causal_attention(groups: int) -> None:
    q, k, v = draw(1, 2, 2 * groups, 17, 64), draw(2, 2, 2, 17, 64), draw(3, 2, 2, 17, 64)
    causal = torch.ones(17, 17, dtype=torch.bool).tril().expand(2, 17, 17)
    assert error(attend_first(q, exact(k), exact(v), Shape(0.125)), truth(q, k, v, causal, 0.125)) < 2e-6
