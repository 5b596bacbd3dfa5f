"""Attention over latents, in torch: queries are moved into the space of what is cached, and no key or value of a head is made.

Logits of several parts of a record add up to those of one softmax, and the mean of latents is moved back once per query:

    q . (W c) = (W^T q) . c             sum_n p_n W c_n = W sum_n p_n c_n

    logits [B, H, T, N] float32         mask: what transformers gives its SDPA attention: None (causal), bool or additive, [B, 1, T, N]

It is the way of short chunks, and of steps that no kernel serves (`kernels.lowrank`). It does not project; that is the business of each
attention.
"""

import torch
from torch import Tensor

TILE = 1024  # tokens whose keys are rebuilt at once where position allows nothing cheaper


def softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Weights `[B, H, T, N]` float32 of scaled `logits`; where a query sees nothing they are zero."""
    t, n = logits.shape[-2:]
    if mask is None:
        mask = torch.ones(t, n, dtype=torch.bool, device=logits.device).tril(n - t)
    if mask.dtype != torch.bool:
        return (logits + mask).softmax(-1)
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [..., D]` turned by RoPE (half-split pairs)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def residual_logits(q: Tensor, latents: Tensor, up: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Logits `q_h . Rot_n(up_h r_hn)`, `[B, H, T, N]`, of residuals that are cached before RoPE, a tile of tokens at a time.

    q: `[B, H, T, D]` after RoPE. latents: `[B, N, H, r]`. up: `[H, D, r]`. cos, sin: `[B, N, D]` of the cached tokens. LRKV `exact`:
    RoPE does not commute with `up`, so there is no cheaper exact way (and the identity in arXiv:2601.11471, section 3, is wrong).
    """
    tiles = []
    for some, c, s in zip(latents.split(TILE, 1), cos.split(TILE, 1), sin.split(TILE, 1), strict=True):
        key = rotate(torch.einsum("bnhr,hdr->bhnd", some, up), c[:, None], s[:, None])
        tiles.append(q @ key.transpose(-1, -2))
    return torch.cat(tiles, -1)
