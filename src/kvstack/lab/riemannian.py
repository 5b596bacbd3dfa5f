"""How heads move that are a shared matrix and a low-rank residual each: W_h = S + U_h Z_h, as LRKV's values, and its keys in `exact`.

Factors that are orthogonalised each for itself learn worse than the matrices that they stand for: their product moves by how large they
are, and S by a whole step however little the heads agree. So heads move as Muon moves dense ones, as far as rank r lets them:

    gradients   known are U_h^T G_h, G_h Z_h^T and sum_h G_h (of S). `least_gradients` are those parts of the G_h, and of what is left
                of the sum an equal share for every head; without a rank that is MQA's gradient, at full rank MHA's
    steps       O_h, means over time of these, orthogonalised, `[H, D, d]`. Means of the factors' gradients would not do: they are of
                factors that are no more
    back        S takes the mean of the O_h, and the residual less the rest of its O_h is brought back to rank r by one step of subspace
                iteration from U_h, which it leaves orthonormal (`nearest`)

This is descent along the tangent space of matrices of rank r, and a retraction to them (Absil, Mahony and Sepulchre, Optimization
Algorithms on Matrix Manifolds, 2008, chapters 3 and 4). All shapes are `[..., D, r]` and `[..., r, d]`, all numbers float32; call it
without TF32, in which a matrix that is written in new factors at every step would wander off. It knows no model.
"""

import torch
from torch import Tensor

DAMPING = 1e-5  # of squares, in units of their mean: a direction 300 times weaker than the others counts half


def least_gradients(up: Tensor, down: Tensor, up_grad: Tensor, down_grad: Tensor, shared_grad: Tensor) -> Tensor:
    """Gradients of heads `[n, H, D, d]` from those of `up [n, H, D, r]`, of `down [n, H, r, d]` and of what they share `[n, D, d]`."""
    right = up_grad @ _solve(down @ down.mT, down)
    out = right + up @ _solve(up.mT @ up, down_grad - up.mT @ right)
    return out + (shared_grad - out.sum(1))[:, None] / out.shape[1]


def nearest(residual: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Factors `[..., D, r]`, orthonormal, and `[..., r, d]` of `residual [..., D, d]`, which nearly lies in the range of `up`.

    Of what it has of a rank above r, the weakest directions are left out. The new `up` is as near to the old one as its range allows.
    The damping shortens all of it by 1e-5 a call, next to nothing beside a decay of weights.
    """
    rows = up.mT @ residual
    out = _orthonormal(residual @ _solve(rows @ rows.mT, rows).mT)
    return out, out.mT @ residual


def _orthonormal(x: Tensor) -> Tensor:
    """An orthonormal basis of the range of `x [..., a, r]`; if that is nearly one, then near to it."""
    return x @ _whitening(x.mT @ x).mT


def _solve(gram: Tensor, x: Tensor) -> Tensor:
    """`gram^-1 x`, damped."""
    white = _whitening(gram)
    return white.mT @ (white @ x)


def _whitening(gram: Tensor) -> Tensor:
    """`w` with `w gram w^T = 1` for a damped `gram`: the inverse of its Cholesky factor, since products are what GPUs batch well."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    damped = gram + DAMPING * mean[..., None, None] * eye
    factor, failed = torch.linalg.cholesky_ex(damped)  # unlike `cholesky` it does not wait for the GPU
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    return torch.where(failed[..., None, None] == 0, inverse, torch.nan)  # which the loss will show
