"""Intervals: against quantiles that are integrated here, examples from the literature, and how often they cover the truth."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstack.eval.metrics import Estimate, Z, mean, paired, proportion, ratio_of_sums, t_quantile

torch.set_num_threads(1)
DRAWS = 2000


def t_probability(q: float, freedom: int) -> float:
    """P(T <= q) for q > 0 by the trapezium rule."""
    x = np.linspace(0.0, q, 20_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    return 0.5 + float(np.trapezoid(np.exp(log_scale) * (1 + x * x / freedom) ** (-(freedom + 1) / 2), x))


@pytest.mark.parametrize("freedom", [*range(1, 41), 60, 100, 1000])
def test_t_quantiles_leave_two_and_a_half_per_cent(freedom: int) -> None:
    assert t_probability(t_quantile(freedom), freedom) == pytest.approx(0.975, abs=2e-4)


def test_t_quantiles_from_tables() -> None:
    for freedom, q in ((1, 12.706), (4, 2.776), (10, 2.228), (30, 2.042), (60, 2.000), (120, 1.980)):
        assert t_quantile(freedom) == pytest.approx(q, abs=6e-4)
    assert all(t_quantile(n) > t_quantile(n + 1) > Z for n in range(1, 200))


def test_a_mean_worked_out_by_hand() -> None:
    e = mean([1.0, 2.0, 3.0, 4.0])
    half = 3.182 * math.sqrt(5 / 3) / 2
    assert (e.mean, e.n) == (2.5, 4)
    assert (e.low, e.high) == pytest.approx((2.5 - half, 2.5 + half))


def test_one_sequence_says_nothing_about_the_spread() -> None:
    assert mean([3.0]) == Estimate(3.0, -math.inf, math.inf, 1)
    assert paired([3.0], [1.0]) == Estimate(2.0, -math.inf, math.inf, 1)
    assert ratio_of_sums([3.0], [2.0]) == Estimate(1.5, -math.inf, math.inf, 1)
    assert mean([3.0, 3.0]) == Estimate(3.0, 3.0, 3.0, 2)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [-math.inf, 0.0]])
def test_values_that_are_none(values: list[float]) -> None:
    with pytest.raises(AssertionError):
        mean(values)
    with pytest.raises(AssertionError):
        proportion(values)


@pytest.mark.parametrize("values", [[1.1], [-0.1, 0.5]])
def test_a_share_is_between_nought_and_one(values: list[float]) -> None:
    with pytest.raises(AssertionError):
        proportion(values)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Wilson's intervals as in Brown, Cai and DasGupta (2001) and common tables
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0), (15, 20, 0.5313, 0.8881),
     (81, 263, 0.2553, 0.3662)],
)  # fmt: skip
def test_wilson_intervals_that_are_known(right: int, n: int, low: float, high: float) -> None:
    e = proportion([1.0] * right + [0.0] * (n - right))
    assert (e.low, e.high) == pytest.approx((low, high), abs=6e-5)
    assert (e.mean, e.n) == (right / n, n)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40))
def test_a_proportion_lies_in_its_interval(values: list[float]) -> None:
    e = proportion(values)
    assert 0.0 <= e.low <= e.mean + 1e-12 and e.mean - 1e-12 <= e.high <= 1.0
    assert e.high - e.low > 0.0, "not even all right is certain"
    mirrored = proportion([1.0 - v for v in values])
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - e.high, 1 - e.low), abs=1e-9)


def test_wilson_covers_exactly_summed() -> None:
    """The binomial chance that the interval covers p, averaged over p: no draws."""
    n = 16
    chance = []
    for p in np.linspace(0.05, 0.95, 91):
        covered = [k for k in range(n + 1) if (e := proportion([1.0] * k + [0.0] * (n - k))).low <= p <= e.high]
        chance.append(sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in covered))
    assert 0.94 < np.mean(chance) < 0.97 and min(chance) > 0.88


def coverage(truth: float, draw: Callable[[np.random.Generator], Estimate]) -> float:
    rng = np.random.default_rng(0)
    hits = [e.low <= truth <= e.high for e in (draw(rng) for _ in range(DRAWS))]
    return sum(hits) / DRAWS


@pytest.mark.parametrize("n", [2, 4, 8, 16, 50])
def test_intervals_of_a_mean_cover_it(n: int) -> None:
    assert 0.935 < coverage(2.0, lambda rng: mean(list(rng.normal(2.0, 3.0, n)))) < 0.965


@pytest.mark.parametrize("n", [8, 16, 50])
def test_intervals_of_a_ratio_cover_it(n: int) -> None:
    def draw(rng: np.random.Generator) -> Estimate:
        # Sequences with more bytes cost more bits, and each is easier or harder than the last.
        sizes = rng.uniform(2000, 4000, n)
        return ratio_of_sums(list(sizes * rng.normal(1.3, 0.2, n)), list(sizes))

    assert 0.93 < coverage(1.3, draw) < 0.97


def test_a_ratio_of_sums_weighs_by_size() -> None:
    assert ratio_of_sums([2.0, 30.0], [1.0, 10.0]).mean == pytest.approx(32 / 11)
    e = ratio_of_sums([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (e.low, e.mean, e.high) == pytest.approx((2.0, 2.0, 2.0)), "no spread about the ratio, no width"
    top, bottom = [2.0, 4.5, 5.5], [1.0, 2.0, 3.0]
    r = 12 / 6
    residual = mean([(t - r * b) / 2.0 for t, b in zip(top, bottom, strict=True)])
    e = ratio_of_sums(top, bottom)
    assert (e.low, e.high) == pytest.approx((r + residual.low, r + residual.high))


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.floats(-10, 10), st.floats(0.1, 10))
def test_an_interval_moves_and_stretches_with_its_values(values: list[float], shift: float, scale: float) -> None:
    e, moved = mean(values), mean([scale * v + shift for v in values])
    for a, b in ((e.low, moved.low), (e.mean, moved.mean), (e.high, moved.high)):
        assert b == pytest.approx(scale * a + shift, abs=1e-6 * (1 + scale * 1e3))


def test_pairs_see_a_small_change_of_values_that_differ_much() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(10.0, 5.0, 20)
    after = before + rng.normal(0.1, 0.05, 20)
    e = paired(list(after), list(before))
    assert e == mean(list(after - before))
    assert 0.0 < e.low < 0.1 < e.high < 0.2
    assert mean(list(after)).low < mean(list(before)).mean, "unpaired, the change is lost in the spread"
    assert 0.935 < coverage(0.1, lambda g: paired(list((x := g.normal(10, 5, 8)) + g.normal(0.1, 0.05, 8)), list(x))) < 0.965
