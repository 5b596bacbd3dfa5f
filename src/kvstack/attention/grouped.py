"""MHA, GQA and MQA: keys and values of some heads, shared by groups of query heads (Ainslie et al. 2023).

Cached: keys after RoPE and values, `[B, Hkv, N, D]` each. It is transformers' Llama attention.
"""

from transformers.models.llama.modeling_llama import LlamaAttention


class GroupedAttention(LlamaAttention):  # type: ignore[misc]
    """`num_attention_heads` query heads over `num_key_value_heads` heads of keys and values."""
