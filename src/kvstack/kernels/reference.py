"""Attention over the codes of one tier, in torch: the reference of every kernel.

A tier gives a `Partial`: the attention output over its tokens alone, and the logarithm of the sum of its exponentiated logits. Partials
of several tiers merge into what one softmax over all their tokens gives. Nothing is decoded to the head's space: the query is moved
into the codec's latent space, and the mean of latents is moved back once per query.

    q [B, Hq, T, D]    Hq = G * H query heads share H KV heads in groups of G    out [B, Hq, T, D] float32    lse [B, Hq, T] float32

Everything is computed in float32. Which tokens a query sees is the caller's mask; what lies behind the mask may be anything, NaN too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvstack.codecs.base import Codec, Codes

QUERIES = 512  # that callers attend with at once, so that logits stay small


@dataclass(frozen=True)
class Partial:
    """out: `[B, Hq, T, D]` float32, zero where nothing is seen. lse: `[B, Hq, T]` float32, -inf where nothing is seen."""

    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Side:
    """Codes of K or V of one tier, with the codec that reads them."""

    codec: Codec
    codes: Codes


@dataclass(frozen=True)
class Places:
    """Ranks of queries `[B or 1, T]` and of tokens `[B or 1, N]`: what is between them is what position means."""

    query: Tensor
    token: Tensor


class RecordLogits(Protocol):
    """How queries meet records that are not keys as they are (LRKV, MLA): before scale and cap, `[B, Hq, T, N]` float32."""

    def __call__(self, q: Tensor, key: Tensor, value: Tensor, places: Places) -> Tensor:
        """q: `[B, Hq, T, any]` float32. key, value: decoded records `[B, H, N, any]` float32."""


@dataclass(frozen=True)
class Shape:
    """scale: factor on the logits. softcap: logits become softcap * tanh(logits / softcap). logits: None for q . k."""

    scale: float
    softcap: float | None = None
    logits: RecordLogits | None = None


def attend(q: Tensor, key: Side, value: Side, mask: Tensor | None, shape: Shape, places: Places | None = None) -> Partial:
    """Attention of `q [B, Hq, T, D]` over one tier of N tokens.

    mask: `[B, T, N]` bool (B and T may be 1), true where the query sees the token; None: it sees all. places: for a shape with
    logits of its own.
    """
    b, hq, t, _ = q.shape
    v = value.codec.latent(value.codes)  # [B, H, N, Dl]
    h, n = v.shape[1], v.shape[2]
    if mask is not None:
        v = v.masked_fill(~mask.any(-2)[:, None, :, None], 0)
    logits = _logits(q, key, mask, shape) if shape.logits is None else _record_logits(q, key, value, mask, shape, places)
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = (logits - top).exp_()
    total = weights.sum(-1)  # [B, Hq, T]
    mean = (weights.reshape(b, h, -1, n) @ v) / total.reshape(b, h, -1, 1).clamp_min(1e-30)
    out = value.codec.unproject(mean).reshape(b, hq, t, -1)
    return Partial(out.masked_fill(total[..., None] == 0, 0), top[..., 0] + total.log())


def _logits(q: Tensor, key: Side, mask: Tensor | None, shape: Shape) -> Tensor:
    """Logits `[B, Hq, T, N]` of `attend`; -inf where the mask hides a token."""
    b, hq, t, d = q.shape
    k = key.codec.latent(key.codes)  # [B, H, N, Dl]
    h, n = k.shape[1], k.shape[2]
    grouped = q.float().reshape(b, h, -1, d)  # [B, H, G * T, D]
    if mask is not None:
        k = k.masked_fill(~mask.any(-2)[:, None, :, None], 0)
    logits = key.codec.project(grouped) @ k.transpose(-1, -2)
    if key.codec.centre is not None:
        logits = logits + (grouped * key.codec.centre[:, None]).sum(-1, keepdim=True)
    return _shaped(logits.reshape(b, hq, t, n), mask, shape)


def _record_logits(q: Tensor, key: Side, value: Side, mask: Tensor | None, shape: Shape, places: Places | None) -> Tensor:
    """`_logits` where the shape has its own."""
    assert shape.logits is not None and places is not None
    k, v = (side.codec.decode(side.codes) for side in (key, value))
    if mask is not None:
        hidden = ~mask.any(-2)[:, None, :, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    return _shaped(shape.logits(q.float(), k, v, places), mask, shape)


def _shaped(logits: Tensor, mask: Tensor | None, shape: Shape) -> Tensor:
    """Logits `[B, Hq, T, N]` scaled, capped and masked."""
    logits = logits * shape.scale
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    return logits if mask is None else logits.masked_fill(~mask[:, None], -math.inf)


def attention_weights(q: Tensor, tiers: Sequence[tuple[Side, Tensor]], shape: Shape, sink: Tensor | None = None) -> Tensor:
    """The weights `[B, Hq, T, N1 + N2 + ...]` of one softmax over the keys of all tiers, each with its mask `[B, T, N]`.

    Zero where a query does not see a token. sink: see `merge`.
    """
    logits = torch.cat([_logits(q, key, mask, shape) for key, mask in tiers], -1)
    total = logits.logsumexp(-1, keepdim=True)
    if sink is not None:
        total = torch.logaddexp(total, sink.float()[None, :, None, None])
    return (logits - total.clamp_min(torch.finfo(torch.float32).min)).exp()


def attend_first(q: Tensor, key: Side, value: Side, shape: Shape) -> Tensor:
    """Causal attention of the first chunk over itself, `[B, Hq, T, D]` in the type of `q [B, Hq, T, D]`, without logits in memory.

    The same as `attend` with a causal mask, for codes that stand for the vectors themselves (no transform, no centre).
    """
    assert key.codec.transform is None and value.codec.transform is None and shape.softcap is None
    k, v = key.codec.latent(key.codes).to(q.dtype), value.codec.latent(value.codes).to(q.dtype)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=shape.scale)


def merge(partials: Sequence[Partial], sink: Tensor | None = None) -> Partial:
    """What one softmax over the tokens of all partials gives.

    sink: one extra logit per query head `[Hq]` that takes weight and gives nothing (the learned sinks of gpt-oss).
    """
    lse = torch.stack([p.lse for p in partials])
    total = lse.logsumexp(0)
    if sink is not None:
        total = torch.logaddexp(total, sink.float()[None, :, None])
    # Where nothing is seen at all both are -inf, and the weights are zero rather than NaN.
    weights = (lse - total.clamp_min(torch.finfo(torch.float32).min)).exp()
    out = sum((w[..., None] * p.out for w, p in zip(weights, partials, strict=True)), torch.zeros_like(partials[0].out))
    return Partial(out, total)
