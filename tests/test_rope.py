"""The RoPE found in a model is the one that its attention applies: families, scalings, pairings, and what is refused."""

from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES, SIZES
from torch import Tensor

from kvstack.errors import UnsupportedModelError
from kvstack.rope import Rope, rope_of

torch.set_num_threads(1)


def llama(**rope: Any) -> Any:
    parameters = {"rope_theta": 10_000.0, "rope_type": "default", **rope}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, head_dim=32, rope_parameters=parameters))


def partial(family: str, share: float, **sizes: Any) -> Any:
    parameters = {"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": share}
    return getattr(hf, f"{family}ForCausalLM")(getattr(hf, f"{family}Config")(**SIZES, **sizes, rope_parameters=parameters))


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
HALVES, NEIGHBOURS = "halves", "neighbours"
# model, how coordinates are paired, share of them that turn
MODELS: dict[str, tuple[Any, str, float]] = {
    "llama": (llama, HALVES, 1),
    "linear": (lambda: llama(rope_type="linear", factor=4.0), HALVES, 1),
    "dynamic": (lambda: llama(rope_type="dynamic", factor=2.0), HALVES, 1),
    "yarn": (lambda: llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), HALVES, 1),
    "llama3": (lambda: llama(**LLAMA3), HALVES, 1),
    "qwen3": (FAMILIES["qwen3-128"], HALVES, 1),
    "gpt-oss": (FAMILIES["gpt-oss-sinks"], HALVES, 1),
    "gemma3": (FAMILIES["gemma3-256"], HALVES, 1),
    "phi": (lambda: partial("Phi", 0.5), HALVES, 0.5),
    "phi3": (lambda: partial("Phi3", 0.5), HALVES, 0.5),
    "stablelm": (lambda: partial("StableLm", 0.25), HALVES, 0.25),
    "glm": (lambda: partial("Glm", 0.5, head_dim=32), NEIGHBOURS, 0.5),
    "cohere": (lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES)), NEIGHBOURS, 1),
}


def seen_by_attention(model: Any, ids: Tensor, position: Tensor) -> Tensor:
    """Queries of the last layer, `[1, Hq, T, D]`, as they come out of the model's own attention code."""
    found = []

    def attention(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(query)
        return hf.integrations.sdpa_attention.sdpa_attention_forward(module, query, *args, **kwargs)

    hf.AttentionInterface.register("seen", attention)
    model.set_attn_implementation("seen")
    model(input_ids=ids, position_ids=position)
    return found[-1]


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_it_turns_as_the_attention_of_the_model_does(name: str) -> None:
    make, pairing, share = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    rope = rope_of(model)
    turning = int(share * len(rope.frequency))
    assert (rope.frequency[:turning] > 0).all() and not rope.frequency[turning:].any() and (rope.scale[turning:] == 1).all()
    assert rope.pairs[:, 1].tolist() == ([1, 1 + turning] if pairing == HALVES else [2, 3])
    assert sorted(rope.pairs.flatten().tolist()) == list(range(2 * len(rope.frequency)))
    # The last layer is a full one. RoPE is relative, so at other positions its queries are the same before RoPE.
    ids, p = torch.randint(3, 64, (1, 9)), torch.arange(9)[None]
    near, far = (rope.unturn(seen_by_attention(model, ids, p + shift), (p + shift)[:, None]) for shift in (0, 100))
    torch.testing.assert_close(far, near, rtol=0, atol=2e-4 * float(near.abs().max()))


@torch.inference_mode()
def test_scaling_shows_and_a_dynamic_one_is_as_it_is_now() -> None:
    plain, yarn, dynamic = (MODELS[n][0]().eval() for n in ("llama", "yarn", "dynamic"))
    torch.testing.assert_close(rope_of(plain).frequency, Rope.half(32).frequency, rtol=1e-6, atol=0)
    assert (rope_of(yarn).scale > 1.1).all() and (rope_of(yarn).frequency != rope_of(plain).frequency).any()
    before = rope_of(dynamic)
    dynamic(torch.randint(3, 64, (1, 600)))  # of a context of 256
    after, again = rope_of(dynamic), rope_of(dynamic)
    assert after.frequency[-1] < before.frequency[-1] and torch.equal(again.frequency, after.frequency)
    assert torch.equal(after.frequency, dynamic.model.rotary_emb.inv_freq.double())
    dynamic(torch.randint(3, 64, (1, 9)))
    assert torch.equal(rope_of(dynamic).frequency, before.frequency)


def test_layers_of_different_types() -> None:
    model = FAMILIES["gemma3-256"]()
    held = model.model.rotary_emb
    assert torch.equal(rope_of(model).frequency, held.full_attention_inv_freq.double())
    assert not torch.equal(held.full_attention_inv_freq, held.sliding_attention_inv_freq)


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no rotary module.*such as Llama"):
        rope_of(hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)))
    with pytest.raises(UnsupportedModelError, match="neither by halves nor"):
        rope_of(FAMILIES["llama4-chunked"]())
    model = llama()
    model.model.second = type(model.model.rotary_emb)(model.config)
    rope_of(model)
    model.model.second.inv_freq *= 2
    with pytest.raises(UnsupportedModelError, match="different frequencies"):
        rope_of(model)


def test_turning_back() -> None:
    rope, x = Rope.half(16), torch.randn(3, 5, 16)
    torch.testing.assert_close(rope.unturn(rope.turn(x, torch.arange(5)), torch.arange(5)), x)
    torch.testing.assert_close(rope.vectors(rope.bands(x)), x, rtol=0, atol=0)
    q, k = x[:, :1], x[:, 1:2]
    near, far = ((rope.turn(q, torch.tensor(p + 7)) * rope.turn(k, torch.tensor(p))).sum(-1) for p in (0, 1_000_000))
    torch.testing.assert_close(far, near, rtol=1e-4, atol=1e-4)
