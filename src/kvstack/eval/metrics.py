"""Means with their 95 % intervals. One value per sequence goes in: tokens of a sequence are not independent, sequences are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959964  # 97.5 % quantile of the normal distribution

# 97.5 % quantiles of Student's t for 1..30 degrees of freedom; above that the normal one is used with its first correction.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval over `n` sequences."""

    mean: float
    low: float
    high: float
    n: int


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t distribution."""
    return _T[freedom - 1] if freedom <= len(_T) else Z + (Z**3 + Z) / (4 * freedom)


def mean(values: Sequence[float]) -> Estimate:
    """Mean of one value per sequence with Student's interval; without spread information (n = 1) the interval is infinite."""
    x = np.asarray(values, np.float64)
    assert x.size > 0 and bool(np.isfinite(x).all()), "metrics take finite values of at least one sequence"
    if x.size == 1:
        return Estimate(float(x[0]), -math.inf, math.inf, 1)
    half = t_quantile(x.size - 1) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Estimate(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, int(x.size))


def paired(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Mean of `a - b` over the same sequences."""
    return mean(list(np.asarray(a, np.float64) - np.asarray(b, np.float64)))


def proportion(values: Sequence[float]) -> Estimate:
    """Mean of shares in [0, 1] with Wilson's interval, every sequence counted as one trial.

    Conservative: the items of a sequence are many trials, but not independent ones. It stays sensible at 0 and 1.
    """
    x = np.asarray(values, np.float64)
    assert x.size > 0 and bool(((x >= 0) & (x <= 1)).all())
    n, p = x.size, float(x.mean())
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), int(n))


def ratio_of_sums(top: Sequence[float], bottom: Sequence[float]) -> Estimate:
    """`sum(top) / sum(bottom)` over sequences (as in bits per byte) with the interval of the linearised ratio."""
    t, b = np.asarray(top, np.float64), np.asarray(bottom, np.float64)
    r = float(t.sum() / b.sum())
    e = mean(list((t - r * b) / b.mean()))
    return Estimate(r, r + e.low, r + e.high, e.n)
