"""Attention of a decode step over low-rank records (LRKV), fused: what `lowrank_reference` computes, at the speed of memory on Hopper.

Records `[shared D | r_0 | r_1 | ...]` of K and of V are read once, but for the shared part, which every group of heads reads:

    programs    program (group, split, row) takes G neighbouring heads, whose latents are G r neighbouring columns of a record, and a
                share of the row's tiles of `tokens` records. Groups are neighbours in time, and so all but one find the shared part
                in the level-2 cache
    logits      one product of the 16 query rows (G of them real) with the shared tile, and one with the latents: in that matrix of
                queries each head's row is zero but for its own columns
    exact       of exact residuals (`Rebuild`) no key is rebuilt: RoPE's pairs j and j+ = j + D / 2 make of k = B_h r_t

                    q . Rot_t k = sum_j cos_tj (q_j k_j + q_j+ k_j+) + sin_tj (q_j+ k_j - q_j k_j+) = (cos_t A_h + sin_t S_h) . r_t
                    A_h = diag(q) B + diag(q+) B+      S_h = diag(q+) B - diag(q) B+      [D / 2, r] each, of both halves of B_h

                The bracket is the query that head h has for the latents of token t. For all heads of a program it is two products,
                with tables that all heads share, of A and S, which are made once and stay in registers. It is multiplied with the
                latents and summed over r in float32
    means       the weights times `[v_s | r_0 ... r_(G-1)]`, of which a head keeps its own columns
    splits      out [B * H, S, P] float32, P >= D + r a power of two, and lse2 [B * H, S], which `merge` adds up, always in one order

All products have the tile second, `[rows x K] @ [K x tokens]`: A and S stay where they are, and as the first operand of a product with
16 columns Triton 3.6 reads a tile from beyond shared memory on sm_90. Products are of 16-bit numbers, summed in float32; weights are
rounded to the type of the values, and cos, sin, A and S to float16, whose 11 bits make less of an error than records have.

The grid depends on shapes alone and lengths are read on the device, so a CUDA graph can replay a step.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvstack.kernels.device import processors
from kvstack.kernels.lowrank_reference import Rebuild
from kvstack.kernels.merge import merge_partials

ROWS = 16  # query rows of a product, the fewest a tensor core takes
WAVES = 2  # programs for every place on the GPU, at most: more share rows more evenly, fewer start less often
LEAST = 256  # tokens of a split, at least, if the row has them


@dataclass(frozen=True)
class Tile:
    """How a program is built. tokens: of a tile. columns: of latents that it takes, at most, for heads of up to 128: heads times rank,
    each padded to a power of two. stages: tiles kept in shared memory, plus one. resident: programs on a multiprocessor."""

    tokens: int
    columns: int
    warps: int
    stages: int
    resident: int


# One program with two tiles in flight beside the one it reads is 4 % faster than two programs with one each. Fewer heads would read the
# shared part more often, and the level-2 cache has a limit.
NOPE = Tile(tokens=32, columns=512, warps=4, stages=3, resident=1)
# A and S of four heads take 64 registers of a thread of eight warps, of eight heads more than there are. Deeper, shorter and wider
# tiles, and two programs, are as slow or slower: it is not memory that limits it.
EXACT = Tile(tokens=32, columns=256, warps=8, stages=3, resident=1)


def attend(
    q_shared: Tensor, q_residual: Tensor | Rebuild, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, tile: Tile
) -> tuple[Tensor, Tensor]:
    """`lowrank.lowrank_decode` by the kernel, built as `tile` says.

    All tensors have unit stride in their last dimension, and records of a row follow each other. lengths: `[B]` int32, at most N.
    """
    (batch, heads, steps, head_dim), (_, slots, width) = q_shared.shape, keys.shape
    exact = isinstance(q_residual, Rebuild)
    rank = q_residual.up.shape[-1] if isinstance(q_residual, Rebuild) else q_residual.shape[-1]
    assert steps == 1 and width == head_dim + heads * rank
    assert values.shape == keys.shape and values.dtype == keys.dtype and lengths.dtype == torch.int32
    assert keys.stride(1) == values.stride(1) == width and keys.stride(2) == values.stride(2) == 1
    group, columns, padded, places = shape(heads, head_dim, rank, tile)
    parts = splits(batch * heads // group, slots, processors(keys.device) * tile.resident, tile.tokens)
    out = torch.empty(batch * heads, parts, 1, places, dtype=torch.float32, device=keys.device)
    lse2 = torch.empty(batch * heads, parts, 1, dtype=torch.float32, device=keys.device)
    if isinstance(q_residual, Rebuild):
        assert q_residual.up.shape == (heads, head_dim, rank) and q_residual.cos.shape == q_residual.sin.shape
        residual = q_residual.up, *q_residual.half, q_residual.offsets
    else:
        residual = q_residual.to(keys.dtype), lse2, lse2, lengths  # what is not exact reads no table and no offset
    lowrank_kernel[(heads // group, parts, batch)](
        q_shared.contiguous(), *(x.contiguous() for x in residual), keys, values, lengths, out, lse2,
        keys.stride(0), values.stride(0), heads, scale * math.log2(math.e),
        M=ROWS, D=head_dim, R=rank, G=group, W=width, COLUMNS=columns, PADDED=padded, P=places, TOKENS=tile.tokens, EXACT=exact,
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    # Nobody writes behind D + r, and what merging makes of that is not looked at.
    merged = torch.empty(batch, heads, 1, places, dtype=q_shared.dtype, device=keys.device)
    merge_partials(merged, None, (out, lse2), None, parts * batch * heads, None, None, None, heads)
    return merged[:, :, 0, :head_dim], merged[:, :, 0, head_dim : head_dim + rank]


def shape(heads: int, head_dim: int, rank: int, tile: Tile) -> tuple[int, int, int, int]:
    """Heads of a program; columns of their latents, of one head's, and of a partial, each padded to a power of two."""

    def padded(n: int, least: int = 16) -> int:
        return max(least, 1 << (n - 1).bit_length())  # 16 are the fewest rows of a product, and the least that it sums over

    columns = tile.columns * 128 // max(128, head_dim)  # sums of products, A and S grow with the head, and there are as many registers
    group = max((g for g in range(1, ROWS + 1) if heads % g == 0 and padded(g, 1) * padded(rank) <= columns), default=1)
    return group, padded(group * rank), padded(rank), padded(head_dim + rank)


def splits(programs: int, slots: int, places: int, tokens: int) -> int:
    """Shares of a row of `slots` records, for as many programs without splits and as many places for them on the GPU."""
    return max(1, min(WAVES * places // programs, -(-slots // max(LEAST, tokens))))


@triton.jit
def lowrank_kernel(
    q, residual, cos, sin, offsets, keys, values, lengths, out, lse2, keys_b, values_b, heads, scale,
    M: tl.constexpr, D: tl.constexpr, R: tl.constexpr, G: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
    P: tl.constexpr, TOKENS: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program of `attend`. residual: queries `[B, H, r]`, or up-projections `[H, D, r]`. x_b: stride of x in b. scale: base 2."""
    first, split, b = tl.program_id(0) * G, tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, d, column, token = tl.arange(0, M), tl.arange(0, D), tl.arange(0, COLUMNS), tl.arange(0, TOKENS)
    length = tl.load(lengths + b)
    share = tl.cdiv(tl.cdiv(length, TOKENS), tl.num_programs(1)) * TOKENS
    start = split * share
    stop = tl.minimum(start + share, length)

    head = b * heads + first + row
    real = row < G
    kind = keys.dtype.element_ty
    record = tl.full((), W, tl.int64)
    query = tl.load(q + head[:, None] * D + d[None, :], mask=real[:, None], other=0.0).to(kind)
    own = (column[None, :] // R == row[:, None]) & (column < G * R)[None, :]
    latents = D + first * R + column
    if EXACT:
        HEADS: tl.constexpr = triton.next_power_of_2(G)
        a, s = _queries(q + (b * heads + first) * D, residual + first * D * R, G, HEADS, D, R, PADDED, M)
        pair, place = tl.arange(0, D // 2), tl.arange(0, HEADS * PADDED)
        g, j = place // M % HEADS, place // (M * HEADS) * M + place % M
        there = (g < G) & (j < R)
        placed = D + (first + g) * R + j
        offset = tl.load(offsets + b)
    else:
        latent_query = tl.load(residual + (b * heads + first) * R + column[None, :], mask=own, other=0.0)

    top = tl.full((M,), float("-inf"), tl.float32)
    mass = tl.zeros((M,), tl.float32)
    shared = tl.zeros((M, D), tl.float32)
    latent = tl.zeros((M, COLUMNS), tl.float32)
    for t in tl.range(start, stop, TOKENS, num_stages=STAGES):
        # What is behind a row's end is not read, and counts as zero: there may be NaN.
        seen = t + token < stop
        ours = seen[:, None] & (column < G * R)[None, :]
        k_tile = keys + b * keys_b + t * record
        v_tile = values + b * values_b + t * record
        k = tl.load(k_tile + token[:, None] * W + d[None, :], mask=seen[:, None], other=0.0)
        x = tl.dot(query, tl.trans(k))
        if EXACT:
            at = (offset + t + token)[:, None] * (D // 2) + pair[None, :]
            y = tl.dot(a, tl.trans(tl.load(cos + at, mask=seen[:, None], other=0.0)))
            y = tl.dot(s, tl.trans(tl.load(sin + at, mask=seen[:, None], other=0.0)), y)  # [HEADS * PADDED, TOKENS]
            k_latent = tl.load(k_tile + token[:, None] * W + placed[None, :], mask=seen[:, None] & there[None, :], other=0.0)
            y = tl.reshape(tl.trans(y) * k_latent, (TOKENS, PADDED // M, HEADS, M))
            y = tl.trans(tl.sum(tl.reshape(tl.permute(y, (0, 2, 1, 3)), (TOKENS, HEADS, PADDED)), 2))  # [HEADS, TOKENS]
            x += tl.reshape(tl.broadcast_to(y[None], (M // HEADS, HEADS, TOKENS)), (M, TOKENS))  # again in rows that are not real
        else:
            k_latent = tl.load(k_tile + token[:, None] * W + latents[None, :], mask=ours, other=0.0)
            x = tl.dot(latent_query, tl.trans(k_latent), x)
        x = tl.where(seen[None, :], x * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 1))
        weight = tl.exp2(x - higher[:, None])
        decay = tl.exp2(top - higher)
        top = higher
        mass = mass * decay + tl.sum(weight, 1)
        weight = weight.to(kind)
        v = tl.load(v_tile + token[:, None] * W + d[None, :], mask=seen[:, None], other=0.0)
        v_latent = tl.load(v_tile + token[:, None] * W + latents[None, :], mask=ours, other=0.0)
        shared = tl.dot(weight, v, shared * decay[:, None])
        latent = tl.dot(weight, v_latent, latent * decay[:, None])

    # A split without tokens gives zeros of no weight.
    inverse = 1.0 / tl.where(mass > 0, mass, 1.0)[:, None]
    to = head * tl.num_programs(1) + split
    tl.store(lse2 + to, top + tl.log2(mass), mask=real)
    to = out + to[:, None] * P
    tl.store(to + d[None, :], shared * inverse, mask=real[:, None])
    tl.store(to + (D + column[None, :] - row[:, None] * R), latent * inverse, mask=own)


@triton.jit
def _queries(query, up, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr):
    """A^T and S^T `[HEADS * PADDED, D / 2]` float16 of the G heads from those pointers on, zero where there is no head or latent.

    Rows are M latents of the first head, M of the second, ..., and the next M of the first: so few threads have rows of one head.
    """
    g, pair = tl.arange(0, HEADS)[None, :, None, None], tl.arange(0, D // 2)[None, None, None, :]
    j = tl.arange(0, PADDED // M)[:, None, None, None] * M + tl.arange(0, M)[None, None, :, None]
    q1 = tl.load(query + g * D + pair, mask=g < G, other=0.0).to(tl.float32)
    q2 = tl.load(query + g * D + D // 2 + pair, mask=g < G, other=0.0).to(tl.float32)
    at = up + (g * D + pair) * R + j
    b1 = tl.load(at, mask=(g < G) & (j < R), other=0.0).to(tl.float32)
    b2 = tl.load(at + D // 2 * R, mask=(g < G) & (j < R), other=0.0).to(tl.float32)
    return _first_operand(q1 * b1 + q2 * b2), _first_operand(q2 * b1 - q1 * b2)


@triton.jit
def _first_operand(x):
    """`x [..., d]` as `[n, d]` float16, put by an empty product where products leave their sums, and where others take them from."""
    x = tl.reshape(x, (x.numel // x.shape[3], x.shape[3]))
    return tl.dot(tl.zeros((x.shape[0], 16), tl.float16), tl.zeros((16, x.shape[1]), tl.float16), x).to(tl.float16)
