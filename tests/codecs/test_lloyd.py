"""Codebooks: optimal for the exact density, equal to known values, and exactly representable where they must be."""

import numpy as np
import pytest
import torch

from kvstack.codecs.lloyd import Codebook, e4m3, lloyd_max

# Distortion at d = 128 (research/precision.md 1.2).
KNOWN = {1: 0.3609, 2: 0.1160, 3: 0.0340, 4: 0.00932, 5: 0.00245}
FOUR_BITS = [0.1279, 0.3864, 0.6536, 0.9371, 1.2478, 1.6043, 2.0459, 2.6889]


def sample(d: int, n: int = 20_000) -> np.ndarray:
    """Coordinates of uniform unit vectors times sqrt(d), `[n, d]`."""
    x = np.random.default_rng(d).standard_normal((n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt(d)


def nearest(y: np.ndarray, book: Codebook) -> np.ndarray:
    levels = np.array(book.levels) * book.gain
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, y)]


@pytest.mark.parametrize("bits", KNOWN)
def test_known_values(bits: int) -> None:
    assert lloyd_max(bits, 128).distortion == pytest.approx(KNOWN[bits], rel=4e-3)  # the table has three digits
    assert lloyd_max(bits, 128).gain == 1


def test_known_levels() -> None:
    assert lloyd_max(4, 128).levels[8:] == pytest.approx(FOUR_BITS, abs=6e-5)
    assert lloyd_max(1, 100_000).levels[1] == pytest.approx((2 / np.pi) ** 0.5, rel=1e-4)  # the Gaussian limit
    assert lloyd_max(1, 100_000).distortion == pytest.approx(1 - 2 / np.pi, rel=1e-4)


@pytest.mark.parametrize("d", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", KNOWN)
def test_optimal(bits: int, d: int) -> None:
    """Each level is the mean of its cell, which is a condition of optimality, and the distortion is that of samples."""
    book = lloyd_max(bits, d)
    levels = np.array(book.levels)
    assert np.array_equal(levels, -levels[::-1]) and (np.diff(levels) > 0).all()
    y = sample(d)
    coded = nearest(y, book)
    assert ((y - coded) ** 2).mean() == pytest.approx(book.distortion, rel=0.01)
    for level in levels[len(levels) // 2 :]:
        cell = y[coded == level]
        assert abs(cell.mean() - level) < 5 * cell.std() / len(cell) ** 0.5


@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", KNOWN)
def test_e4m3_is_representable_and_nearly_as_good(bits: int, d: int) -> None:
    book = e4m3(bits, d)
    levels = torch.tensor(book.levels, dtype=torch.float64)
    assert torch.equal(levels.to(torch.float8_e4m3fn).double(), levels)
    assert torch.equal(levels, -levels.flip(0)) and (levels.diff() > 0).all()
    worse = book.distortion / lloyd_max(bits, d).distortion - 1
    assert -1e-12 <= worse < {1: 0.002, 2: 0.002, 3: 0.002, 4: 0.011, 5: 0.07}[bits]
    y = sample(d)
    assert ((y - nearest(y, book)) ** 2).mean() == pytest.approx(book.distortion, rel=0.01)
    assert (nearest(y, book) * y).mean() == pytest.approx((nearest(y, book) ** 2).mean(), rel=0.002)  # no other gain is better


def test_e4m3_at_four_bits() -> None:
    assert e4m3(4, 128).levels[8:] == (0.140625, 0.40625, 0.6875, 1.0, 1.375, 1.75, 2.25, 3.0)
    assert e4m3(4, 128).distortion < 1.01 * lloyd_max(4, 128).distortion
    assert e4m3(4, 128).gain == pytest.approx(1 / 1.0995, rel=1e-3)
