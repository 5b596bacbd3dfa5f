"""CSA and HCA, the two attentions of DeepSeek-V4 (arXiv 2606.19348, section 2.3), at the scale of a laboratory.

A query reads, under one softmax with a learnt sink, the records of the newest n_win tokens and *entries*, each pooled from the tokens
of one window. There is one KV head, and keys are values: a record or an entry `[D]` is both.

    HCA   `entries` 0: an entry is a gated mean of m tokens, and a query reads those of all closed windows           (equations 20-26)
    CSA   `entries` > 0: windows overlap, width 2 m and stride m, and a query reads the `entries` ones that a small
          attention of its own, the lightning indexer, scores highest                                               (equations 9-17)

Entry i pools the window that starts at token i m, turns with that position, and shows to queries t >= (i + 1) m - 1. Only the last
`rope_dim` coordinates of a head turn, by halves and with the model's first `rope_dim / 2` frequencies. As values have turned too, the
output of a query is turned back by its position; a scaling of cos and sin, as YaRN has it, is therefore not supported.

The choice of the indexer has no gradient. DeepSeek trains its indexers by a loss of their own, the divergence from the attention; here
`logsigmoid(score)` is added to an entry's logits, which multiplies its weight, before the softmax divides, by `sigmoid(score)`. So the
loss of the model trains the indexer: an entry that was wanted is scored higher next time, and the training loop needs no second loss.

What it is not: fast. The masks are dense, `[T, N]`. There are no latents of queries and no groups in the output projection.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvstack.attention.pooled_cache import Pool, PooledLayer
from kvstack.errors import BadInputError, UnsupportedModelError


class Compressor(nn.Module):
    """Pools windows of `pool` tokens into entries of size `dim`; the weights of a window are a softmax a channel.

    With `overlap` there are two streams, and an entry has stream a of its own window and stream b of the window before
    (equations 9-12); without, there is one (equations 20-23). Gates have a bias for each place in the window.
    """

    def __init__(self, hidden_size: int, dim: int, pool: int, overlap: bool, eps: float) -> None:
        super().__init__()
        self.pool, self.overlap, width = pool, overlap, dim * (1 + overlap)
        self.kv_proj = nn.Linear(hidden_size, width, bias=False)
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(pool, width))
        self.norm = LlamaRMSNorm(dim, eps)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, pool: Pool | None) -> Pool:
        """The pool after the next tokens.

        hidden_states: `[B, T, d]`. cos, sin: `[B, T, h]` at these tokens. pool: as the last call returned it, None at the first token.
        """
        pool = pool or self._empty(hidden_states, cos)
        at = (pool.rows.shape[1] + torch.arange(hidden_states.shape[1], device=hidden_states.device)) % self.pool
        fresh = torch.stack([self.kv_proj(hidden_states), self.gate_proj(hidden_states) + self.bias[at]], 2)
        rows = torch.cat([pool.rows, fresh], 1)
        start = torch.cat([pool.start, torch.cat([cos, sin], -1)[:, -pool.rows.shape[1] % self.pool :: self.pool]], 1)

        closed = rows.shape[1] // self.pool
        windows, rest = rows.tensor_split([closed * self.pool], 1)
        windows, before = windows.unflatten(1, (closed, self.pool)), pool.before  # [B, E, m, 2, S c]
        if self.overlap:
            own, other = windows.chunk(2, -1)
            before = torch.cat([before, other], 1)
            windows = torch.cat([own, before[:, :-1]], 2)  # [B, E, 2 m, 2, c]
        kv, gate = windows.unbind(3)
        pooled = self.norm((gate.softmax(2, dtype=torch.float32) * kv).sum(2).to(kv.dtype))
        entries = turn(pooled, *start[:, :closed].chunk(2, -1))
        # Copies of what stays, since views would keep the whole prompt alive.
        return Pool(torch.cat([pool.entries, entries], 1), rest.clone(), before[:, -1:].clone(), start[:, closed:].clone())

    def _empty(self, x: Tensor, cos: Tensor) -> Pool:
        batch, dim = x.shape[0], self.norm.weight.shape[0]
        before = x.new_zeros(batch, int(self.overlap), self.pool, 2, dim)
        before[..., 1, :] = -torch.inf  # there is no window before the first
        rows = x.new_empty(batch, 0, 2, self.bias.shape[1])
        return Pool(x.new_empty(batch, 0, dim), rows, before, cos.new_empty(batch, 0, 2 * cos.shape[-1]))


class LightningIndexer(nn.Module):
    """Scores entries for queries by a small attention with entries of its own (equations 13-16)."""

    def __init__(self, hidden_size: int, heads: int, dim: int, pool: int, eps: float) -> None:
        super().__init__()
        self.compressor = Compressor(hidden_size, dim, pool, True, eps)
        self.q_proj = nn.Linear(hidden_size, heads * dim, bias=False)
        self.weights_proj = nn.Linear(hidden_size, heads, bias=False)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, entries: Tensor) -> Tensor:
        """Scores `[B, T, E]` float32, `sum_h w_h ReLU(q_h . entry) / sqrt(heads dim)`.

        hidden_states: `[B, T, d]`. cos, sin: `[B, T, h]` at these tokens. entries: `[B, E, dim]` of its compressor.
        """
        heads, dim = self.weights_proj.out_features, entries.shape[-1]
        queries = turn(self.q_proj(hidden_states).unflatten(-1, (heads, dim)), cos[:, :, None], sin[:, :, None])
        matches = torch.einsum("bthd,bed->bthe", queries.float(), entries.float()).relu()
        weights: Tensor = self.weights_proj(hidden_states).float() * (heads * dim) ** -0.5
        return torch.einsum("bth,bthe->bte", weights, matches)


class PooledAttention(nn.Module):
    """CSA or HCA in the place of `LlamaAttention`. Its cache is a `PooledCache`.

    config: a LlamaConfig with, besides, `pool` (m tokens an entry; DeepSeek: 4 for CSA, 128 for HCA), `entries` (how many a query
    reads; 0: all, and HCA), `window` (n_win newest tokens, the query's own among them), `rope_dim` (coordinates that turn, an even
    number), and for CSA `index_heads` and `index_dim` of the indexer. Projections start as the model initialises a Linear, gate biases
    and sinks at zero. Raises BadInputError when `rope_dim` does not fit.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        d, eps, sparse = config.hidden_size, config.rms_norm_eps, config.entries > 0
        least = min(config.head_dim, config.index_dim) if sparse else config.head_dim
        if config.rope_dim % 2 or config.rope_dim > least:
            raise BadInputError(f"rope_dim is {config.rope_dim}. Choose an even number up to {least}, the size of the smallest head.")
        self.config, self.layer_idx = config, layer_idx
        self.q_proj = nn.Linear(d, config.num_attention_heads * config.head_dim, bias=False)
        self.kv_proj = nn.Linear(d, config.head_dim, bias=False)
        self.kv_norm = LlamaRMSNorm(config.head_dim, eps)
        self.compressor = Compressor(d, config.head_dim, config.pool, sparse, eps)
        self.indexer = LightningIndexer(d, config.index_heads, config.index_dim, config.pool, eps) if sparse else None
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, d, bias=False)
        self.updates = {"q_proj": (config.num_attention_heads, 1.0)}  # see `lab.optim`; the others have one head

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Output `[B, T, d]` for the next T tokens `hidden_states [B, T, d]`, and None for the weights.

        position_embeddings: cos and sin, `[B or 1, T, head_dim]`, halves alike. attention_mask: of transformers, `[B, N]` or
        `[B, 1, T, N]`; causality is known here, so it is only looked at for padding. past_key_values: a cache whose layer `layer_idx`
        is a `PooledLayer`, which is updated. Raises UnsupportedModelError for rows that are padded on the left or packed,
        BadInputError for another kind of cache.
        """
        _check_mask(attention_mask)
        cfg, layer = self.config, self._layer(past_key_values)
        batch, past = hidden_states.shape[0], layer.get_seq_length()
        cos, sin = (x[..., : cfg.rope_dim // 2].expand(batch, -1, -1) for x in position_embeddings)

        queries = self.q_proj(hidden_states).unflatten(-1, (cfg.num_attention_heads, cfg.head_dim))
        queries = turn(F.rms_norm(queries, (cfg.head_dim,), eps=cfg.rms_norm_eps), cos[:, :, None], sin[:, :, None])
        fresh = turn(self.kv_norm(self.kv_proj(hidden_states)), cos, sin)
        records, _ = layer.update(fresh, fresh)
        layer.main = self.compressor(hidden_states, cos, sin, layer.main)

        both = torch.cat([records, layer.main.entries], 1)
        logits = torch.einsum("bthd,bnd->bhtn", queries, both).float() * cfg.head_dim**-0.5

        now, device = layer.get_seq_length(), hidden_states.device
        t, s = torch.arange(past, now, device=device)[:, None], torch.arange(now - records.shape[1], now, device=device)
        near = (s <= t) & (s > t - cfg.window)  # [T, S]
        closed = torch.arange(layer.main.entries.shape[1], device=device) < (t + 1) // cfg.pool  # [T, E]
        read = closed.expand(batch, -1, -1)
        if self.indexer is not None:
            layer.index = self.indexer.compressor(hidden_states, cos, sin, layer.index)
            scores = self.indexer(hidden_states, cos, sin, layer.index.entries)
            read = top(scores, closed, cfg.entries)
            logits = logits + F.pad(F.logsigmoid(scores), (len(s), 0))[:, None]
        visible = torch.cat([near.expand(batch, -1, -1), read], -1)
        logits = logits.masked_fill(~visible[:, None], -torch.inf)
        sinks = self.sinks.float()[:, None, None].expand(*logits.shape[:-1], 1)
        weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1].to(both.dtype)
        output = turn(torch.einsum("bhtn,bnd->bthd", weights, both), cos[:, :, None], -sin[:, :, None])
        return self.o_proj(output.flatten(2)), None

    def _layer(self, cache: Any) -> PooledLayer:
        """Its layer in the cache; without a cache, one that is thrown away after the forward."""
        if cache is None:
            return PooledLayer(self.config.window)
        layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        if not isinstance(layer, PooledLayer):
            raise BadInputError(
                f"PooledAttention cannot keep its state in a {type(cache).__name__}. "
                "Pass past_key_values=PooledCache(model.config), or use_cache=False."
            )
        return layer


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the last 2 h coordinates of `x [..., D]`, pairs by halves; cos, sin `[..., h]`. With -sin it turns back."""
    h = cos.shape[-1]
    still, a, b = x.split([x.shape[-1] - 2 * h, h, h], -1)
    return torch.cat([still, a * cos - b * sin, b * cos + a * sin], -1)


def top(scores: Tensor, closed: Tensor, k: int) -> Tensor:
    """Which entries are read, `[B, T, E]` bool: of those that `closed [T, E]` allows, the `k` with the highest `scores [B, T, E]`.

    Scores are often exactly 0, so ties must not depend on how many entries there are: the oldest wins.
    """
    ranked = scores.masked_fill(~closed, -torch.inf).argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ranked, True) & closed


def _check_mask(mask: Tensor | None) -> None:
    """Raise UnsupportedModelError where a row has a masked token before a visible one: windows are counted from the first token."""
    if mask is None:
        return
    last = mask if mask.ndim == 2 else mask[:, 0, -1]  # what the last query may see shows the padding
    visible = last == 0 if last.is_floating_point() else last.bool()
    if (visible[:, 1:] & ~visible[:, :-1]).any():
        raise UnsupportedModelError(
            "PooledAttention counts windows from a row's first token, so it takes no rows that are padded on the left or packed. "
            "Pad on the right, or use rows of one length."
        )
