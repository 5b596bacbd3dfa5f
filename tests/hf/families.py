"""Tiny models with random weights of the families that the adapter must serve, made from configurations."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvstack.attention import DecoderConfig, DecoderForCausalLM

VOCABULARY = 64
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GQA = {"head_dim": 64}


def decoder(**attention: Any) -> DecoderForCausalLM:
    """Our own decoder; its head starts at zero, and residuals of LRKV small, so both are drawn again."""
    model = DecoderForCausalLM(DecoderConfig(**SIZES, head_dim=16, **attention))
    for name, p in model.named_parameters():
        if name == "lm_head.weight" or "_up." in name:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model


FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **GQA)),
    "llama-mha-80": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 4}, head_dim=80)),
    "llama-mqa-96": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 1}, head_dim=96)),
    "qwen2-bias": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3-128": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=128)),
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**SIZES, **GQA, sliding_window=8)),
    "mistral-full": lambda: MistralForCausalLM(MistralConfig(**SIZES, **GQA, sliding_window=None)),
    "gemma2-softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **GQA, **SLIDING)),
    "gemma3-256": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=256, **SLIDING)),
    "gpt-oss-sinks": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, **GQA, **SLIDING, num_local_experts=2, num_experts_per_tok=1)),
    "llama4-chunked": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **SIZES,
            head_dim=64,
            intermediate_size_mlp=64,
            num_local_experts=2,
            attention_chunk_size=8,
            moe_layers=[],
            layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 0],
        )
    ),
    "phimoe-sliding": lambda: PhimoeForCausalLM(PhimoeConfig(**SIZES, sliding_window=8, num_local_experts=2)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    "mla": lambda: decoder(attention="mla", latent_dim=32, rope_dim=16),
    "lrkv-exact": lambda: decoder(attention="lrkv", rank=12, variant="exact"),
    "lrkv-nope": lambda: decoder(attention="lrkv", rank=12, variant="nope"),
    "lrkv-nope-normed": lambda: decoder(attention="lrkv", rank=12, variant="nope", qk_norm=True),
}


def make(family: str, seed: int = 0) -> Any:
    """A model whose next token depends on the whole context: larger weights than usual, so that attention is peaked."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    return model


def tokens(b: int, t: int, seed: int = 0) -> Tensor:
    """Random tokens without the special ones."""
    return torch.randint(3, VOCABULARY, (b, t), generator=torch.Generator().manual_seed(seed))
