"""What is computed: attention of new queries over B rows of N tokens, all of which they see, and the same in float64.

    q [B, Hq, T, D]    k, v [B, N, H, D]    out [B, Hq, T, D]

A decode step has one query per row and head, and there q and out are `[B, Hq, D]`. Nothing here knows of kernels or of time.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvstack.errors import BadInputError


@dataclass(frozen=True)
class Problem:
    """lengths: tokens of every row. heads: query heads, in groups that share one of `kv_heads`. dtype: of the queries and the output.
    queries: new tokens T of every row."""

    lengths: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    queries: int = 1

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads) < 1 or self.heads % self.kv_heads:
            raise BadInputError(
                f"{self.heads} query heads cannot share {self.kv_heads} KV heads. Give a number of query heads that they divide."
            )

    @staticmethod
    def parse(text: str, heads: int, kv_heads: int, head_dim: int) -> "Problem":
        """The problem of a text such as `32x4096`, rows times tokens. Raises BadInputError."""
        rows, tokens = pair(text, "rows and tokens, such as 32x4096")
        return Problem((tokens,) * rows, heads, kv_heads, head_dim)

    @property
    def batch(self) -> int:
        """Rows B."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens N of the longest row."""
        return max(self.lengths)

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        return float(self.head_dim**-0.5)

    def like(self, lengths: Sequence[int], dtype: torch.dtype | None = None) -> "Problem":
        """The same heads with other rows."""
        return replace(self, lengths=tuple(lengths), dtype=dtype or self.dtype)


def pair(text: str, such: str) -> tuple[int, int]:
    """The numbers of a text such as `32x4096`. such: what they are, and an example. Raises BadInputError."""
    found = re.fullmatch(r"\s*([1-9]\d*)\s*x\s*([1-9]\d*)\s*", text)
    if not found:
        raise BadInputError(f"{text!r} is no shape. Give {such}.")
    return int(found[1]), int(found[2])


def random_query(problem: Problem, device: torch.device) -> Tensor:
    """The queries `[B, Hq, D]` of a decode step."""
    return random_queries(problem, device).squeeze(2)


def random_queries(problem: Problem, device: torch.device) -> Tensor:
    """Queries `[B, Hq, T, D]`."""
    return torch.randn(problem.batch, problem.heads, problem.queries, problem.head_dim, device=device, dtype=problem.dtype)


def random_tokens(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor]:
    """`k, v [B, N, H, D]` whose logits with `random_query` have a standard deviation of 1.5."""
    shape = (problem.batch, problem.tokens, problem.kv_heads, problem.head_dim)
    k = torch.randn(shape, device=device, dtype=problem.dtype).mul_(1.5)
    return k, torch.randn(shape, device=device, dtype=problem.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """The attention in float64, of the shape of `q`. What lies behind the end of a row may be anything."""
    rows = []
    for b, n in enumerate(problem.lengths):
        keys, values = (x[b, :n].double().movedim(1, 0) for x in (k, v))  # [H, n, D]
        grouped = q[b].double().reshape(problem.kv_heads, -1, problem.head_dim)  # [H, G * T, D]
        weights = (grouped @ keys.transpose(1, 2) * problem.scale).softmax(-1)
        rows.append((weights @ values).reshape(q.shape[1:]))
    return torch.stack(rows)
