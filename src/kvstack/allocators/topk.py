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

    heads: see `scorers.base.Selection`. "shared" and "union" take layers of the same tokens and counts only. Layers may lie on several
    devices; each gets its answer on the device where the decision fell, which for layers that do not decide alone is the first's.
    """
    if heads == "separate":
        return [_top(s, c) for s, c in zip(scores, counts, strict=True)]
    device = scores[0].device
    if heads == "pooled":
        flat = torch.cat([s.flatten(1).to(device) for s in scores], 1)
        total = torch.stack([c.sum(1).to(device) for c in counts]).sum(0)
        parts = _top(flat, total).split([s[0].numel() for s in scores], 1)
        return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]
    together = torch.stack([s.to(device) for s in scores])
    joint = together.mean(0) if heads == "shared" else together.amax((0, 2)).unsqueeze(1).expand_as(scores[0])
    return [_top(joint, c) for c in counts]


def _top(scores: Tensor, counts: Tensor) -> Tensor:
    """True at the `counts [...]` greatest of `scores [..., N]` that are more than -inf."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    best = torch.arange(scores.shape[-1], device=scores.device) < counts.to(scores.device)[..., None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, best) & (scores > -torch.inf)


def indices(mask: Tensor, most: int) -> Tensor:
    """Where `mask [..., N]` is true, `[..., most]` int32, ascending; behind that, any place. Nothing waits for a device."""
    wanted = torch.arange(1, most + 1, dtype=torch.int32, device=mask.device).expand(*mask.shape[:-1], most).contiguous()
    found = torch.searchsorted(mask.cumsum(-1, dtype=torch.int32), wanted, out_int32=True)  # the n-th true is where the count gets to n
    return found.clamp_max_(max(0, mask.shape[-1] - 1))
