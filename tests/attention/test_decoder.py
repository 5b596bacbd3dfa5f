"""Every attention in the one decoder: decoding equals the forward, bytes equal the formula, and transformers' own things work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from kvstack.attention import DecoderConfig, DecoderForCausalLM, lowrank
from kvstack.attention.config import KINDS
from kvstack.attention.equality import decoding_differences, relative
from kvstack.errors import BadInputError

torch.set_num_threads(1)
SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
KEYS: dict[str, dict[str, Any]] = {
    "mha": {"attention": "mha"},
    "gqa": {"attention": "gqa", "num_key_value_heads": 2},
    "mqa": {"attention": "mqa"},
    "mha-normed": {"attention": "mha", "qk_norm": True},
    "gqa-normed": {"attention": "gqa", "num_key_value_heads": 2, "qk_norm": True},
    "mla": {"attention": "mla", "latent_dim": 24, "rope_dim": 8},
    "lrkv-exact": {"attention": "lrkv", "rank": 6, "variant": "exact"},
    "lrkv-nope": {"attention": "lrkv", "rank": 6, "variant": "nope"},
    "lrkv-exact-normed": {"attention": "lrkv", "rank": 6, "variant": "exact", "qk_norm": True},
    "lrkv-nope-normed": {"attention": "lrkv", "rank": 6, "variant": "nope", "qk_norm": True},
    "lrkv-nope-8": {"attention": "lrkv", "rank": 8, "variant": "nope"},
    "lrkv-0": {"attention": "lrkv", "rank": 0},
    "factorised": {"attention": "lrkv", "rank": 16},
}
POOLS: dict[str, dict[str, Any]] = {
    "csa": {"attention": "csa", "pool": 4, "entries": 6, "window": 8, "rope_dim": 8, "index_heads": 2, "index_dim": 8},
    "hca": {"attention": "hca", "pool": 8, "window": 8, "rope_dim": 8},
}
ALL = KEYS | POOLS


def decoder(kind: str, **sizes: Any) -> DecoderForCausalLM:
    """A tiny model whose residuals and head are as large as the rest."""
    torch.manual_seed(0)
    model = DecoderForCausalLM(DecoderConfig(**SIZES | sizes, **ALL[kind])).eval()
    for name, p in model.named_parameters():
        if name == "lm_head.weight" or "_up." in name:
            torch.nn.init.normal_(p, std=max(1, p.shape[1]) ** -0.5)
        elif "_norm." in name:
            torch.nn.init.uniform_(p, 0.5, 2.0)
    return model


def tokens(b: int, t: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (b, t), generator=torch.Generator().manual_seed(seed))


def test_all_kinds_are_here() -> None:
    assert {a["attention"] for a in ALL.values()} == set(KINDS)


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL)
def test_decoding_equals_the_forward(kind: str) -> None:
    """The absorbed way of chunks and steps against the expanded one of a chunk without a past."""
    model, x = decoder(kind), tokens(2, 40)
    full = model(x).logits
    out = model(x[:, :20], use_cache=True)
    parts, cache = [out.logits], out.past_key_values
    for chunk in (x[:, 20:27], *x[:, 27:].split(1, 1)):
        parts.append(model(chunk, past_key_values=cache).logits)
    assert relative(torch.cat(parts, 1), full) < (1e-6 if kind in KEYS else 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lrkv-exact", "lrkv-nope", "lrkv-exact-normed", "lrkv-nope-normed", "factorised"])
def test_what_the_kernel_is_given(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps as a Hopper GPU takes them, with the kernel's twin in its place."""
    model, x = decoder(kind), tokens(2, 40)
    full, cache = model(x).logits, DynamicCache(config=model.config)
    model(x[:, :30], past_key_values=cache)
    monkeypatch.setattr(lowrank, "has_kernel", lambda q, keys: True)
    parts = [model(i, past_key_values=cache).logits for i in x[:, 30:].split(1, 1)]
    assert relative(torch.cat(parts, 1), full[:, 30:]) < 1e-6


@pytest.mark.parametrize("kind", ALL)
def test_decoding_in_bfloat16_is_as_good_as_the_forward(kind: str) -> None:
    found = decoding_differences(decoder(kind), tokens(2, 230), steps=30)
    assert found["float32"] < (2e-6 if kind in KEYS else 1e-5)  # rounding: 0.5e-6 to 1.04e-6, as the processor is
    stored = found["bfloat16_stored"]
    assert stored is None if kind in POOLS else 1e-3 < stored < found["bfloat16_forward"], (
        "already to store costs more than a thousandth"
    )
    assert found["bfloat16"] < 1.3 * found["bfloat16_forward"] < 0.3 and abs(found["bfloat16_loss"]) < 0.01


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KEYS)
def test_decoding_on_a_gpu_equals_the_forward(kind: str) -> None:
    """Where LRKV decodes by its kernel, which is for heads of 64 and 16 bits."""
    model, x = decoder(kind, hidden_size=256, head_dim=64).to("cuda", torch.float16), tokens(3, 230).cuda()
    full, cache = model(x).logits, DynamicCache(config=model.config)
    parts = [model(chunk, past_key_values=cache).logits for chunk in (x[:, :200], *x[:, 200:].split(1, 1))]
    assert relative(torch.cat(parts, 1).float(), full.float()) < 5e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", KEYS)
def test_left_padding_changes_nothing(kind: str) -> None:
    model, x = decoder(kind), tokens(1, 12)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), x], 1)
    mask = (padded > 0).long()
    alone, beside = (
        model.generate(i, attention_mask=m, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
        for i, m in ((x, torch.ones_like(x)), (padded, mask))
    )
    assert torch.equal(alone.sequences[:, -6:], beside.sequences[:, -6:])
    torch.testing.assert_close(torch.stack(beside.logits), torch.stack(alone.logits), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KEYS)
def test_the_cache_is_as_large_as_the_formula(kind: str) -> None:
    model = decoder(kind).to(torch.bfloat16)
    cache = model(tokens(3, 50), use_cache=True).past_key_values
    held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == 3 * 50 * 2 * 2 * model.config.cache_numbers


def test_lrkv_takes_what_the_paper_says() -> None:
    """1 / H + r / D of MHA's cache, section 3.2 of arXiv:2601.11471."""
    mha, lrkv = (decoder(k).config.cache_numbers for k in ("mha", "lrkv-exact"))
    assert lrkv / mha == pytest.approx(1 / 4 + 6 / 16)


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL)
def test_saved_models_load_by_auto(kind: str, tmp_path: Path) -> None:
    model, x = decoder(kind), tokens(2, 20)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is DecoderForCausalLM
    assert torch.equal(again(x).logits, model(x).logits)
    out = model.generate(x, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(out, again.generate(x, max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=False))


@pytest.mark.parametrize("kind", ALL)
def test_every_parameter_learns_and_checkpointing_changes_nothing(kind: str) -> None:
    model, x = decoder(kind).train(), tokens(2, 40)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(x, labels=x, use_cache=False).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.numel() and p.grad is not None})
    assert set(grads[0]) == {n for n, p in model.named_parameters() if p.numel()}
    for name, g in grads[0].items():
        assert g.isfinite().all() and g.any(), name
        torch.testing.assert_close(grads[1][name], g, msg=name)


def test_a_fresh_model_knows_nothing_and_its_residuals_are_small() -> None:
    torch.manual_seed(0)
    model = DecoderForCausalLM(DecoderConfig(**SIZES | {"hidden_size": 512, "head_dim": 64}, attention="lrkv", rank=24))
    assert not model(tokens(1, 8)).logits.any()
    attention = model.model.layers[0].self_attn
    residual = torch.stack([a @ b for a, b in zip(attention.k_up.weight.split(64), attention.k_down.weight.split(24), strict=True)])
    assert float((residual[0].norm() / attention.k_shared.weight.norm()).detach()) == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention": "lkrv"}, "mha, gqa, mqa"),
        ({"attention": "gqa", "num_key_value_heads": 3}, "divisor"),
        ({"attention": "lrkv", "rank": 17}, "0 to 16"),
        ({"attention": "lrkv", "rank": 4, "variant": "rope"}, "exact, nope"),
        ({"attention": "mla", "latent_dim": 0, "rope_dim": 8}, "latent_dim"),
        ({"attention": "mla", "latent_dim": 8, "rope_dim": 12}, "divides"),
        ({"attention": "csa", "pool": 4, "window": 8, "rope_dim": 8}, "at least 1 of each"),
        ({"attention": "hca", "window": 8}, "pool"),
        ({"attention": "mla", "latent_dim": 24, "rope_dim": 8, "qk_norm": True}, "norms of its own"),
    ],
)
def test_bad_configs_say_what_would_do(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        DecoderConfig(**SIZES, **fields)
