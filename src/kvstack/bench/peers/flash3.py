"""FlashAttention-3 on pages, in bf16 and with everything in FP8, from vLLM's build of it or from `flash_attn_interface`.

From vLLM it is called as vLLM calls it: `flash_attn_varlen_func` with a block table, and a schedule that `get_scheduler_metadata` makes
once per step. The number of splits is left to its own heuristics (0), which need not be safe for graphs whose lengths change. Pages of
16 are vLLM's default, pages of 128 let it load with the tensor memory accelerator. In FP8 the query is FP8 already: casting it is not
timed.

Many queries (`PREFILL`) see all tokens, without a mask. They also come without pages: then it can always load with the tensor memory
accelerator, which for pages depends on the size of its tiles.
"""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvstack.bench.contender import Contender, Run, not_capable, unusable, version_of
from kvstack.bench.peers.paging import not_paged, paged, random_order
from kvstack.bench.problem import Problem, attention, random_queries, random_tokens

VLLM, ALONE = "vllm.vllm_flash_attn.flash_attn_interface", "flash_attn_interface"


def _from_vllm() -> str | None:
    """Why vLLM's build cannot be used, or None."""
    if reason := unusable(VLLM, "vllm"):
        return reason
    module = import_module(VLLM)
    return None if module.FA3_AVAILABLE else f"vLLM's build does not load: {module.FA3_UNAVAILABLE_REASON}"


def _missing(page: int | None, problem: Problem) -> str | None:
    if reason := not_capable(least=(9, 0), most=(9, 0)) or (page and not_paged(problem.tokens, page)):
        return reason
    reason, alone = _from_vllm(), unusable(ALONE, "flash_attn_interface")
    return f"{reason}, and {alone}" if reason and alone else None


def _build(page: int | None, dtype: torch.dtype, problem: Problem, device: torch.device) -> Run:
    b, h = problem.batch, problem.kv_heads
    q = random_queries(problem, device).to(dtype)
    k, v = (x.to(dtype) for x in random_tokens(problem, device))
    k_pool, v_pool, table = k, v, None
    if page:
        order = random_order(b, problem.tokens, page, device)
        pools = [paged(x, page, order) for x in (k.view(torch.uint8), v.view(torch.uint8))]  # bytes, since FP8 cannot be indexed
        k_pool, v_pool = (pool.view(dtype) for pool in pools)
        table = order.reshape(b, -1).int()
    lengths = torch.tensor(problem.lengths, dtype=torch.int32, device=device)
    ones = torch.ones(b, h, device=device) if dtype == torch.float8_e4m3fn else None
    descale = {"q_descale": ones, "k_descale": ones, "v_descale": ones}
    prepare = _prepare_alone if _from_vllm() else _prepare_vllm
    new = q.transpose(1, 2).contiguous()  # [B, T, Hq, D]
    call, detail = prepare(new, k_pool, v_pool, table, lengths, descale, problem)
    return Run(call, lambda: attention(q, k, v, problem).transpose(1, 2), k_pool.nbytes + v_pool.nbytes, detail)


def _prepare_vllm(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, lengths: Tensor, descale: dict[str, Any], problem: Problem
) -> tuple[Any, str]:
    module = import_module(VLLM)
    t, causal = problem.queries, problem.queries == 1  # for one query both are the same, and vLLM says causal
    starts = torch.arange(problem.batch + 1, dtype=torch.int32, device=q.device) * t
    schedule = module.get_scheduler_metadata(
        batch_size=problem.batch, max_seqlen_q=t, max_seqlen_k=problem.tokens, num_heads_q=problem.heads, num_heads_kv=problem.kv_heads,
        headdim=problem.head_dim, cache_seqlens=lengths, qkv_dtype=q.dtype, cu_seqlens_q=starts,
        page_size=None if table is None else k.shape[1], causal=causal, num_splits=0,
    )  # fmt: skip
    out = torch.empty(q.shape, dtype=problem.dtype, device=q.device).flatten(0, 1)
    call = partial(
        module.flash_attn_varlen_func, q.flatten(0, 1), k, v, max_seqlen_q=t, cu_seqlens_q=starts, max_seqlen_k=problem.tokens,
        seqused_k=lengths, softmax_scale=problem.scale, causal=causal, block_table=table, out=out, scheduler_metadata=schedule,
        num_splits=0, fa_version=3, **descale,
    )  # fmt: skip
    return call, version_of("vllm")


def _prepare_alone(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, lengths: Tensor, descale: dict[str, Any], problem: Problem
) -> tuple[Any, str]:
    call = partial(
        import_module(ALONE).flash_attn_with_kvcache, q, k, v, cache_seqlens=lengths, page_table=table,
        softmax_scale=problem.scale, causal=problem.queries == 1, num_splits=0, **descale,
    )  # fmt: skip
    return call, version_of("flash_attn_3")


def _contenders(*pages: int | None) -> tuple[Contender, ...]:
    return tuple(
        Contender(f"FlashAttention-3, {where}", bits, tolerance, partial(_missing, page), partial(_build, page, dtype))
        for bits, dtype, tolerance in (("bf16", torch.bfloat16, 1e-2), ("fp8", torch.float8_e4m3fn, 5e-2))
        for page, where in ((page, f"page {page}" if page else "no pages") for page in pages)
    )


PEERS = _contenders(16, 128)
PREFILL = _contenders(None, 16, 128)
