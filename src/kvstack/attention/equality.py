"""How far decoding from what is cached is from the forward of all tokens at once, which expands keys and values of every head.

In exact arithmetic both are one function. In bfloat16 they round at other places, so the difference is to be read beside that of the
forward in bfloat16 from itself in float32: where both are alike, decoding loses nothing that bfloat16 had not lost.
"""

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def relative(a: Tensor, b: Tensor) -> float:
    """RMS of the difference over that of `b`."""
    return float((a.double() - b).norm() / b.double().norm())


@torch.no_grad()
def decoding_differences(model: Any, ids: Tensor, steps: int) -> dict[str, float]:
    """Of the logits after the last `steps` of `ids [B, T]`, decoded one by one, against the forward:

    float32, bfloat16       relative RMS difference, in that arithmetic (no TF32)
    bfloat16_forward        the same of the forward in bfloat16 against the one in float32
    bfloat16_loss           what decoding adds to the mean loss of the text, in bfloat16, nats a token
    """
    out, precision = dict[str, float](), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        whole = [_logits(model, ids, steps, dtype) for dtype in (torch.float32, torch.bfloat16)]
    finally:
        torch.set_float32_matmul_precision(precision)
    for name, (forward, decoded) in zip(("float32", "bfloat16"), whole, strict=True):
        out[name] = relative(decoded, forward)
    out["bfloat16_forward"] = relative(whole[1][0], whole[0][0])
    before, after = (F.cross_entropy(x[:, :-1].flatten(0, 1).float(), ids[:, 1 - steps :].flatten()).item() for x in whole[1])
    return out | {"bfloat16_loss": after - before}


def _logits(model: Any, ids: Tensor, steps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits `[B, steps, V]` of the last tokens: of one forward, and decoded."""
    model = deepcopy(model).eval()
    for p in model.parameters():  # not RoPE's frequencies, which transformers keeps in float32
        p.data = p.data.to(dtype)
    forward = model(ids, use_cache=False).logits[:, -steps:]
    cache, rows = model(ids[:, :-steps], use_cache=True, logits_to_keep=1).past_key_values, list[Tensor]()
    for token in ids[:, -steps:].split(1, 1):
        rows.append(model(token, past_key_values=cache).logits)
    return forward, torch.cat(rows, 1)
