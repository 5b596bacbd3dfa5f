"""A pretrained attention layer as one that caches less: LRKV (arXiv 2601.11471), GQA or MLA. Weights in, weights out.

Weights are those of `torch.nn.Linear`: `w_q [Hq D, d]`, `w_k` and `w_v [H D, d]`, `w_o [d, Hq D]`, heads in contiguous blocks of head
size D, query heads of one KV head next to each other. No biases, no normalised queries or keys; RoPE turns the planes (j, j + D / 2).

What is minimised is the expected squared error of what the side is for, taken over inputs of second moment C = E[x x^T] `[d, d]`:

    values  sum_h E |W_O,h dv_h|^2                       M_h = L_h W_V,h C^{1/2},  L_h^2 = sum over its query heads of W_O^T W_O
    keys    sum_h sum_j lambda_h,j E |dk_h,j|^2          M_h = L_h W_K,h C^{1/2},  L_h^2 = diag lambda_h

(for keys, a mean over relative positions leaves no terms between planes of different frequency). `lowrank_fit` of the M_h then has new
heads `T_h L_h k_h`, and the inverse of `T_h L_h` goes exactly into W_O or W_Q: T_h is orthogonal for values, and for keys it turns each
plane by one phase, which commutes with RoPE. C and L^2 get a jitter of 1e-6 of their mean diagonal. `lost` is a share of the energy of
all M_h, so that every `lost` of one side of one layer can be compared. Sums are float64; weights come back in the dtype they had.

Not here: models, calibration, ranks that differ by head or layer, fine-tuning.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvstack.attention.lowrank_fit import (
    Fit,
    Gauge,
    aligned,
    energy,
    orthogonal,
    phases,
    truncated,
    truncated_heads,
    truncated_together,
    unaligned,
)
from kvstack.errors import BadInputError

JITTER = 1e-6  # of the mean of the diagonal
Method = Literal["aligned", "mean"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """One side of an LRKV layer. shared: `[D, d]`. down: `[H r, d]`, head after head. up: `[H, D, r]`, orthonormal columns. lost: the
    share of the energy that the fit leaves out."""

    shared: Tensor
    down: Tensor
    up: Tensor
    lost: float


@dataclass(frozen=True, eq=False)
class Latent:
    """MLA without its decoupled RoPE key. down: `[c, d]`, to latents of unit covariance. up_k, up_v: `[H D, c]`. lost: the mean of the
    lost shares of keys and values, both without L_h."""

    down: Tensor
    up_k: Tensor
    up_v: Tensor
    lost: float


def dense(fit: LowRank) -> Tensor:
    """The weight `[H D, d]` of full heads that `fit` stands for: `shared + up_h down_h`, head after head."""
    heads, _, rank = fit.up.shape
    return (fit.shared + fit.up @ fit.down.view(heads, rank, fit.down.shape[1])).flatten(0, 1)


def fit_value(w_v: Tensor, w_o: Tensor, c: Tensor, head_dim: int, rank: int, method: Method = "aligned") -> tuple[LowRank, Tensor]:
    """Values as LRKV of `rank` 0 to D, and the new `w_o` that reads them.

    `aligned` is block descent with an orthogonal gauge; `mean`, for comparison, takes the mean of the L_h W_V,h and a truncated SVD of
    what each head lacks. Raises BadInputError for shapes that do not fit, a rank out of range, or moments that are none.
    """
    side = value_side(w_v, w_o, c, head_dim)
    fit = side.fit(rank, method)
    return side.lowrank(fit), side.absorbed(fit.turn).T.contiguous()


def fit_key(w_k: Tensor, w_q: Tensor, c: Tensor, energies: Tensor, rank: int, method: Method = "aligned") -> tuple[LowRank, Tensor]:
    """Keys as LRKV of `rank` 0 to D, and the new `w_q` that meets them.

    `energies [Hq, D / 2]` are E |q_j|^2 of the queries before RoPE, plane by plane. The keys are rebuilt from the latents before RoPE.
    `method` and errors as in `fit_value`, with phases for a gauge.
    """
    side = key_side(w_k, w_q, c, energies)
    fit = side.fit(rank, method)
    return side.lowrank(fit), side.absorbed(fit.turn)


def pool_value(w_v: Tensor, w_o: Tensor, c: Tensor, head_dim: int, kv_heads: int) -> tuple[Tensor, Tensor, float]:
    """GQA: values of `kv_heads` heads `[kv_heads D, d]`, each the mean of neighbouring heads turned to fit each other; the new `w_o`;
    the lost share. Raises BadInputError as `fit_value` does, and for a `kv_heads` that does not divide the heads."""
    side = value_side(w_v, w_o, c, head_dim)
    weight, turn, lost = side.pooled(kv_heads)
    return weight, side.absorbed(turn).T.contiguous(), lost


def pool_key(w_k: Tensor, w_q: Tensor, c: Tensor, energies: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, float]:
    """GQA: keys of `kv_heads` heads, the new `w_q`, the lost share; as `pool_value`."""
    side = key_side(w_k, w_q, c, energies)
    weight, turn, lost = side.pooled(kv_heads)
    return weight, side.absorbed(turn), lost


def svd_value(w_v: Tensor, w_o: Tensor, c: Tensor, head_dim: int, rank: int, joint: bool) -> tuple[Tensor, float]:
    """A reference: values `[H D, d]` after an SVD of each head, or of all heads together, with as many numbers a token as LRKV of
    `rank`, D + H r; and the lost share. Errors as `fit_value`."""
    return value_side(w_v, w_o, c, head_dim).svd(rank, joint)


def svd_key(w_k: Tensor, w_q: Tensor, c: Tensor, energies: Tensor, rank: int, joint: bool) -> tuple[Tensor, float]:
    """A reference: keys `[H D, d]`, and the lost share; as `svd_value`."""
    return key_side(w_k, w_q, c, energies).svd(rank, joint)


def fit_mla(w_k: Tensor, w_v: Tensor, c: Tensor, width: int) -> Latent:
    """Keys and values from one latent of `width` 1 to d: an SVD of both weights together (X-EcoMLA, arXiv 2503.11132), whitened by C
    and with keys and values of equal energy (TransMLA, arXiv 2502.07864).

    There is no decoupled RoPE key, so keys must be rebuilt from the latents before RoPE and turned then; an absorbed decode is not
    possible. Raises BadInputError for shapes that do not fit, or moments that are none.
    """
    _matrices(w_k=w_k, w_v=w_v, c=c)
    if w_k.shape != w_v.shape:
        raise BadInputError(f"w_k {tuple(w_k.shape)} and w_v {tuple(w_v.shape)} differ. Give those of one layer.")
    root = _root(c, w_k.shape[1])
    _whole("width", width, 1, w_k.shape[1])
    sides = [w.double() @ root for w in (w_k, w_v)]
    norms = [energy(x) ** 0.5 for x in sides]
    if not min(norms) > 0:
        raise BadInputError("w_k or w_v is all zero: there is nothing to fit. Give trained weights.")
    x = torch.cat([s / n for s, n in zip(sides, norms, strict=True)])
    basis, up = truncated(x.T, width)
    up_k, up_v = ((n * u).to(w_k.dtype) for u, n in zip(up.T.chunk(2), norms, strict=True))
    down = torch.linalg.solve_triangular(root, basis.T, upper=False, left=False)
    return Latent(down.to(w_k.dtype), up_k, up_v, energy(x.T - basis @ up) / energy(x))


@dataclass(frozen=True, eq=False)
class Side:
    """Keys or values of a layer in their metric.

    a: `[H, D, N]`, the M_h, with N reduced to the rank of all heads together. back: `[N, d]`, from there to weights. inverse:
    `[H, D, D]`, L_h^-1. partner: `[H, G, D, d]`, the weights that undo the gauge. dtype: of the weights.
    """

    a: Tensor
    back: Tensor
    inverse: Tensor
    partner: Tensor
    gauge: Gauge
    dtype: torch.dtype

    def fit(self, rank: int, method: Method) -> Fit:
        """The heads `a` as a shared one and rests. Raises BadInputError for a rank out of range and an unknown method."""
        _whole("rank", rank, 0, self.a.shape[1])
        if method not in ("aligned", "mean"):
            raise BadInputError(f"There is no method {method!r}. Give aligned or mean.")
        return aligned(self.a, rank, self.gauge) if method == "aligned" else unaligned(self.a, rank)

    def lowrank(self, fit: Fit) -> LowRank:
        """Weights of a fit."""
        shared, down = fit.shared @ self.back, fit.down.flatten(0, 1) @ self.back
        return LowRank(shared.to(self.dtype), down.to(self.dtype), fit.up.to(self.dtype), fit.errors[-1] / energy(self.a))

    def pooled(self, kv_heads: int) -> tuple[Tensor, Tensor, float]:
        """Weight `[kv_heads D, d]`, turn `[H, D, D]` and lost share of GQA: every group of heads is an LRKV of rank 0."""
        heads = len(self.a)
        _whole("kv_heads", kv_heads, 1, heads)
        if heads % kv_heads:
            raise BadInputError(f"{heads} heads make no {kv_heads} groups. Give a divisor of {heads}.")
        fits = [aligned(group, 0, self.gauge) for group in self.a.chunk(kv_heads)]
        weight = torch.cat([f.shared for f in fits]) @ self.back
        return weight.to(self.dtype), torch.cat([f.turn for f in fits]), sum(f.errors[-1] for f in fits) / energy(self.a)

    def absorbed(self, turn: Tensor) -> Tensor:
        """The partner `[Hq D, d]` behind heads T_h L_h k_h: T_h L_h^-1 of what it was, for T_h^-T = T_h and L_h is symmetric."""
        return ((turn @ self.inverse)[:, None] @ self.partner).flatten(0, 2).to(self.dtype)

    def svd(self, rank: int, joint: bool) -> tuple[Tensor, float]:
        """Weight `[H D, d]` and lost share of an SVD of all heads or of each. Raises BadInputError for a rank out of range."""
        heads, head_dim, _ = self.a.shape
        _whole("rank", rank, 0, head_dim)
        found = (truncated_together if joint else truncated_heads)(self.a, head_dim + heads * rank)
        weight = (self.inverse @ found @ self.back).flatten(0, 1)
        return weight.to(self.dtype), energy(self.a - found) / energy(self.a)


def value_side(w_v: Tensor, w_o: Tensor, c: Tensor, head_dim: int) -> Side:
    """Values, in the metric of the layer's output; arguments and errors as `fit_value`."""
    _matrices(w_v=w_v, w_o=w_o, c=c)
    heads, partner = _heads(w_v, w_o.T, head_dim)
    return _side(heads, partner, torch.einsum("hgad,hgbd->hab", partner, partner), c, orthogonal, w_v.dtype)


def key_side(w_k: Tensor, w_q: Tensor, c: Tensor, energies: Tensor) -> Side:
    """Keys, in the metric of the logits; arguments and errors as `fit_key`."""
    _matrices(w_k=w_k, w_q=w_q, c=c, energies=energies)
    heads, partner = _heads(w_k, w_q, 2 * energies.shape[1])
    if len(energies) != partner.shape[0] * partner.shape[1] or (energies < 0).any():
        raise BadInputError(
            f"Query energies {tuple(energies.shape)} do not fit w_q {tuple(w_q.shape)}, or are negative. "
            "Give the mean of |q|^2 of every query head and RoPE plane, [query heads, head size / 2]."
        )
    planes = energies.double().view(*partner.shape[:2], -1).sum(1)
    return _side(heads, partner, torch.diag_embed(planes.repeat(1, 2)), c, phases, w_k.dtype)


def _side(heads: Tensor, partner: Tensor, metric: Tensor, c: Tensor, gauge: Gauge, dtype: torch.dtype) -> Side:
    """The M_h of `heads [H, D, d]` under L_h^2 = `metric [H, D, D]`, whose mean diagonal is made 1 so that weights keep their size."""
    root, mean = _root(c, heads.shape[-1]), metric.diagonal(dim1=1, dim2=2).mean()
    if not (mean > 0 and heads.any()):
        raise BadInputError("Weights or query energies are all zero: there is nothing to fit. Give those of a trained layer.")
    values, vectors = torch.linalg.eigh(metric / mean)
    values = (values.clamp(min=0) + JITTER).sqrt()[:, None]
    m = (vectors * values) @ vectors.mT @ heads @ root
    basis = torch.linalg.qr(m.flatten(0, 1).T).Q  # [d, N]: all heads read no other directions
    back = torch.linalg.solve_triangular(root, basis.T, upper=False, left=False)
    return Side(m @ basis, back, (vectors / values) @ vectors.mT, partner, gauge, dtype)


def _root(c: Tensor, size: int) -> Tensor:
    """The Cholesky factor of C with its jitter: any root serves, for |W R|^2 = tr W C W^T."""
    if c.shape != (size, size):
        raise BadInputError(
            f"The second moment is {tuple(c.shape)}, the weights read {size} numbers. Give E[x x^T] of their input, [d, d]."
        )
    c = c.double()
    factor = torch.linalg.cholesky_ex(c + torch.eye(size).to(c) * c.diagonal().mean() * JITTER)
    if factor.info:
        raise BadInputError("The second moment is not positive. Give E[x x^T], summed in float32 or better.")
    root: Tensor = factor.L
    return root


def _heads(w: Tensor, partner: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """`w [H D, d]` as `[H, D, d]` and `partner [Hq D, d]` as `[H, G, D, d]`, float64."""
    (rows, size), (queries, width) = w.shape, partner.shape
    if head_dim < 1 or rows % head_dim or queries % rows or size != width:
        raise BadInputError(
            f"Weights {(rows, size)} and {(queries, width)}, transposed if w_o, are not those of heads of size {head_dim}. "
            "Give the weights of one layer as torch.nn.Linear holds them, and its head size."
        )
    return w.double().unflatten(0, (-1, head_dim)), partner.double().reshape(rows // head_dim, queries // rows, head_dim, size)


def _matrices(**given: Tensor) -> None:
    for name, x in given.items():
        if x.ndim != 2 or not x.numel() or not x.isfinite().all():
            raise BadInputError(f"{name} {tuple(x.shape)} is empty, no matrix or not finite. Give two dimensions without NaN and Inf.")


def _whole(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise BadInputError(f"{name} cannot be {value}. Give a whole number from {low} to {high}.")
