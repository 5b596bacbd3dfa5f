"""How far decoding from what is cached is from the forward of all tokens at once, which expands keys and values of every head.

In exact arithmetic both are one function. In bfloat16 they round at other places, so the difference is to be read beside that of the
forward in bfloat16 from itself in float32: where both are alike, decoding loses nothing that bfloat16 had not lost.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in all of float32, without TF32."""
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(was)


def relative(a: Tensor, b: Tensor) -> float:
    """RMS of the difference over that of `b`."""
    return float((a.double() - b).norm() / b.double().norm())


@torch.no_grad()
@full_precision()
def decoding_differences(model: Any, ids: Tensor, steps: int) -> dict[str, float | None]:
    """Of the logits after the last `steps` of `ids [B, T]`, decoded one by one, against the forward:

    float32, bfloat16       relative RMS difference, in that arithmetic (no TF32)
    bfloat16_stored         the same in float32, of what is cached rounded to bfloat16; None for CSA and HCA, which cache no tokens
    bfloat16_forward        the same of the forward in bfloat16 against the one in float32
    bfloat16_loss           what decoding adds to the mean loss of the text, in bfloat16, nats a token
    """
    stored, model = None, deepcopy(model).float().eval()
    exact, decoded = _forward(model, ids, steps), _decoded(model, ids, steps, None)
    if model.config.attention not in ("csa", "hca"):
        stored = relative(_decoded(model, ids, steps, _Rounded(config=model.config)), exact)
    for p in model.parameters():  # not RoPE's frequencies, which transformers keeps in float32
        p.data = p.data.bfloat16()
    rounded, after = _forward(model, ids, steps), _decoded(model, ids, steps, None)
    loss = [F.cross_entropy(x[:, :-1].flatten(0, 1).float(), ids[:, 1 - steps :].flatten()).item() for x in (rounded, after)]
    return {
        "float32": relative(decoded, exact), "bfloat16": relative(after, rounded), "bfloat16_stored": stored,
        "bfloat16_forward": relative(rounded, exact), "bfloat16_loss": loss[1] - loss[0],
    }  # fmt: skip


class _Rounded(DynamicCache):  # type: ignore[misc]
    """Keeps what it is given as bfloat16 would, in float32."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(*(x.bfloat16().float() for x in (key_states, value_states)), *args, **kwargs)  # type: ignore[no-any-return]


def _forward(model: Any, ids: Tensor, steps: int) -> Tensor:
    """Logits `[B, steps, V]` after the last tokens, of all at once."""
    return model(ids, use_cache=False).logits[:, -steps:]  # type: ignore[no-any-return]


def _decoded(model: Any, ids: Tensor, steps: int, cache: DynamicCache | None) -> Tensor:
    """The same, one by one; the model makes its own cache when none is given."""
    cache, rows = model(ids[:, :-steps], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values, list[Tensor]()
    for token in ids[:, -steps:].split(1, 1):
        rows.append(model(token, past_key_values=cache).logits)
    return torch.cat(rows, 1)
