"""vLLM's `turboquant_4bit_nc`: the Triton kernel that its backend of that name calls for decode steps, on random codes.

A slot of one token and KV head, D/2 + 2 + D/2 + 4 bytes, in a pool `[P, 16, H, slot]` uint8:

    D codes of 4 bits, the lower half of a byte first | norm float16 | D codes of 4 bits | scale float16 | zero float16

K is norm times the codebook's vector, made a unit vector, in Hadamard-rotated space; V is code * scale + zero. It is called as vLLM
does: buffers are there already, and rows are split in 32, vLLM's default. Its rotation of the query is a product in float32.
"""

from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from kvstack.bench.contender import Contender, Run, not_capable, unusable, version_of
from kvstack.bench.peers.paging import not_paged, random_order
from kvstack.bench.problem import Problem, attention, random_query
from kvstack.codecs.lloyd import lloyd_max
from kvstack.codecs.rotation import rotation

MODULE = "vllm.v1.attention.ops.triton_turboquant_decode"
PAGE = 16
SPLITS = 32


def _missing(problem: Problem) -> str | None:
    d = problem.head_dim
    if d & (d - 1):
        return f"its rotation needs a head size that is a power of two, not {d}"
    return not_capable(least=(8, 0)) or not_paged(problem.tokens, PAGE) or unusable(MODULE, "vllm")


def _build(problem: Problem, device: torch.device) -> Run:
    b, hq, d = problem.batch, problem.heads, problem.head_dim
    q = random_query(problem, device)
    order = random_order(b, problem.tokens, PAGE, device)
    slots = torch.randint(0, 256, (len(order), PAGE, problem.kv_heads, d + 6), dtype=torch.uint8, device=device)
    norm, affine = d // 2, d + 2
    slots[..., norm : norm + 2] = _halves(slots, 0.5 * d**0.5, 1.5 * d**0.5)
    slots[..., affine : affine + 2] = _halves(slots, 0.1, 0.3)
    slots[..., affine + 2 :] = _halves(slots, -2.0, -1.0)
    table = order.reshape(b, -1).int()
    levels = torch.tensor(lloyd_max(4, d).levels, dtype=torch.float32, device=device) / d**0.5
    hadamard = rotation(d, None, device)
    call = partial(
        import_module(MODULE).triton_turboquant_decode_attention,
        query=q,
        kv_cache=slots,
        block_table=table,
        seq_lens=torch.tensor(problem.lengths, dtype=torch.int32, device=device),
        Pi=hadamard,
        centroids=levels,
        scale=problem.scale,
        mse_bits=4,
        key_packed_size=d // 2 + 2,
        value_quant_bits=4,
        norm_correction=True,
        PiT=hadamard.T.contiguous(),
        mid_o_buf=torch.empty(b, hq, SPLITS, d + 1, device=device),
        output_buf=torch.empty_like(q),
        lse_buf=torch.empty(b, hq, device=device),
        max_num_kv_splits=SPLITS,
    )

    def want() -> Tensor:
        held = slots[table.long()].flatten(1, 2)  # [B, N, H, slot]
        unit = levels[_codes(held[..., :norm])].double()
        k = unit / unit.norm(dim=-1, keepdim=True) * _numbers(held[..., norm : norm + 2])
        v = _codes(held[..., norm + 2 : affine]) * _numbers(held[..., affine : affine + 2]) + _numbers(held[..., affine + 2 :])
        return attention(q, k @ hadamard.double(), v, problem)

    return Run(call, want, slots.nbytes, version_of("vllm"))


def _halves(slots: Tensor, low: float, high: float) -> Tensor:
    """The bytes `[..., 2]` of random float16 numbers, one per slot."""
    return torch.empty(*slots.shape[:-1], 1, device=slots.device).uniform_(low, high).half().view(torch.uint8)


def _numbers(held: Tensor) -> Tensor:
    """The float16 numbers `[..., 1]` in bytes `[..., 2]`, as float64."""
    return held.contiguous().view(torch.float16).double()


def _codes(held: Tensor) -> Tensor:
    """The codes `[..., 2 n]` in bytes `[..., n]`."""
    return torch.stack([held & 15, held >> 4], -1).flatten(-2).long()


PEERS = (Contender(f"vLLM turboquant_4bit_nc, page {PAGE}", "4", 1e-2, _missing, _build),)
