"""The optimisers of lab models: Muon for weight matrices with AdamW for the rest, or AdamW for all.

A matrix is a parameter of two dimensions that is neither the embedding nor the head. What Muon orthogonalises is a choice:

    whole       each parameter as it is stored: the low-rank `k_up [H D, r]` of all heads is one matrix
    per head    the heads' rows of an attention's projections, each for itself (GLM-5's "Muon split", arXiv:2602.15763). The attention's
                `updates` say, by the name of a projection, how many heads its rows are and how far it moves; at 1 an update is as large
                as that of the whole. Its `sums` say which projections are heads together, a shared one and low-rank residuals
                (`lab.riemannian`); those heads move as if they were stored whole.

torch has a Muon; this one treats all matrices of one shape together, which saves a tenth of a small model's step, knows parameters
that FSDP has cut up (it gathers their updates, since a slice cannot be orthogonalised), and has the scale that suits matrices of any
shape, low-rank ones above all:

    rms        0.2 sqrt(max(out, in))   entries of an update as large as AdamW's (arXiv:2502.16982, eq. 4); torch's match_rms_adamw
    spectral   sqrt(out / in)           outputs change alike whatever the shape (arXiv:2310.17813, eq. 3)
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kvstack.attention.equality import full_precision
from kvstack.lab.riemannian import least_gradients, nearest

MUON, ADAMW = "muon", "adamw"
OPTIMIZERS = (MUON, ADAMW)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
SCALES: dict[str, Callable[[int, int], float]] = {
    "rms": lambda out, into: 0.2 * math.sqrt(max(out, into)),
    "spectral": lambda out, into: math.sqrt(out / into),
}
Updates = dict[nn.Parameter, tuple[int, float]]


class Sum(NamedTuple):
    """Heads `shared + up_h @ down_h`; shared `[D, d]`, up `[H D, r]`, down `[H r, d]`."""

    shared: nn.Parameter
    up: nn.Parameter
    down: nn.Parameter
    heads: int


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), with Nesterov's look ahead.

    Takes matrices alone. weight_decay is decoupled, as in AdamW. scale: see the module. updates: of parameters that are orthogonalised
    head by head, how many heads their rows are, and a factor on their updates. sums: parameters that move together; their momentum is
    that of whole heads, `[H, D, d]`, and kept with `up`.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        scale: str,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        updates: Updates | None = None,
        sums: Sequence[Sum] = (),
    ) -> None:
        self.scale, self.updates, self.sums = SCALES[scale], updates or {}, tuple(sums)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all matrices that have a gradient."""
        (group,) = self.param_groups
        how = {k: group[k] for k in ("lr", "momentum", "weight_decay")}
        together: dict[tuple[Any, ...], list[Sum]] = defaultdict(list)
        for s in self.sums:
            if s.up.grad is not None:
                together[s.up.shape, s.down.shape, s.heads].append(s)
        for sums in together.values():
            self._step_sums(sums, **how)
        moved = {p for s in self.sums for p in s[:3]}
        alike: dict[tuple[torch.Size, tuple[int, float]], list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None and p not in moved:
                alike[p.shape, self.updates.get(p, (1, 1.0))].append(p)
        for (shape, (heads, factor)), params in alike.items():
            self._step(params, heads, factor * self.scale(*shape), **how)

    def _step(self, params: list[Tensor], heads: int, scale: float, lr: float, momentum: float, weight_decay: float) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        means = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        whole = _whole(torch._foreach_lerp(grads, means, momentum))
        rows, columns = whole.shape[1] // heads, whole.shape[2]
        updates = orthogonalised(whole.view(-1, rows, columns)).reshape(whole.shape).to(whole.dtype)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        scale *= _of_heads(heads, rows, columns)
        torch._foreach_add_(params, [_cut(u, p) for u, p in zip(updates, params, strict=True)], alpha=-lr * scale)

    @full_precision()
    def _step_sums(self, sums: list[Sum], lr: float, momentum: float, weight_decay: float) -> None:
        """Move heads as if they were stored whole, and bring their residuals back to their rank."""
        heads, columns = sums[0].heads, sums[0].down.shape[1]
        rows = sums[0].up.shape[0] // heads
        shared, ups, downs = [s.shared for s in sums], [s.up for s in sums], [s.down for s in sums]
        up, down = (_whole(own).unflatten(1, (heads, -1)) for own in (ups, downs))  # [n, H, D, r], [n, H, r, d]
        common, of_up, of_down = (_whole([p.grad for p in own if p.grad is not None]) for own in (shared, ups, downs))
        grads = least_gradients(up, down, of_up.view_as(up), of_down.view_as(down), common)  # [n, H, D, d]
        means = [self.state[p].setdefault("momentum", torch.zeros_like(g)) for p, g in zip(ups, grads, strict=True)]
        for p in (*downs, *shared):
            self.state[p].setdefault("momentum", torch.zeros(()))  # none of their own, but torch's checkpoints ask for some state
        torch._foreach_lerp_(means, list(grads), 1 - momentum)
        ahead = torch.lerp(grads, torch.stack(means), momentum)
        scale = self.scale(heads * rows, columns) * _of_heads(heads, rows, columns)
        updates = lr * scale * orthogonalised(ahead.flatten(0, 1)).view(ahead.shape).to(ahead.dtype)
        common = updates.mean(1)
        residual = (1 - lr * weight_decay) * (up @ down) - updates + common[:, None]
        up, down = nearest(residual, up)
        for own, new in ((ups, up), (downs, down)):
            for p, x in zip(own, new.flatten(1, 2), strict=True):
                p.copy_(_cut(x, p))
        for p, x in zip(shared, common, strict=True):
            p.mul_(1 - lr * weight_decay).sub_(_cut(x, p))


def _whole(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.full_tensor() if isinstance(t, DTensor) else t for t in tensors])


def _of_heads(heads: int, rows: int, columns: int) -> float:
    """What makes an update of the heads as large, as a sum of squares, as one of the whole."""
    return math.sqrt(min(heads * rows, columns) / (heads * min(rows, columns)))


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


def head_updates(model: nn.Module) -> Updates:
    """What the attentions of `model` say of their parameters."""
    return {getattr(m, name).weight: how for m in model.modules() for name, how in getattr(m, "updates", {}).items()}


def head_sums(model: nn.Module) -> list[Sum]:
    """The heads of the attentions of `model` that are sums."""
    out = []
    for m in model.modules():
        for names in getattr(m, "sums", ()):
            shared, up, down = (getattr(m, name).weight for name in names)
            out.append(Sum(shared, up, down, m.heads))  # type: ignore[arg-type]
    return out


def optimizers(
    model: nn.Module, name: str, matrix_lr: float, other_lr: float, scale: str = "spectral", per_head: bool = False
) -> list[torch.optim.Optimizer]:
    """The optimisers of `model`, matrices' first; each group's `initial_lr` is its peak, for `schedule`."""
    updates, sums = (head_updates(model), head_sums(model)) if per_head else ({}, [])
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and p.numel() and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen and p.numel()]
    adamw: dict[str, Any] = {"betas": (0.9, 0.95), "fused": named[0][1].is_cuda}
    both: list[torch.optim.Optimizer] = [
        Muon(matrices, matrix_lr, scale, updates=updates, sums=sums)
        if name == MUON
        else torch.optim.AdamW(matrices, lr=matrix_lr, weight_decay=0.1, **adamw),
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
