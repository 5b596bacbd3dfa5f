"""MLA, multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): one latent for keys and values of all heads.

    c = RMSNorm(X W_down) [latent_dim]      k_R = Rot(X W_R) [rope_dim], one for all heads
    K_h = [W_UK,h c | k_R]    V_h = W_UV,h c    Q_h = [q_h | Rot q_R,h]    scale (D + rope_dim)^-1/2

Cached per token: the latent, as the value, and k_R, as the key: `[B, 1, N, latent_dim]` and `[B, 1, N, rope_dim]`. Reading is absorbed
(its eq. 10 and below). Queries are full rank, as everywhere in this room.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from kvstack.attention import absorbed
from kvstack.attention.config import DecoderConfig
from kvstack.kernels.reference import Places


class LatentAttention(nn.Module):
    """See the module. Parameters: q_proj, o_proj; kv_down, k_rope, kv_norm; k_up, v_up `[H D, latent_dim]`."""

    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        d, self.heads, self.head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        self.rope_dim = config.rope_dim
        self.scaling = (self.head_dim + self.rope_dim) ** -0.5
        self.q_proj = nn.Linear(d, self.heads * (self.head_dim + self.rope_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, d, bias=False)
        self.kv_down = nn.Linear(d, config.latent_dim, bias=False)
        self.k_rope = nn.Linear(d, self.rope_dim, bias=False)
        self.kv_norm = LlamaRMSNorm(config.latent_dim, config.rms_norm_eps)
        self.k_up, self.v_up = (nn.Linear(config.latent_dim, self.heads * self.head_dim, bias=False) for _ in range(2))
        self.updates = dict.fromkeys(("q_proj", "k_up", "v_up"), (self.heads, 1.0))  # see `lab.optim`

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
        # Every so many of the head's frequencies: those that RoPE gives a head of rope_dim.
        cos, sin = (x[..., :: self.head_dim // self.rope_dim][:, None] for x in position_embeddings)
        query = self.q_proj(hidden_states).view(b, t, self.heads, -1).transpose(1, 2)
        query, turned = query.split((self.head_dim, self.rope_dim), -1)
        turned = absorbed.rotate(turned, cos, sin)
        latent = self.kv_norm(self.kv_down(hidden_states))
        key = absorbed.rotate(self.k_rope(hidden_states)[:, None], cos, sin)  # [B, 1, T, rope_dim]
        if past_key_values is not None:
            keys, latents = past_key_values.update(key, latent[:, None], self.layer_idx)
            if not isinstance(keys, Tensor) or keys.shape[2] > t:
                return self._read(query, turned, keys, latents, attention_mask, **kwargs), None
        k, v = (up(latent).view(b, t, self.heads, self.head_dim).transpose(1, 2) for up in (self.k_up, self.v_up))
        q, k = torch.cat((query, turned), -1), torch.cat((k, key.expand(-1, self.heads, -1, -1)), -1)
        # Fast attention wants values as wide as keys.
        out, _ = self._attend(self, q, k, F.pad(v, (0, self.rope_dim)), attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out[..., : self.head_dim].reshape(b, t, -1)), None

    @property
    def _attend(self) -> Callable[..., Any]:
        """The attention function that the model is set to; looked up here, where tools that watch a model expect it."""
        found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return found

    def record_logits(self, q: Tensor, key: Tensor, value: Tensor, places: Places | None) -> Tensor:
        """Logits `[B, H, T, N]` of `q [B, H, T, latent_dim + rope_dim]`, before scale; see `kernels.reference.RecordLogits`."""
        into, turned = q.split((value.shape[-1], key.shape[-1]), -1)
        logits: Tensor = into @ value.transpose(-1, -2) + turned @ key.transpose(-1, -2)
        return logits

    def _read(self, query: Tensor, turned: Tensor, keys: Any, latents: Any, mask: Tensor | None, **kwargs: Any) -> Tensor:
        """The layer's output over cached keys `[B, 1, N, rope_dim]` and latents `[B, 1, N, latent_dim]`, or by
        a cache that attends itself."""
        k_up, v_up = (up.weight.view(self.heads, self.head_dim, -1) for up in (self.k_up, self.v_up))
        q = torch.cat((torch.einsum("bhtd,hdc->bhtc", query, k_up), turned), -1)
        if isinstance(keys, Tensor):
            logits = self.record_logits(q, keys, latents, None)
            mean = absorbed.softmax(logits.float() * self.scaling, mask).to(latents.dtype) @ latents
        else:
            mean, _ = self._attend(self, q, keys, latents, mask, scaling=self.scaling, record_logits=self.record_logits, **kwargs)
            mean = mean.transpose(1, 2)
        return self.o_proj(torch.einsum("bhtc,hdc->bthd", mean, v_up).flatten(2))  # type: ignore[no-any-return]
