"""MHA, GQA and MQA: keys and values of some heads, shared by groups of query heads (Ainslie et al. 2023).

Cached: keys after RoPE and values, `[B, Hkv, N, D]` each. It is transformers' Qwen3 attention, whose norms are there on request.
"""

from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from kvstack.attention.config import DecoderConfig


class GroupedAttention(Qwen3Attention):  # type: ignore[misc]
    """`num_attention_heads` query heads over `num_key_value_heads` heads of keys and values."""

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if not config.qk_norm:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        heads = {"q_proj": config.num_attention_heads, **dict.fromkeys(("k_proj", "v_proj"), config.num_key_value_heads)}
        self.updates = {name: (n, 1.0) for name, n in heads.items()}  # see `lab.optim`
