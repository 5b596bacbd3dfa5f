"""FlashInfer's `BatchDecodeWithPagedKVCacheWrapper` on pages of 16, with K and V in bf16 or FP8 and the query in bf16.

`use_tensor_cores=True` is the faster kernel for groups of 4 and more. The plan is made once per step and is not timed; without its own
graph mode, which pads the grid, it fits the lengths exactly. K and V of a page are neighbours, the layout that it compiles its main
kernel for. The first call compiles it with nvcc unless it is there already.
"""

from functools import cache, partial
from importlib import import_module

import torch
from torch import Tensor

from kvstack.bench.contender import Contender, Run, not_capable, unusable, version_of
from kvstack.bench.peers.paging import not_paged, paged, random_order
from kvstack.bench.problem import Problem, attention, random_query, random_tokens

PAGE = 16


def _missing(problem: Problem) -> str | None:
    return not_capable(least=(8, 0)) or not_paged(problem.tokens, PAGE) or unusable("flashinfer", "flashinfer-python")


@cache
def _workspace(device: torch.device) -> Tensor:
    """The buffer for splits, which runs can share since they never overlap."""
    return torch.zeros(128 << 20, dtype=torch.uint8, device=device)


def _build(dtype: torch.dtype, problem: Problem, device: torch.device) -> Run:
    b, pages = problem.batch, problem.tokens // PAGE
    q = random_query(problem, device)
    k, v = (x.to(dtype) for x in random_tokens(problem, device))
    order = random_order(b, problem.tokens, PAGE, device)
    pools = [paged(x.view(torch.uint8), PAGE, order) for x in (k, v)]  # bytes, since FP8 cannot be indexed
    pool = torch.stack(pools, 1).view(dtype)  # [P, 2, page, H, D]
    wrapper = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(_workspace(device), "NHD", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(b + 1, dtype=torch.int32, device=device) * pages,
        order.int(),
        torch.full((b,), PAGE, dtype=torch.int32, device=device),
        problem.heads,
        problem.kv_heads,
        problem.head_dim,
        PAGE,
        q_data_type=problem.dtype,
        kv_data_type=dtype,
        sm_scale=problem.scale,
    )
    out = torch.empty_like(q)
    return Run(
        partial(wrapper.run, q, pool, out=out), lambda: attention(q, k, v, problem), pool.nbytes, version_of("flashinfer-python")
    )


PEERS = tuple(
    Contender(f"FlashInfer, page {PAGE}", bits, 1e-2, _missing, partial(_build, dtype))
    for bits, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn))
)
