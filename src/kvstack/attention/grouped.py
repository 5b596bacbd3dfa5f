"""MHA, GQA and MQA: keys and values of some heads, shared by groups of query heads (Ainslie et al. 2023).

Cached: keys after RoPE and values, `[B, Hkv, N, D]` each. It is transformers' Llama attention.
"""

from transformers.models.llama.modeling_llama import LlamaAttention

from kvstack.attention.config import DecoderConfig


class GroupedAttention(LlamaAttention):  # type: ignore[misc]
    """`num_attention_heads` query heads over `num_key_value_heads` heads of keys and values."""

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads = {"q_proj": config.num_attention_heads, **dict.fromkeys(("k_proj", "v_proj"), config.num_key_value_heads)}
        self.updates = {name: (n, 1.0) for name, n in heads.items()}  # see `lab.optim`
