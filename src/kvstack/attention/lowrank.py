"""LRKV (O'Neill et al., arXiv:2601.11471): one shared head of keys and values, and a low-rank residual per head.

    K_h = X (W_s + U_h B_h^T)        V_h likewise        W_s [d, D]   U_h [d, r]   B_h [D, r]

Cached per token: one record of keys and one of values, `[B, 1, N, D + H r]`: the shared part, then the residual latents `X U_h` of all
heads. Rank 0 is MQA; rank D spans MHA (as a control: "factorised MHA"). How position enters the residual:

    exact   logits  Rot q . Rot (k_s + B_h r_h)       the shared part is cached after RoPE, latents before; keys are rebuilt to be read
    nope    logits  Rot q . Rot k_s  +  q . B_h r_h   the residual has no position; reading is MQA over records, `[Rot q | B_h^T q]`

The paper's third way, turning the latents themselves, is no function of relative position and is not here (a test shows it).

Long chunks without a past, training first, make K_h and V_h by one product with `[I; blockdiag(B)]`; anything else reads latents.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb, eager_attention_forward

from kvstack.attention import absorbed
from kvstack.attention.config import DecoderConfig
from kvstack.errors import UnsupportedModelError
from kvstack.kernels.lowrank import has_kernel, lowrank_decode
from kvstack.kernels.lowrank_reference import Rebuild
from kvstack.kernels.reference import Places


class LowRankAttention(nn.Module):
    """See the module. Parameters: q_proj, o_proj; k_shared, v_shared `[D, d]`; k_down, v_down `[H r, d]`; k_up, v_up `[H D, r]`."""

    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        d, self.heads, self.head_dim, self.rank = config.hidden_size, config.num_attention_heads, config.head_dim, config.rank
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(d, self.heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, d, bias=False)
        self.k_shared, self.v_shared = (nn.Linear(d, self.head_dim, bias=False) for _ in range(2))
        self.k_down, self.v_down = (nn.Linear(d, self.heads * self.rank, bias=False) for _ in range(2))
        # Linear maps as far as initialisation and optimisers go: the heads' B_h, one under the other.
        self.k_up, self.v_up = (nn.Linear(self.rank, self.heads * self.head_dim, bias=False) for _ in range(2))
        for up in (self.k_up, self.v_up):
            # `|U_h B_h^T|` a tenth of `|W_s|`, and latents as large as their input (the paper's section 3.4).
            up.init_std = 0.1 / math.sqrt(max(1, self.rank))  # type: ignore[assignment]
        # The residual has no norm, so that keys stay linear in what is cached.
        norms = (LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2))
        self.q_norm, self.k_norm = norms  # of queries, and of the shared part of keys before RoPE
        # See `lab.optim`. Keys whose shared part alone is turned or normalised are no sum of matrices: that moves as far as a head of
        # MHA's would, and the factors of the rest half as far each. (As a whole, of any size, the rest learnt worse.)
        self.updates = {"q_proj": (self.heads, 1.0)} | dict.fromkeys(("k_shared", "v_shared"), (1, math.sqrt(self.heads)))
        kinds: tuple[str, ...] = ("k", "v")
        if config.variant == "nope" or config.qk_norm:
            self.updates |= dict.fromkeys(("k_down", "k_up"), (self.heads, 0.5))
            kinds = ("v",)
        self.sums = tuple((f"{x}_shared", f"{x}_up", f"{x}_down") for x in kinds) if self.rank else ()
        self.rotary = LlamaRotaryEmbedding(config)  # a decoder puts its own here

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of `hidden_states [B, T, d]`; see transformers' LlamaAttention."""
        b, t, _ = hidden_states.shape
        query = self.q_norm(self.q_proj(hidden_states).view(b, t, self.heads, self.head_dim)).transpose(1, 2)
        weights = self.k_shared.weight, self.k_down.weight, self.v_shared.weight, self.v_down.weight
        width = self.head_dim + self.heads * self.rank
        key, value = F.linear(hidden_states, torch.cat(weights)).split(width, -1)  # records [B, T, W], before RoPE
        if self.config.qk_norm:
            key = torch.cat((self.k_norm(key[..., : self.head_dim]), key[..., self.head_dim :]), -1)
        turned, shared = apply_rotary_pos_emb(query, key[:, None, :, : self.head_dim], *position_embeddings)
        if past_key_values is not None:
            record = torch.cat((shared[:, 0], key[..., self.head_dim :]), -1)[:, None]
            keys, values = past_key_values.update(record, value[:, None], self.layer_idx)
            if not isinstance(keys, Tensor):
                return self._stored(query, turned, keys, values, attention_mask, **kwargs), None
            if keys.shape[2] > t:
                return self._read(query, turned, keys, values, attention_mask), None
        if self.config.variant == "exact":
            k, v = (self._expanded(x, up) for x, up in ((key, self.k_up), (value, self.v_up)))
            k, _ = apply_rotary_pos_emb(k, k[:, :0], *position_embeddings)
            out, _ = self._attend(self, turned, k, v, attention_mask, scaling=self.scaling, **kwargs)
            return self.o_proj(out.reshape(b, t, -1)), None
        q = torch.cat((turned, self._into_latents(query)), -1)
        k = torch.cat((shared.expand(-1, self.heads, -1, -1), self._residual(key)), -1)
        v = torch.cat((value[:, None, :, : self.head_dim].expand(-1, self.heads, -1, -1), self._residual(value)), -1)
        q, k, v = (F.pad(x, (0, -x.shape[-1] % 8)) for x in (q, k, v))  # fast attention wants multiples of eight
        out, _ = self._attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self._out(*out.split((self.head_dim, self.rank, out.shape[-1] - self.head_dim - self.rank), -1)[:2]), None

    @property
    def _attend(self) -> Callable[..., Any]:
        """The attention function that the model is set to; looked up here, where tools that watch a model expect it."""
        found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return found

    def _heads(self, up: nn.Linear) -> Tensor:
        return up.weight.view(self.heads, self.head_dim, self.rank)

    def _expanded(self, record: Tensor, up: nn.Linear) -> Tensor:
        """Keys or values `[B, H, T, D]` of records `[B, T, W]`: one product with `[I; blockdiag(B)]`, as wide as MHA's projection."""
        eye = torch.eye(self.heads, dtype=up.weight.dtype, device=up.weight.device)
        residual = (self._heads(up)[:, :, None] * eye[:, None, :, None]).reshape(self.heads * self.head_dim, -1)
        shared = torch.eye(self.head_dim, dtype=up.weight.dtype, device=up.weight.device).repeat(self.heads, 1)
        x = F.linear(record, torch.cat((shared, residual), 1))
        return _heads_first(x, self.heads)

    def _residual(self, record: Tensor) -> Tensor:
        """Latents `[B, H, T, r]` of records `[B, T, W]`."""
        return _heads_first(record[..., self.head_dim :], self.heads)

    def _into_latents(self, query: Tensor) -> Tensor:
        """`B_h^T q`, `[B, H, T, r]`."""
        return torch.einsum("bhtd,hdr->bhtr", query, self._heads(self.k_up))

    def _out(self, shared: Tensor, residual: Tensor) -> Tensor:
        """The layer's output of mean shared values `[B, T, H, D]` and mean latents `[B, T, H, r]`."""
        out = shared + torch.einsum("bthr,hdr->bthd", residual, self._heads(self.v_up))
        return self.o_proj(out.flatten(2))  # type: ignore[no-any-return]

    def record_logits(self, q: Tensor, key: Tensor, value: Tensor, places: Places) -> Tensor:
        """Logits `[B, H, T, N]` of records `key [B, 1, N, W]`, before scale; see `kernels.reference.RecordLogits`.

        q: the query after RoPE, and behind it for nope its latent part, `[B, H, T, D + r]`, for exact the query before RoPE,
        `[B, H, T, 2 D]`.
        """
        shared = q[..., : self.head_dim] @ key[..., : self.head_dim].transpose(-1, -2)
        if self.config.variant == "nope":
            return shared + q[..., self.head_dim :] @ self._residual(key[:, 0]).transpose(-1, -2)
        at, cos_sin = self.rotary(q, places.query), self.rotary(key, places.token)
        turned = absorbed.rotate(q[..., self.head_dim :], *(x[:, None] for x in at))
        up = self._heads(self.k_up).to(key.dtype)
        return shared + absorbed.residual_logits(turned, self._residual(key[:, 0]).transpose(1, 2), up, *cos_sin)

    def _read(self, query: Tensor, turned: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The layer's output over cached records `[B, 1, N, W]`, of which the last T are the queries' own."""
        slots = torch.arange(keys.shape[2], device=keys.device)[None]  # consecutive, padding aside, which nobody sees
        if query.shape[2] == 1 and mask is None and self.rank and has_kernel(turned, keys):
            lengths = torch.full((len(keys),), keys.shape[2], dtype=torch.int32, device=keys.device)
            latent = self._rebuild(slots, lengths) if self.config.variant == "exact" else self._into_latents(query)[:, :, 0]
            mean = lowrank_decode(turned, latent, keys[:, 0], values[:, 0], lengths, self.scaling)
            return self._out(*(x[:, None] for x in mean))
        q = torch.cat((turned, query if self.config.variant == "exact" else self._into_latents(query)), -1)
        logits = self.record_logits(q, keys, values, Places(slots[:, -q.shape[2] :], slots))
        weights = absorbed.softmax(logits.float() * self.scaling, mask).to(values.dtype)
        shared, residual = weights @ values[..., : self.head_dim], weights @ self._residual(values[:, 0])
        return self._out(shared.transpose(1, 2), residual.transpose(1, 2))

    def _rebuild(self, slots: Tensor, lengths: Tensor) -> Rebuild:
        """What the kernel rebuilds keys of `slots [1, N]` with, for rows of `lengths [B]`."""
        cos, sin = (x[0, :, : self.head_dim // 2].contiguous() for x in self.rotary(slots.float(), slots))
        return Rebuild(self._heads(self.k_up), cos, sin, torch.zeros_like(lengths))

    def _stored(self, query: Tensor, turned: Tensor, keys: Any, values: Any, mask: Tensor | None, **kwargs: Any) -> Tensor:
        """The layer's output by a cache that attends itself (kvstack's).

        nope is MQA over records, for every kernel and scorer: each head's query has zeros for the others' latents.
        """
        if self.config.variant == "exact":
            q, kwargs = torch.cat((turned, query), -1), kwargs | {"record_logits": self.record_logits}
        else:
            q = torch.cat((turned, self._placed(self._into_latents(query))), -1)
        out, _ = self._attend(self, q, keys, values, mask, scaling=self.scaling, **kwargs)
        own = torch.arange(self.heads, device=out.device)
        residual = out[..., self.head_dim :].unflatten(-1, (self.heads, self.rank))[:, :, own, own]
        return self._out(out[..., : self.head_dim], residual)

    def _placed(self, latent: Tensor) -> Tensor:
        """Latent queries `[B, H, T, r]` where a record has their head's latents, `[B, H, T, H r]`, zero elsewhere."""
        eye = torch.eye(self.heads, dtype=latent.dtype, device=latent.device)
        return (latent[:, :, :, None] * eye[None, :, None, :, None]).flatten(3)

    def stored_form(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attention of a chunk without a past was called with, `[B, H, T, D + r]` each, as `_stored` has it: queries
        `[B, H, T, W]` and records `[B, 1, T, W]`. For calibration. Raises UnsupportedModelError for exact, which stores no keys."""
        if self.config.variant == "exact":
            raise UnsupportedModelError("LRKV `exact` stores no keys that a profile could speak of. Use the `nope` variant.")
        d, end = self.head_dim, self.head_dim + self.rank
        k, v = (torch.cat((x[:, :1, :, :d], x[..., d:end].transpose(1, 2).flatten(2)[:, None]), -1) for x in (key, value))
        return torch.cat((query[..., :d], self._placed(query[..., d:end])), -1), k, v


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """`[B, T, H n]` as `[B, H, T, n]`."""
    return x.view(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)
