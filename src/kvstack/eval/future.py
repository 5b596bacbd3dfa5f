"""The future of a batch, for the oracle: its queries under a full cache and what their softmax divides by.

One forward of the whole batch without a cache, in which an attention function of this module takes the queries as attention uses them
(after RoPE) and finds the log of their sums of exponentiated logits in blocks of queries. Attention itself is `hf.attention`'s, so that
soft-capped logits and learned sinks count as they do in a cache. Rows are padded on the right, where causality needs no mask.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kvstack.hf import models
from kvstack.hf.attention import attention
from kvstack.scorers.base import Future, by_group

NAME = "kvstack-future"
BLOCK = 128  # queries whose logits are held at once


@torch.inference_mode()
def futures(model: Any, tokens: Tensor, lengths: Sequence[int]) -> dict[int, Future]:
    """The `Future` of every full-attention layer of `model`, by its index, for `tokens [B, T]` whose rows have `lengths`.

    Raises UnsupportedModelError for a model that does not call registered attention functions.
    """
    ended = torch.arange(tokens.shape[1], device=model.device) >= torch.tensor(lengths, device=model.device)[:, None]  # [B, T]
    found: dict[int, Future] = {}

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        if kwargs.get("sliding_window") is None:
            lse = log_sums(query, key, kwargs)
            found[module.layer_idx] = Future(query, lse.masked_fill(ended[:, None], torch.inf))
        return attention(module, query, key, value, attention_mask, **kwargs)

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, watched)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        models.use(model, NAME)
        model(input_ids=tokens.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
        AttentionInterface.register(NAME, attention)  # or transformers would hold the batch for ever
    return found


def log_sums(query: Tensor, key: Tensor, options: Mapping[str, Any]) -> Tensor:
    """`[B, Hq, T]` float32: log sum exp of the causal logits of `query [B, Hq, T, D]` over `key [B, H, T, D]`.

    options: `scaling`, `softcap` and `s_aux` as attention functions take them.
    """
    q, k = by_group(query.float(), key.shape[1]), key.float()
    scale, softcap, sinks = options.get("scaling"), options.get("softcap"), options.get("s_aux")
    out = []
    for start in range(0, q.shape[3], BLOCK):
        block = q[:, :, :, start : start + BLOCK]
        end = start + block.shape[3]
        logits = torch.einsum("bhgtd,bhnd->bhgtn", block, k[:, :, :end]) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        later = torch.ones(block.shape[3], end, dtype=torch.bool, device=q.device).triu(start + 1)
        out.append(logits.masked_fill(later, -torch.inf).logsumexp(-1).flatten(1, 2))
    lse = torch.cat(out, -1)
    return lse if sinks is None else torch.logaddexp(lse, sinks.float()[:, None])
