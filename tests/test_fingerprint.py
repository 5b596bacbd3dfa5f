"""The fingerprint: the same for one checkpoint however it is loaded, another for other weights."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kvstack.fingerprint import fingerprint
from kvstack.hf.cache import Cache

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def test_one_checkpoint_one_fingerprint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).half()
    model.save_pretrained(tmp_path)
    name = fingerprint(model)
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == name
    Cache(model, "polar4")  # sets the attention implementation, which is no part of the weights
    assert fingerprint(model.eval()) == name and len(name) == 16


def test_a_float32_checkpoint_in_bfloat16_is_the_same() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert fingerprint(model) == fingerprint(model.to(torch.bfloat16))


def test_other_weights_shapes_or_turns_are_others() -> None:
    seen = set()
    for seed, kind in [(0, LlamaForCausalLM), (1, LlamaForCausalLM), (0, Qwen3ForCausalLM)]:
        torch.manual_seed(seed)
        config = (LlamaConfig if kind is LlamaForCausalLM else Qwen3Config)(**SIZES)
        seen.add(fingerprint(kind(config)))
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    seen.add(fingerprint(model))
    wide = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 65}))
    wide.load_state_dict({k: torch.zeros_like(v) for k, v in wide.state_dict().items()})
    seen.add(fingerprint(wide))
    for theta in (1e4, 1e6):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": theta}))
        seen.add(fingerprint(model))
    assert len(seen) == 6  # 1e4 is the default
