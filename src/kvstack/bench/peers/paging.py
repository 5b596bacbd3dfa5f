"""Pages in the way of vLLM and FlashInfer: a pool `[P, page, H, D]` and a table of page numbers."""

import torch
from torch import Tensor


def paged(x: Tensor, size: int, order: Tensor) -> Tensor:
    """The pool `[P, size, H, D]` of tokens `x [B, N, H, D]`, where page p of the line of all rows' pages is page `order[p]`."""
    pages = x.reshape(-1, size, *x.shape[2:])
    pool = torch.empty_like(pages)
    pool[order] = pages
    return pool


def random_order(batch: int, tokens: int, size: int, device: torch.device) -> Tensor:
    """Random page numbers `[B * N / size]` int64."""
    return torch.randperm(batch * tokens // size, device=device)


def not_paged(tokens: int, size: int) -> str | None:
    """Why rows of N tokens do not fill pages, or None."""
    return f"{tokens} tokens are no whole pages of {size}" if tokens % size else None
