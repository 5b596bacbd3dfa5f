"""Statistics of queries: against queries that the model's own projections give, in any batch, and from models of every kind."""

import gc
import weakref
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES, SIZES, make, tokens
from torch import Tensor

from kvstack.calibrate import calibrate
from kvstack.errors import UnsupportedModelError
from kvstack.rope import rope_of

torch.set_num_threads(1)
NAMES = ("query_mean_real", "query_mean_imag", "query_norm")


def of_projections(model: Any, ids: Tensor) -> list[Tensor]:
    """Queries `[tokens, Hq, D]` of every layer before RoPE: what comes out of q_proj or, where there is one, of q_norm."""
    found: list[Tensor] = []
    hooks = []
    for layer in model.model.layers:
        last = getattr(layer.self_attn, "q_norm", layer.self_attn.q_proj)
        hooks.append(last.register_forward_hook(lambda *a: found.append(a[2])))
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return [q.reshape(ids.numel(), model.config.num_attention_heads, -1) for q in found]


@pytest.mark.parametrize("family", ["llama", "qwen2-bias", "qwen3-128", "phi", "cohere"])
@torch.inference_mode()
def test_they_are_those_of_the_projections(family: str) -> None:
    parameters = {"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    torch.manual_seed(0)
    if family == "phi":
        model: Any = hf.PhiForCausalLM(hf.PhiConfig(**SIZES, rope_parameters=parameters)).eval()
    elif family == "cohere":
        model = hf.CohereForCausalLM(hf.CohereConfig(**SIZES)).eval()
    else:
        model = make(family)
    ids = tokens(2, 40)
    profile, rope = calibrate(model, [ids[:1], ids[1:]], covariance=True), rope_of(model)
    covariance = profile.query_covariance
    assert covariance is not None and torch.equal(profile.rope_frequency.double(), rope.frequency)
    for i, q in enumerate(of_projections(model, ids)):
        stats, z, size = profile.layer(i), rope.bands(q), float(q.abs().max())
        torch.testing.assert_close(stats.mean, z.mean(0), rtol=0, atol=1e-4 * size)
        torch.testing.assert_close(stats.norm, z.abs().mean(0), rtol=0, atol=1e-4 * size)
        for h in range(q.shape[1]):
            torch.testing.assert_close(covariance[i, h], torch.cov(q[:, h].T, correction=0), rtol=0, atol=1e-4 * size**2)
        torch.testing.assert_close(profile.concentration()[i], z.mean(0).abs() / z.abs().mean(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_either_side_changes_nothing(side: str, attention: str) -> None:
    model = make("qwen3-128")
    model.set_attn_implementation(attention)
    long, short = tokens(1, 12, 1), tokens(1, 5, 2)
    apart = calibrate(model, [long, short], covariance=True)
    pad, order = ((7, 0), -1) if side == "left" else ((0, 7), 1)
    ids = torch.cat([long, torch.nn.functional.pad(short, pad, value=3)])
    mask = (torch.arange(12)[::order] < torch.tensor([[12], [5]])) if order == 1 else (torch.arange(12) >= torch.tensor([[0], [7]]))
    together = calibrate(model, [{"input_ids": ids, "attention_mask": mask.long()}], covariance=True)
    assert together.tokens == apart.tokens == 17
    for name, found in together.tensors().items():
        torch.testing.assert_close(found, apart.tensors()[name], rtol=1e-3, atol=1e-3, msg=name)


UNSERVED = ("llama4-chunked", "mistral-sliding", "phimoe-sliding", "mla", "lrkv-exact")


@pytest.mark.parametrize("family", ["mla", "lrkv-exact"])
def test_attention_that_stores_no_keys_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="Use"):
        calibrate(make(family), [tokens(2, 20)])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in UNSERVED])
def test_full_layers_of_every_family(family: str) -> None:
    model = make(family)
    before = model.config._attn_implementation
    profile = calibrate(model, [tokens(2, 20)])
    assert model.config._attn_implementation == before
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 2
    assert [bool(norm.any()) for norm in profile.query_norm] == [kind == "full_attention" for kind in kinds]
    r = profile.concentration()
    assert (r >= 0).all() and (r <= 1).all() and not r[~profile.query_norm.flatten(1).any(1)].any()


def test_a_dynamic_rope_is_the_one_of_each_batch() -> None:
    torch.manual_seed(0)
    parameters = {"rope_theta": 10_000.0, "rope_type": "dynamic", "factor": 4.0}
    sizes = SIZES | {"max_position_embeddings": 32, "num_hidden_layers": 1}  # the queries of one layer do not depend on positions
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, rope_parameters=parameters)).eval()
    ids = tokens(1, 120)
    beyond, within = calibrate(model, [ids]), calibrate(model, list(ids.split(30, 1)))
    for name in NAMES:
        torch.testing.assert_close(getattr(beyond, name), getattr(within, name), rtol=1e-3, atol=1e-5)
    assert beyond.rope_frequency[-1] < within.rope_frequency[-1]


def test_bfloat16_is_close() -> None:
    model, ids = make("qwen3-128"), tokens(1, 100)
    exact = calibrate(model, [ids])
    rounded = calibrate(model.to(torch.bfloat16), [ids])
    assert (rounded.query_norm - exact.query_norm).abs().mean() < 0.05 * exact.query_norm.mean()


NO_ROPE: dict[str, Any] = {
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**SIZES, no_rope_layers=[1, 0])),
    "cohere2": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**SIZES, layer_types=["sliding_attention", "full_attention"])),
}


@pytest.mark.parametrize("family", NO_ROPE)
def test_layers_without_rope_are_refused(family: str) -> None:
    torch.manual_seed(0)
    model = NO_ROPE[family]().eval()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=r"Layer 1 of .* does not turn queries by RoPE alone"):
        calibrate(model, [tokens(1, 40)])
    assert model.config._attn_implementation == before


def test_the_model_is_left_as_it_was_also_on_errors() -> None:
    for attention in ("eager", "sdpa"):
        model, ids = make("llama"), tokens(1, 20)
        model.set_attn_implementation(attention)
        expected = model(ids).logits
        calibrate(model, [ids])
        assert model.config._attn_implementation == attention and torch.equal(model(ids).logits, expected)
        with pytest.raises(IndexError):
            calibrate(model, [ids + 1000])
        assert model.config._attn_implementation == attention and not model._forward_hooks
    left = weakref.ref(model)
    del model
    gc.collect()
    assert left() is None
    with pytest.raises(UnsupportedModelError, match="no rotary module"):
        calibrate(hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)), [tokens(1, 8)])
