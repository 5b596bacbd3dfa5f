"""What an encoding kernel must know of a codec, as constants to compile in: nearest levels without comparisons, squares without tables.

A codebook is symmetric: a code is a sign and a magnitude 0, 1, ..., counted from zero outwards. The magnitude of y is the number of
positive edges below |y|. A polynomial through the points (edge k, k + 1/2) that rises from edge to edge gives it, rounded, with one
multiply-add per edge. Squared levels are a polynomial in the bits of the magnitude, so that their sum over a vector is a weighted sum
of counts of bits. Coefficients are in the order of Horner, the highest power first.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial
from numpy.typing import NDArray

from kvstack.codecs.polar import _CANDIDATES, PolarCodec

UNIT = 2.0**18  # of squared levels in integers: 256 squares of levels up to 4 fit 32 bits
_AT_ZERO = -0.45  # the least that P may be at 0, where it must not round to -1
_OVER = 0.05  # how far P rises beyond the last edge


@dataclass(frozen=True)
class Book:
    """Constants of a codec; with 8 bits, an Fp8Codec, there are no others.

    ladder: P, the polynomial of the magnitude, in |y| - origin, for |y| up to `cap`; its last coefficient is a whole number.
    squares: entry s is the coefficient of the product of the bits that s has, in units of 1 / UNIT. levels: of a magnitude, in
    magnitude - 3. first, step, trials: the input scales of the search; no trials, no search.
    """

    bits: int
    rule: str = "matched"
    gain: float = 1.0
    centred: bool = False
    cap: float = 0.0
    origin: float = 0.0
    ladder: tuple[float, ...] = ()
    squares: tuple[int, ...] = ()
    levels: tuple[float, ...] = ()
    first: float = 1.0
    step: float = 0.0
    trials: int = 0


def book(codec: PolarCodec) -> Book:
    """The constants of a codec; reads its levels from the device."""
    magnitudes = 2 ** (codec.bits - 1)
    edges = codec._edges[magnitudes:].double().cpu().numpy()
    levels = codec.levels[magnitudes:].double().cpu().numpy()
    ladder, origin, cap = _ladder(edges)
    squares = levels**2
    for bit in range(codec.bits - 1):  # from values at the corners of a cube to coefficients of products of coordinates
        upper = np.arange(magnitudes) >> bit & 1 == 1
        squares[upper] -= squares[~upper]
    return Book(
        bits=codec.bits,
        rule=codec.scale,
        gain=codec.gain,
        centred=codec.centre is not None,
        cap=cap,
        origin=origin,
        ladder=ladder,
        squares=tuple(np.rint(squares * UNIT).astype(int).tolist()),
        levels=tuple(_through(np.arange(magnitudes) - 3.0, levels).coef[::-1].tolist()),
        first=_CANDIDATES[0],
        step=(_CANDIDATES[-1] - _CANDIDATES[0]) / (len(_CANDIDATES) - 1),
        trials=len(_CANDIDATES) if codec.search else 0,
    )


def _through(x: NDArray[Any], y: NDArray[Any]) -> Polynomial:
    """The polynomial of the least degree through some points."""
    return Polynomial(np.linalg.solve(np.vander(x, increasing=True), y))


def _ladder(edges: NDArray[Any]) -> tuple[tuple[float, ...], float, float]:
    """Coefficients of P, origin and cap for the positive edges.

    The origin is where P is a whole number in the middle of its range: the constant is then exact, and rounding errors are small.
    """
    middles = np.arange(len(edges)) + 0.5
    p = _through(edges, middles)
    if len(edges) == 1 or p(0.0) < _AT_ZERO:
        p = _through(np.array([0.0, *edges]), np.array([_AT_ZERO, *middles]))
    cap = _where(p, middles[-1] + _OVER, edges[-1], 2 * edges[-1])
    inside = np.linspace(0, cap, 4096)
    assert (np.diff(p(inside)) > 0).all(), "the polynomial through these edges does not rise"
    middle = float(len(edges) // 2)
    origin = float(np.float32(_where(p, middle, 0.0, cap)))
    moved = p(Polynomial([origin, 1.0])).coef
    return (*moved[:0:-1].tolist(), middle), origin, cap


def _where(p: Polynomial, y: float, low: float, high: float) -> float:
    """Where p first is y, between a place where it is less and one where it would be more if it kept rising."""
    grid = np.linspace(low, high, 4096)
    at = int(np.argmax(p(grid) >= y))
    assert at > 0, f"the polynomial does not reach {y}"
    low, high = float(grid[at - 1]), float(grid[at])
    for _ in range(50):
        half = (low + high) / 2
        low, high = (half, high) if p(half) < y else (low, half)
    return low
