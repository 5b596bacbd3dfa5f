"""LRKV at its two ends, and the published rule for RoPE, which is none."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvstack
from kvstack import Cache, UnsupportedModelError
from kvstack.attention import DecoderConfig, DecoderForCausalLM
from kvstack.calibrate import calibrate
from kvstack.rope import Rope

torch.set_num_threads(1)
HEADS, D, WIDTH = 4, 16, 64
SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS, head_dim=D,
    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def decoder(**attention: Any) -> DecoderForCausalLM:
    torch.manual_seed(0)
    model = DecoderForCausalLM(DecoderConfig(**SIZES, **attention)).eval()
    for name, p in model.named_parameters():
        if name == "lm_head.weight" or "_up." in name:
            torch.nn.init.normal_(p, std=max(1, p.shape[1]) ** -0.5)
        elif "_norm." in name:
            torch.nn.init.uniform_(p, 0.5, 2.0)
    return model


def tokens(b: int, t: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (b, t), generator=torch.Generator().manual_seed(seed))


def take(model: DecoderForCausalLM, other: DecoderForCausalLM) -> None:
    """Give `model` all weights that `other` has under the same name."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name in own:
                own[name].copy_(p)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("variant", ["exact", "nope"])
def test_rank_0_is_mqa(variant: str, qk_norm: bool) -> None:
    mqa, lrkv = decoder(attention="mqa", qk_norm=qk_norm), decoder(attention="lrkv", rank=0, variant=variant, qk_norm=qk_norm)
    take(lrkv, mqa)
    for a, b in zip(mqa.model.layers, lrkv.model.layers, strict=True):
        b.self_attn.k_shared.weight.copy_(a.self_attn.k_proj.weight)
        b.self_attn.v_shared.weight.copy_(a.self_attn.v_proj.weight)
    x = tokens(2, 30)
    torch.testing.assert_close(lrkv(x).logits, mqa(x).logits, atol=1e-6, rtol=1e-6)
    assert torch.equal(lrkv.generate(x, max_new_tokens=8, do_sample=False), mqa.generate(x, max_new_tokens=8, do_sample=False))


@torch.no_grad()
def test_full_rank_spans_mha() -> None:
    mha, lrkv = decoder(attention="mha"), decoder(attention="lrkv", rank=D)
    take(lrkv, mha)
    for a, b in zip(mha.model.layers, lrkv.model.layers, strict=True):
        for side in "kv":
            getattr(b.self_attn, f"{side}_shared").weight.zero_()
            getattr(b.self_attn, f"{side}_down").weight.copy_(getattr(a.self_attn, f"{side}_proj").weight)
            getattr(b.self_attn, f"{side}_up").weight.copy_(torch.eye(D).repeat(HEADS, 1))
    x = tokens(2, 30)
    torch.testing.assert_close(lrkv(x).logits, mha(x).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(lrkv.generate(x, max_new_tokens=8, do_sample=False), mha.generate(x, max_new_tokens=8, do_sample=False))


def test_turning_latents_is_not_relative() -> None:
    """`Rot k_s + B Rot r`, as arXiv:2601.11471 has it, depends on where a query and a key are; `Rot (k_s + B r)` on their distance."""
    g = torch.Generator().manual_seed(0)
    q, k, r, up = (torch.randn(*s, generator=g) for s in ((D,), (D,), (8,), (D, 8)))
    head, latent = Rope.half(D), Rope.half(8)

    def logit(query: int, key: int, published: bool) -> float:
        at = torch.tensor(key)
        turned = head.turn(k, at) + up @ latent.turn(r, at) if published else head.turn(k + up @ r, at)
        return float(head.turn(q, torch.tensor(query)) @ turned)

    assert logit(105, 100, False) == pytest.approx(logit(5, 0, False), abs=1e-3)
    assert abs(logit(105, 100, True) - logit(5, 0, True)) > 1


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["polar4", "polar3(window=6, sinks=2)", "fp8", "k4v2(window=4)"])
@pytest.mark.parametrize("kind", ["exact", "nope", "nope-normed", "mla"])
def test_codecs_store_latents(kind: str, recipe: str) -> None:
    """What comes out is attention over decoded records, and better codes are closer to no codes."""
    fields: dict[str, Any] = {"attention": "mla", "latent_dim": 32, "rope_dim": 16}
    variant, _, normed = kind.partition("-")
    model = decoder(**fields if kind == "mla" else {"attention": "lrkv", "rank": 12, "variant": variant, "qk_norm": bool(normed)})
    x = tokens(2, 60)
    caches = [Cache(model, r, prefill="strict") for r in ("exact", recipe, recipe)]
    full, coded = (torch.cat([model(i, past_key_values=c).logits for i in x.split(1, 1)], 1) for c in caches[:2])
    # Rounding now and then tips a code over.
    assert (model(x, past_key_values=caches[2]).logits - coded).norm() < 0.03 * full.norm()
    assert 0.01 < (coded - full).norm() / full.norm() < 0.8
    assert caches[2].nbytes < 0.7 * caches[0].nbytes


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("scorer", ["tri", "keydiff", "h2o", "streaming", "knorm", "snapkv", "rkv", "expected", "random"])
def test_scorers_judge_latents(scorer: str, qk_norm: bool) -> None:
    """After evictions a step is what it is over the records that are left."""
    model = decoder(attention="lrkv", rank=12, variant="nope", qk_norm=qk_norm)
    profile = calibrate(model, [tokens(2, 60, seed=1)], covariance=True)
    cache, x = Cache(model, f"{scorer}(24, interval=8)", profile=profile, prefill="strict"), tokens(2, 60)
    for chunk in x.split(4, 1):
        model(chunk, past_key_values=cache)
    stores = [layer.store for layer in cache.layers]
    assert all(int(s.body.longest) <= 32 for s in stores)
    records = []
    for store in stores:
        sides = [tier.sides() for tier in store.tiers.values() if tier.longest]
        records.append([torch.cat([s[i].codec.decode(s[i].codes) for s in sides], 2) for i in (0, 1)])
    expected = model(tokens(2, 1, seed=2), past_key_values=cache).logits
    plain = DynamicCache([(k, v) for k, v in records])
    model.set_attn_implementation("sdpa")
    found = model(tokens(2, 1, seed=2), past_key_values=plain, position_ids=torch.full((2, 1), 60)).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_selection_over_rebuilt_keys_is_refused() -> None:
    for fields in ({"rank": 12, "attention": "lrkv"}, {"attention": "mla", "latent_dim": 32, "rope_dim": 16}):
        with pytest.raises(UnsupportedModelError, match="Use no selection"):
            Cache(decoder(**fields), "knorm(24)")


def test_pooled_entries_are_refused() -> None:
    model = decoder(attention="hca", pool=8, window=8, rope_dim=8)
    with pytest.raises(UnsupportedModelError, match="pooled"):
        Cache(model, "polar4")


@torch.no_grad()
def test_the_graph_loop_reads_records() -> None:
    model, x = decoder(attention="lrkv", rank=12, variant="nope"), tokens(2, 20)
    found = kvstack.generate(model, x, recipe="exact", max_new_tokens=8)
    model.set_attn_implementation("sdpa")
    assert torch.equal(found.tokens, model.generate(x, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 20:])


@torch.no_grad()
@pytest.mark.parametrize(
    ("said", "fields"),
    [("rebuild", {"attention": "lrkv", "rank": 12}), ("rebuild", {"attention": "mla", "latent_dim": 64, "rope_dim": 16})],
)
def test_the_graph_loop_refuses_what_it_cannot_read(said: str, fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        kvstack.generate(decoder(**fields), tokens(1, 8), recipe="exact", max_new_tokens=2)
