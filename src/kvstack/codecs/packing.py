"""Small integers packed into bytes without waste: codes of `b` bits (1..8), `[..., D]`, become uint8 `[..., D * b / 8]`.

Layout: `b` is written as a sum of the widths 8, 4, 2 and 1, each at most once, wide ones first. Each width is a *plane* that holds that
many bits of every code, the low bits in the first plane, and the planes stand one after the other: 3 bits are a plane of 2 bits and a
plane of 1, 5 bits are 4 and 1. A plane of width `w` has `n = D * w / 8` bytes and is cut along D, not interleaved: its byte `j` holds
the codes `j, j + n, j + 2n, ...`, the first of them in the low bits. So at 4 bits the low nibbles are the first half of the vector and
the high nibbles the second half, and unpacking is a shift, a mask and a concatenation.
"""

from functools import reduce

import torch
from torch import Tensor

from kvstack.errors import RecipeError


def packed_size(head_dim: int, bits: int) -> int:
    """Bytes of `head_dim` codes of `bits` bits. Raises RecipeError unless `head_dim` is a multiple of 8."""
    if head_dim % 8:
        raise RecipeError(f"A head size of {head_dim} is no multiple of 8 and cannot be packed into bytes. Use bf16 or fp8.")
    return head_dim * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integers `[..., D]` below `2 ** bits` (D a multiple of 8) into uint8 `[..., D * bits / 8]`."""
    planes = []
    for width, shift in _planes(bits):
        slices = ((codes >> shift) & (2**width - 1)).to(torch.uint8).chunk(8 // width, -1)
        planes.append(reduce(torch.bitwise_or, (part << (i * width) for i, part in enumerate(slices))))
    return torch.cat(planes, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes `[..., D]`, uint8, of the bytes `[..., D * bits / 8]` that `pack` made."""
    planes = packed.split([packed.shape[-1] * width // bits for width, _ in _planes(bits)], -1)
    parts = []
    for plane, (width, shift) in zip(planes, _planes(bits), strict=True):
        slices = [(plane >> (i * width)) & (2**width - 1) for i in range(8 // width)]
        parts.append(torch.cat(slices, -1) << shift)
    return reduce(torch.bitwise_or, parts)


def _planes(bits: int) -> list[tuple[int, int]]:
    """Width of each plane, and the position in the code of its lowest bit."""
    widths = [w for w in (8, 4, 2, 1) if bits & w]
    return [(w, sum(widths[:i])) for i, w in enumerate(widths)]
