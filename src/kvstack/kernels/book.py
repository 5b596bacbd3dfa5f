"""What the encoding kernels must know of a codec: its rotation, and nearest levels without comparisons.

A codebook is symmetric: a code is a sign and a magnitude 0, 1, ..., counted from zero outwards. The magnitude of y is the number of
positive edges below |y|.

`Book`, for every GPU, is constants to compile in. A polynomial through the points (edge k, k + 1/2) that rises from edge to edge gives
the magnitude, rounded, with one multiply-add per edge. Squared levels are a polynomial in the bits of the magnitude, so that their sum
over a vector is a weighted sum of counts of bits. Coefficients are in the order of Horner, the highest power first.

`Cells`, for GPUs whose threads look things up in each other quickly, comes with a table. A cell has one edge at most, and a number
which rounds y right when it is added. Levels or their squares are looked up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.polynomial import Polynomial
from numpy.typing import NDArray
from torch import Tensor

from kvstack.codecs.base import Codec
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


T = TypeVar("T")


def once(make: Callable[[Codec, Tensor], T]) -> Callable[[Codec, Tensor], T]:
    """`make`, which is called once for a codec and the type and device of a tensor, while the codec lives."""
    held: WeakKeyDictionary[Codec, dict[tuple[torch.dtype, torch.device], T]] = WeakKeyDictionary()

    def get(codec: Codec, x: Tensor) -> T:
        of_codec, kind = held.setdefault(codec, {}), (x.dtype, x.device)
        if kind not in of_codec:
            of_codec[kind] = make(codec, x)
        return of_codec[kind]

    return get


def signs(codec: PolarCodec) -> tuple[Tensor, Tensor | None]:
    """Rotation times sqrt(D), `[D, D]` float64 of +-1, and what it makes of the centre, `[H, D]` float32."""
    assert codec.transform is not None
    matrix = codec.transform.double() * codec.transform.shape[-1] ** 0.5
    assert torch.allclose(matrix, matrix.sign(), atol=1e-4), "the transform is no signed Hadamard matrix"
    matrix = matrix.sign()
    return matrix, None if codec.centre is None else (codec.centre.double() @ matrix.T).float()


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


# --- cells ---

CELLS = 32


@dataclass(frozen=True)
class Cells:
    """Constants of a codec for 32 cells; the table is what `cells` returns beside them.

    factor: of y with mean square 1, so that t = factor * y + 1/2 is in 0..1 between the outermost edges and beyond. unit: of one in
    a sum of squares. whole: the table has levels, whole numbers times the root of the unit; otherwise squares of 16 bits.
    """

    bits: int
    rule: str
    gain: float
    centred: bool
    factor: float
    unit: float
    whole: bool


def cells(codec: PolarCodec) -> tuple[Cells, NDArray[np.int32]]:
    """Constants of a codec, and a table of 48 words: a float32 number per cell, then levels or squares, with four copies of each word.

    For t, clamped to 0..1, and the number n of cell round(31 t), the sum 16 t + n is 16 + the index of the level + a fraction. Levels
    are eight bytes, of magnitudes with 4 bits and of indices with fewer; squares are their eight low bytes and their eight high bytes.
    """
    edges = codec._edges.double().cpu().numpy()
    factor = 1 / (2.1 * float(edges[-1]))
    at = edges * factor + 0.5
    numbers = np.empty(CELLS)
    for c in range(CELLS):
        (inside,) = np.nonzero(np.abs(at * (CELLS - 1) - c) < 0.5 + 1e-4)
        assert len(inside) <= 1, "two edges in a cell"
        below = np.count_nonzero(at * (CELLS - 1) < c)
        numbers[c] = inside[0] + 1 - 16 * at[inside[0]] if len(inside) else below + 0.5 - 16 * c / (CELLS - 1)
    magnitudes = 2 ** (codec.bits - 1)
    levels = codec.levels[magnitudes:].double().cpu().numpy()
    powers = [p for p in 2.0 ** np.arange(9) if not (levels * p % 1).any() and levels[-1] * p < 256]
    unit = float(powers[0] ** 2 if powers else 65535 / levels[-1] ** 2)
    entries = np.rint(levels * powers[0] if powers else levels**2 * unit).astype(int)
    entries = np.resize(entries if codec.bits == 4 else [*entries[::-1], *entries], 8)
    raw = np.concatenate([entries % 256, entries // 256]).astype(np.uint8)
    words = np.concatenate([(numbers + 16).astype(np.float32).view(np.int32), np.repeat(raw.view(np.int32), 4)])
    return Cells(codec.bits, codec.scale, codec.gain, codec.centre is not None, factor, unit, bool(powers)), words
