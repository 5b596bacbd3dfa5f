"""Tokens of pages leave: those that stay move to the front of their row, by a kernel on a GPU, elsewhere by `pages.read` and `write`.

Every KV head of a row may keep other tokens, but as many. Records move bit for bit; nothing is decoded. The lengths are the caller's to
change, and which tokens stay is a scorer's to say.
"""

import torch
from torch import Tensor

from kvstack.kernels.decode import choose
from kvstack.kernels.pages import Pages, read, write


def compact(pages: Pages, keep: Tensor, counts: Tensor, ordered: bool) -> None:
    """In row b and head h, make the tokens `keep[b, h, :counts[b]]` the tokens 0, ..., counts[b] - 1, in place.

    keep: `[B, H, M]` int32, tokens of the row, none twice, the n-th no less than n, as if they ascend; anything behind `counts[b]`.
    counts: `[B]` int32, at most M. Both on the device. ordered: as of `select`; it says only what is fast. What is stored from token
    counts[b] on stays as it is: in the last page old tokens, which are numbers.
    """
    if choose(keep.device).name == "reference":
        b, h, m = (torch.arange(n, device=keep.device) for n in keep.shape)
        source = keep.long().masked_fill(m >= counts[:, None, None], 0)
        k, v, scales = (x[b[:, None, None], h[:, None], source] for x in read(pages))
        write(pages, k, v, scales, torch.zeros_like(counts), counts)
    else:
        from kvstack.kernels.move import move  # needs Triton

        move(pages, keep, counts, ordered)
