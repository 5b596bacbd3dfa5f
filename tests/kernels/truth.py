"""What kernels over pages shall give, in float64: attention of queries in the latent space over what `pages.read` gives."""

import math
from typing import Any

import torch
from torch import Tensor

from kvstack.kernels.pages import read


def truth(c: Any, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Means `[B * H, R, D]` and base-2 log sums `[B * H, R]` for `c.q, c.bias, c.pages, c.k_levels, c.v_levels`."""
    *codes, scales = read(c.pages)
    sides = []
    for i, (x, bits, levels) in enumerate(zip(codes, (c.pages.format.k, c.pages.format.v), (c.k_levels, c.v_levels), strict=True)):
        numbers = x.view(torch.float8_e4m3fn).float() if bits == 8 else levels[x.long()]
        sides.append(numbers.double() * scales[..., i : i + 1].double())
    behind = torch.arange(scales.shape[2], device=c.q.device) >= c.pages.lengths[:, None, None]  # [B, 1, N]
    k, v = (x.masked_fill(behind[..., None], 0).flatten(0, 1) for x in sides)
    x = c.q.double() @ k.mT + c.bias[..., None].double()
    if softcap is not None:
        cap = softcap * math.log2(math.e)
        x = cap * torch.tanh(x / cap)
    x = (x * math.log(2)).unflatten(0, (len(behind), -1)).masked_fill(behind[:, :, None], -math.inf).flatten(0, 1)
    return torch.softmax(x, -1).nan_to_num(0) @ v, x.logsumexp(-1) / math.log(2)


def error(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())
