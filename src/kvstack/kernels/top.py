"""The tokens with the greatest scores, in order, in plain Triton: what `select.select` says.

A program does one KV head of one row. It reads the scores of its query heads once for their means, once for their deviations and once
to make of every token's greatest score a key, an int32 with the order of the floats:

    bits >= 0    key = bits
    bits < 0     key = bits with all but the sign flipped        -0 is made 0 and NaN is made -inf before

Keys are kept in a row of global memory that no other program sees, which for some thousand tokens stays in the nearest cache. The key
of the last token that stays is found bit by bit, from the sign down, each by counting the keys that are no less. Then tokens with
greater keys stay, and of those with the same key the first ones, as many as there are places left; running sums over both say where an
index goes. With ordered=False a first pass lists, behind the keys, the places of tokens that leave, and a second one hands them out to
the tokens behind all places that stay. Sums are of whole numbers or in a fixed order: the same scores always give the same tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-(2**31))  # of no float
SHORT, LONG = (1024, 4), (2048, 8)  # keys that a program counts at once, and its warps; for rows of up to 8192 tokens, and others


def top(raw: Tensor, lengths: Tensor, places: int, standardise: bool, ordered: bool) -> Tensor:
    """`select.select` on a GPU."""
    batch, heads, groups, slots = raw.shape
    assert raw.is_contiguous() and raw.dtype == torch.float32 and places <= slots
    block, warps = SHORT if slots <= 8192 else LONG
    row = triton.cdiv(slots, block) * block + (0 if ordered else places)
    keys = torch.empty(batch, heads, row, dtype=torch.int32, device=raw.device)
    out = torch.zeros(batch, heads, places, dtype=torch.int32, device=raw.device)
    if out.numel():
        top_kernel[(batch * heads,)](
            raw, lengths, keys, out, heads, groups, slots, places, row,
            GROUPS=triton.next_power_of_2(groups), STANDARDISE=standardise, ORDERED=ordered, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["heads", "groups", "places", "row"])
def top_kernel(
    raw, lengths, keys, out, heads, groups, slots, places, row,
    GROUPS: tl.constexpr, STANDARDISE: tl.constexpr, ORDERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One KV head of one row. GROUPS: query heads, padded."""
    segment = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + segment // heads)
    raw += segment * groups * slots
    keys += segment * row
    out += segment * places
    g, span = tl.arange(0, GROUPS)[:, None], tl.arange(0, BLOCK // GROUPS)
    mean = tl.zeros((GROUPS,), tl.float32)
    deviation = tl.full((GROUPS,), 1.0, tl.float32)
    if STANDARDISE:
        mean = _mean(raw, mean, g, groups, slots, length, span, 1)
        deviation = tl.maximum(tl.sqrt(_mean(raw, mean, g, groups, slots, length, span, 2)), 1e-6)
    for at in range(0, tl.cdiv(length, BLOCK) * BLOCK, BLOCK // GROUPS):
        x = _scores(raw, g, groups, slots, at + span)
        if STANDARDISE:
            x = (x - mean[:, None]) / deviation[:, None]
        best = tl.max(tl.where((g < groups) & (x == x), x, float("-inf")), 0)
        bits = tl.where(best == 0, 0.0, best).to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        tl.store(keys + at + span, tl.where(at + span < length, key, LOWEST))
    tl.debug_barrier()  # keys are read by other threads than those that wrote them

    count = tl.minimum(places, length)
    last = tl.where(_count(keys, length, 0, BLOCK) >= count, 0, LOWEST)
    for bit in range(31):
        higher = last + (1 << (30 - bit))
        last = tl.where(_count(keys, length, higher, BLOCK) >= count, higher, last)
    free = count - _count(keys, length, last + 1, BLOCK)  # places for keys that are equal to the last one

    greater, equal = 0, 0  # keys before the block
    if ORDERED:
        for at in range(0, length, BLOCK):
            token = at + tl.arange(0, BLOCK)
            stays, before, greater, equal = _stays(keys, token, length, last, free, greater, equal)
            tl.store(out + before, token, mask=stays)
    else:
        left = keys + tl.cdiv(slots, BLOCK) * BLOCK  # the places of tokens that leave
        for at in range(0, count, BLOCK):
            token = at + tl.arange(0, BLOCK)
            stays, before, greater, equal = _stays(keys, token, count, last, free, greater, equal)
            tl.store(out + token, token, mask=stays)
            tl.store(left + token - before, token, mask=(token < count) & ~stays)
        tl.debug_barrier()
        first = greater + tl.minimum(equal, free)  # of those that move
        for at in range(count, length, BLOCK):
            token = at + tl.arange(0, BLOCK)
            stays, before, greater, equal = _stays(keys, token, length, last, free, greater, equal)
            tl.store(out + tl.load(left + before - first, mask=stays, other=0), token, mask=stays)


@triton.jit
def _stays(keys, token, stop, last, free, greater, equal):
    """Of a block of tokens before `stop`: which stay, how many do before each of them, and both sums behind the block."""
    key = tl.load(keys + token, mask=token < stop, other=LOWEST)
    above, same = (key > last).to(tl.int32), (key == last).to(tl.int32)
    to_above, to_same = greater + tl.cumsum(above, 0), equal + tl.cumsum(same, 0)
    stays = (key > last) | ((key == last) & (to_same <= free))
    before = to_above + tl.minimum(to_same, free) - stays.to(tl.int32)
    return stays, before, greater + tl.sum(above, 0), equal + tl.sum(same, 0)


@triton.jit
def _scores(raw, g, groups, slots, token):
    """Scores of some tokens, `[GROUPS, tokens]`. The mask is of whole vectors as long as `slots` is, unlike one by the length."""
    return tl.load(raw + g * slots + token[None, :], mask=(g < groups) & (token < slots)[None, :], other=0.0)


@triton.jit
def _mean(raw, centre, g, groups, slots, length, span, POWER: tl.constexpr):
    """The mean over the tokens of the difference to the centre of each query head, to a power of 1 or 2."""
    total = tl.zeros((g.shape[0], span.shape[0]), tl.float32)
    for at in range(0, length, span.shape[0]):
        x = _scores(raw, g, groups, slots, at + span) - centre[:, None]
        x = tl.where((at + span < length)[None, :], x, 0.0)  # there may be NaN
        total += x if POWER == 1 else x * x
    return tl.sum(total, 1) / length


@triton.jit
def _count(keys, length, least, BLOCK: tl.constexpr):
    """How many keys are at least `least`. The last block is full: what is no token is the lowest."""
    found = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, length, BLOCK):
        found += (tl.load(keys + at + tl.arange(0, BLOCK)) >= least).to(tl.int32)
    return tl.sum(found, 0)
