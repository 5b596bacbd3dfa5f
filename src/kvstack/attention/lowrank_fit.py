"""Heads as one shared matrix and a low-rank rest each, as near as can be in the Frobenius norm.

    minimise  sum_h | T_h A_h - S - B_h P_h |^2   over T_h of a gauge, S [D, N], B_h [D, r] orthonormal and P_h [r, N]

`a [H, D, N]` float64 holds the heads A_h. A gauge is a group of maps of a head that cost nothing, because the layer's other weights
undo them: `orthogonal` for values, `phases` for keys that RoPE will turn. Each of the three blocks has a closed form given the two
others, so every sweep lowers the error; it may still end in a local minimum. Nothing here knows of weights, tokens or metrics: see
`retrofit`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SWEEPS = 60  # no more than this: later ones move the error by a hundredth
START_SWEEPS = 10  # where the descent begins matters little
TOLERANCE = 3e-5  # of all energy: a sweep that lowers the error by less is the last one

Gauge = Callable[[Tensor, Tensor], Tensor]


def orthogonal(a: Tensor, target: Tensor) -> Tensor:
    """The orthogonal maps `[H, D, D]` that bring the heads `a` nearest to `target`, `[D, N]` or `[H, D, N]` (Schönemann 1966)."""
    svd = torch.linalg.svd(target @ a.mT)
    turn: Tensor = svd.U @ svd.Vh
    return turn


def phases(a: Tensor, target: Tensor) -> Tensor:
    """The rotations of the planes (j, j + D / 2), as maps `[H, D, D]`, that bring `a` nearest to `target`: they commute with RoPE."""
    x, y = (torch.complex(*t.chunk(2, -2)) for t in (a, target))
    angle = (y * x.conj()).sum(-1).angle()
    cos, sin = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
    return torch.cat([torch.cat([cos, -sin], -1), torch.cat([sin, cos], -1)], -2)


@dataclass(frozen=True, eq=False)
class Fit:
    """turn: `[H, D, D]`, T_h. shared: `[D, N]`. up: `[H, D, r]`, orthonormal columns. down: `[H, r, N]`. errors: the squared error
    after each sweep."""

    turn: Tensor
    shared: Tensor
    up: Tensor
    down: Tensor
    errors: list[float]


def truncated(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of rank `rank` of each of `x [..., D, N]`: up `[..., D, rank]`, orthonormal, and down `[..., rank, N]`.

    From the small Gram matrix, which costs singular values below 1e-8 of the greatest their digits, and nothing else.
    """
    up = torch.linalg.eigh(x @ x.mT).eigenvectors.flip(-1)[..., :rank]
    return up, up.mT @ x


def energy(x: Tensor) -> float:
    """The squared Frobenius norm."""
    return float(x.square().sum())


def descend(a: Tensor, rank: int, gauge: Gauge, shared: Tensor, sweeps: int = SWEEPS) -> Fit:
    """At most `sweeps` over gauge, shared part and rests, from a `shared` part and no rests, until the error falls no more."""
    total, before, rest, errors = energy(a), float("inf"), torch.zeros_like(a), list[float]()
    while len(errors) < sweeps:
        turn = gauge(a, shared + rest)
        turned = turn @ a
        shared = (turned - rest).mean(0)
        up, down = truncated(turned - shared, rank)
        rest = up @ down
        errors.append(energy(turned - shared - rest))
        if before - errors[-1] <= TOLERANCE * total:
            break
        before = errors[-1]
    return Fit(turn, shared, up, down, errors)


def aligned(a: Tensor, rank: int, gauge: Gauge) -> Fit:
    """Heads turned to fit each other: a generalised Procrustes mean (Gower 1975), begun at the head of most energy, then `descend`."""
    start = a[a.square().sum((1, 2)).argmax()]
    return descend(a, rank, gauge, descend(a, 0, gauge, start, START_SWEEPS).shared)


def unaligned(a: Tensor, rank: int) -> Fit:
    """Heads as they are: the mean head, and a truncated SVD of what each lacks."""
    shared = a.mean(0)
    up, down = truncated(a - shared, rank)
    return Fit(torch.eye(a.shape[1]).to(a).expand(len(a), -1, -1), shared, up, down, [energy(a - shared - up @ down)])


def truncated_heads(a: Tensor, width: int) -> Tensor:
    """`a [H, D, N]` after an SVD of each head, of `width` ranks for all: as many each, those left over where they serve most."""
    each, over = divmod(min(width, a.shape[0] * a.shape[1]), len(a))
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh(a @ a.mT))
    ranks = torch.full((len(a), 1), each, device=a.device)
    if over:
        ranks[values[:, each].topk(over).indices] += 1
    kept = vectors * (torch.arange(a.shape[1], device=a.device) < ranks)[:, None]
    found: Tensor = kept @ kept.mT @ a
    return found


def truncated_together(a: Tensor, width: int) -> Tensor:
    """`a [H, D, N]` after one SVD of all heads, of rank `width`: nothing with as many numbers a token loses less (Eckart-Young)."""
    up, down = truncated(a.flatten(0, 1), width)
    return (up @ down).view_as(a)
