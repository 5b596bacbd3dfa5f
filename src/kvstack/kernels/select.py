"""Which tokens of a row stay, by their scores: by a kernel on a GPU, elsewhere in torch.

Every KV head decides alone, and leaves as many tokens as all others of its row. What is not here: heads that decide together
(`allocators`), where the scores come from (`score`, `scorers`), and how tokens leave (`compact`), which takes what this returns.
"""

import torch
from torch import Tensor

from kvstack.kernels.decode import choose
from kvstack.scorers.base import standardised


def select(raw: Tensor, lengths: Tensor, places: int, standardise: bool) -> Tensor:
    """Indices `[B, H, places]` int32, ascending, of the `min(places, lengths[b])` tokens with the greatest scores; then any places.

    raw: `[B, H, G, N]` float32, contiguous, scores of the query heads of every KV head, anything from token lengths[b] on. A token's
    score is the greatest of its group, where NaN counts as -inf; of equal ones the older tokens stay. lengths: `[B]` int32, at most N,
    on the device. places: at most N. standardise: give the scores of every query head mean 0 and standard deviation 1 before, see
    `scorers.base.standardised`. Launches depend on shapes alone.
    """
    if choose(raw.device).name == "reference":
        here = torch.arange(raw.shape[-1], device=raw.device) < lengths[:, None, None, None]
        scores = (standardised(raw, here) if standardise else raw).masked_fill(~here, -torch.inf)
        best = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(2)
        # What is behind a row's end sorts behind all tokens: to the stable sort by its place, and then because places ascend.
        order = best.argsort(dim=-1, descending=True, stable=True)[..., :places]
        return order.sort(-1).values.int()
    from kvstack.kernels.top import top  # needs Triton

    return top(raw, lengths, places, standardise)
