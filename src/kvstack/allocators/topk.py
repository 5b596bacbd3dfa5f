"""All or nothing: the tokens with the greatest scores stay, the rest leave.

Layers may hold different numbers of tokens; a score of -inf is no token, one of +inf is a token that stays before all others. Of equal
scores the older token, the lower KV head and the lower layer win, so that the same scores always keep the same tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstack.scorers.base import Heads


def kept(scores: Sequence[Tensor], counts: Sequence[Tensor], heads: Heads) -> list[Tensor]:
    """Which tokens stay, `[B, H, N]` bool for each layer, of its `scores [B, H, N]` and of its `counts [B, H]` of tokens that may stay.

    heads: see `scorers.base.Selection`. "shared" and "union" take layers of the same tokens and counts only.
    """
    if heads == "separate":
        return [_top(s, c) for s, c in zip(scores, counts, strict=True)]
    if heads == "pooled":
        flat = torch.cat([s.flatten(1) for s in scores], 1)
        total = torch.stack([c.sum(1) for c in counts]).sum(0)
        parts = _top(flat, total).split([s[0].numel() for s in scores], 1)
        return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]
    together = torch.stack(list(scores))
    joint = together.mean(0) if heads == "shared" else together.amax((0, 2)).unsqueeze(1).expand_as(scores[0])
    return [_top(joint, c) for c in counts]


def _top(scores: Tensor, counts: Tensor) -> Tensor:
    """True at the `counts [...]` greatest of `scores [..., N]` that are more than -inf."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order))
    return (rank < counts.to(scores.device)[..., None]) & (scores > -torch.inf)
