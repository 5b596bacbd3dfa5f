"""The optimisers of lab models: Muon for weight matrices with AdamW for the rest, or AdamW for all.

A matrix is a parameter of two dimensions that is neither the embedding nor the head. Muon orthogonalises each parameter as it is
stored: the low-rank `k_up [H D, r]` of all heads is one matrix, `k_shared` and `k_down` are two.

torch has a Muon; this one treats all matrices of one shape together, which saves a tenth of a small model's step, knows parameters
that FSDP has cut up (it gathers their updates, since a slice cannot be orthogonalised), and has the scale that suits matrices of any
shape, low-rank ones above all:

    rms        0.2 sqrt(max(out, in))   entries of an update as large as AdamW's (arXiv:2502.16982, eq. 4); torch's match_rms_adamw
    spectral   sqrt(out / in)           outputs change alike whatever the shape (arXiv:2310.17813, eq. 3)
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

MUON, ADAMW = "muon", "adamw"
OPTIMIZERS = (MUON, ADAMW)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
SCALES: dict[str, Callable[[int, int], float]] = {
    "rms": lambda out, into: 0.2 * math.sqrt(max(out, into)),
    "spectral": lambda out, into: math.sqrt(out / into),
}


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), with Nesterov's look ahead.

    Takes matrices alone. weight_decay is decoupled, as in AdamW. scale: see the module.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, scale: str, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        self.scale = SCALES[scale]
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all matrices that have a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, params in alike.items():
                self._step(params, self.scale(*shape), **{k: group[k] for k in ("lr", "momentum", "weight_decay")})

    def _step(self, params: list[Tensor], scale: float, lr: float, momentum: float, weight_decay: float) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        means = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, means, momentum)
        whole = orthogonalised(torch.stack([u.full_tensor() if isinstance(u, DTensor) else u for u in ahead]))
        updates = [_cut(u, p) for u, p in zip(whole.to(params[0].dtype), params, strict=True)]
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, updates, alpha=-lr * scale)


def _cut(update: Tensor, like: Tensor) -> Tensor:
    return distribute_tensor(update, like.device_mesh, like.placements) if isinstance(like, DTensor) else update


def orthogonalised(x: Tensor, steps: int = 5) -> Tensor:
    """Matrices `[n, a, b]` with singular values near 1 in place of their own, by Newton-Schulz steps in bfloat16."""
    wide = x.shape[1] <= x.shape[2]
    y = (x if wide else x.mT).bfloat16()
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ y
    out: Tensor = y if wide else y.mT
    return out


def optimizers(model: nn.Module, name: str, matrix_lr: float, other_lr: float, scale: str = "spectral") -> list[torch.optim.Optimizer]:
    """The optimisers of `model`, matrices' first; each group's `initial_lr` is its peak, for `schedule`."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and p.numel() and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen and p.numel()]
    adamw: dict[str, Any] = {"betas": (0.9, 0.95), "fused": named[0][1].is_cuda}
    both: list[torch.optim.Optimizer] = [
        Muon(matrices, matrix_lr, scale) if name == MUON else torch.optim.AdamW(matrices, lr=matrix_lr, weight_decay=0.1, **adamw),
        torch.optim.AdamW(others, lr=other_lr, weight_decay=0.0, **adamw),
    ]
    for opt in both:
        for group in opt.param_groups:
            group["initial_lr"] = group["lr"]
    return both


def schedule(opts: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every learning rate to `factor` times its peak."""
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = group["initial_lr"] * factor
