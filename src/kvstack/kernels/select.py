"""Which tokens of a row stay, by their scores: by a kernel on a GPU, elsewhere in torch.

Every KV head decides alone, and leaves as many tokens as all others of its row. What is not here: heads that decide together
(`allocators`), where the scores come from (`score`, `scorers`), and how tokens leave (`compact`), which takes what this returns.
"""

import torch
from torch import Tensor

from kvstack.kernels.decode import choose
from kvstack.scorers.base import standardised


def select(raw: Tensor, lengths: Tensor, places: int, standardise: bool, ordered: bool) -> Tensor:
    """Indices `[B, H, places]` int32 of the `min(places, lengths[b])` tokens with the greatest scores; then any places.

    raw: `[B, H, G, N]` float32, contiguous, scores of the query heads of every KV head, anything from token lengths[b] on. A token's
    score is the greatest of its group, where NaN counts as -inf; of equal ones the first tokens stay. lengths: `[B]` int32, at most N,
    on the device. places: at most N. standardise: give the scores of every query head mean 0 and standard deviation 1 before, see
    `scorers.base.standardised`. ordered: indices ascend. Otherwise those below their number stand at their own places, and the others,
    ascending, at the places of the tokens that leave: so few tokens move. Launches depend on shapes alone.
    """
    if choose(raw.device).name == "reference":
        here = torch.arange(raw.shape[-1], device=raw.device) < lengths[:, None, None, None]
        scores = (standardised(raw, here) if standardise else raw).masked_fill(~here, -torch.inf)
        best = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(2)
        # What is behind a row's end sorts behind all tokens: to the stable sort by its place, and then because places ascend.
        keep = best.argsort(dim=-1, descending=True, stable=True)[..., :places].sort(-1).values
        return (keep if ordered else _in_place(keep, lengths.clamp_max(places), raw.shape[-1])).int()
    from kvstack.kernels.top import top  # needs Triton

    return top(raw, lengths, places, standardise, ordered)


def _in_place(keep: Tensor, counts: Tensor, tokens: int) -> Tensor:
    """Ascending indices `keep [B, H, M]` below `tokens`, of which those below `counts [B]` come to stand at their own places."""
    place = torch.arange(keep.shape[-1], device=keep.device)
    stays = torch.zeros(*keep.shape[:-1], tokens, dtype=torch.bool, device=keep.device).scatter_(-1, keep, True)[..., : len(place)]
    first = (stays & (place < counts[:, None, None])).sum(-1, keepdim=True)  # of those that move
    moving = keep.gather(-1, (first + (~stays).cumsum(-1) - 1).clamp(0, max(0, len(place) - 1)))
    return torch.where(stays, place, moving)
