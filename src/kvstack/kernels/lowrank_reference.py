"""Attention of a decode step over low-rank records (LRKV), in torch: the reference of the kernel in `lowrank_hopper`.

Every head's key and value is a part that all H heads share and a residual of rank r of its own, K_h = X (W_s + U_h B_h^T)
(arXiv:2601.11471, section 3). What is kept of a token is one record of K and one of V:

    record [W]    k_s [D] | r_0 [r] | r_1 [r] | ... | r_(H-1) [r]    W = D + H r    k_s after RoPE

A logit is scale * (q . k_s + residual). A residual without positions is (B_h^T q) . r_h, with q before RoPE: the caller projects, once
a step. An exact one is q . Rot_t (B_h r_h), with q after RoPE, and B_h r_h is rebuilt for every token t (`Rebuild`). Values do not
turn, so that o_h = mean of v_s + B_h (mean of r_h): both means are what is returned, and the caller multiplies and adds.

Everything is computed in float32. Projections, RoPE of queries and how records are made are not here.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rebuild:
    """What exact residual logits need. up: `[H, D, r]`, the B_h of keys. cos, sin: `[positions, D / 2]` float32, what coordinates d and
    d + D / 2 turn with. offsets: `[B]` int32, the position of slot 0 of every row; those of the others follow."""

    up: Tensor
    cos: Tensor
    sin: Tensor
    offsets: Tensor

    @cached_property
    def half(self) -> tuple[Tensor, Tensor]:
        """cos and sin in float16, for the kernel: made once, at first use."""
        return self.cos.half(), self.sin.half()


def attend(
    q_shared: Tensor, q_residual: Tensor | Rebuild, keys: Tensor, values: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Means `[B, H, D]` of the shared values and `[B, H, r]` of every head's own residual latents, both in the type of `q_shared`.

    q_shared: `[B, H, 1, D]`, after RoPE. q_residual: `[B, H, r]`, or what rebuilds keys. keys, values: records `[B, N, W]`; what lies
    behind `lengths [B]` may be anything. A row without tokens gives zeros.
    """
    heads, head_dim = q_shared.shape[1], q_shared.shape[-1]
    behind = torch.arange(keys.shape[1], device=keys.device) >= lengths[:, None]  # [B, N]
    (k, k_latent), (v, v_latent) = (split(x.float().masked_fill(behind[..., None], 0), heads, head_dim) for x in (keys, values))
    q = q_shared.squeeze(2).float()
    logits = torch.einsum("bhd,bnd->bhn", q, k)
    if isinstance(q_residual, Rebuild):
        rebuilt = torch.einsum("hdr,bnhr->bhnd", q_residual.up.float(), k_latent)
        logits += torch.einsum("bhd,bhnd->bhn", q, _turn(rebuilt, q_residual))
    else:
        logits += torch.einsum("bhr,bnhr->bhn", q_residual.float(), k_latent)
    logits = (logits * scale).masked_fill(behind[:, None], -torch.inf)
    weights = (logits - logits.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
    shared, latent = torch.einsum("bhn,bnd->bhd", weights, v), torch.einsum("bhn,bnhr->bhr", weights, v_latent)
    return shared.to(q_shared.dtype), latent.to(q_shared.dtype)


def split(records: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """The shared part `[B, N, D]` and the latents `[B, N, H, r]` of records `[B, N, W]`, as views."""
    return records[..., :head_dim], records[..., head_dim:].unflatten(-1, (heads, -1))


def _turn(x: Tensor, rebuild: Rebuild) -> Tensor:
    """`x [B, H, N, D]` float32, turned as at its slots' positions."""
    position = rebuild.offsets[:, None] + torch.arange(x.shape[2], device=x.device)  # [B, N]
    position = position.clamp_max(len(rebuild.cos) - 1)  # behind the end of a row there may be none
    cos, sin = (t[position.long()][:, None].float() for t in (rebuild.cos, rebuild.sin))  # [B, 1, N, D / 2]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
