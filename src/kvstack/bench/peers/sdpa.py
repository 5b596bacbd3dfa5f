"""PyTorch's `scaled_dot_product_attention` in bf16, with each of its backends that may be the fastest.

Tokens are `[B, H, N, D]`, contiguous, not paged, and `enable_gqa` lets the backend read every KV head once.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvstack.bench.contender import Contender, Run, not_capable, version_of
from kvstack.bench.problem import Problem, attention, random_queries, random_tokens


def _build(backend: SDPBackend, problem: Problem, device: torch.device) -> Run:
    q = random_queries(problem, device)
    k, v = (x.transpose(1, 2).contiguous() for x in random_tokens(problem, device))  # [B, H, N, D]

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, scale=problem.scale, enable_gqa=True)

    def want() -> Tensor:
        return attention(q, k.transpose(1, 2), v.transpose(1, 2), problem)

    return Run(call, want, k.nbytes + v.nbytes, version_of("torch"))


def _missing(_: Problem) -> str | None:
    return not_capable(least=(8, 0))


PEERS = tuple(
    Contender(f"SDPA {backend.name.partition('_')[0].lower()}", "bf16", 1e-2, _missing, partial(_build, backend))
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
)
