"""Converted models: unchanged at full rank, costs as they are measured, a gauge that pays, and models that cannot be converted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM

from kvstack.attention import DecoderForCausalLM
from kvstack.attention.convert import METHODS, REFERENCES, Cost, convert, moments, query_energies
from kvstack.errors import BadInputError, UnsupportedModelError

torch.set_num_threads(1)

H, D, LAYERS = 4, 8, 2
SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": H, "head_dim": D,
    "max_position_embeddings": 64, "initializer_range": 0.1, "pad_token_id": 0,
}  # fmt: skip
TEXT = torch.randint(0, 50, (6, 40), generator=torch.Generator().manual_seed(1))


def made(kind: type = DecoderForCausalLM, **fields: Any) -> Any:
    """A random model whose logits say something."""
    torch.manual_seed(0)
    model = kind(kind.config_class(**SIZES | fields)).eval()  # type: ignore[attr-defined]
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TEXT).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model() -> Any:
    return made()


@pytest.fixture(scope="module")
def c(model: Any) -> list[Tensor]:
    return moments(model, TEXT.split(2))


@pytest.mark.parametrize("kind", [DecoderForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_full_rank_changes_nothing(method: str, tied: bool, kind: type, tmp_path: Path) -> None:
    source = made(kind, tie_word_embeddings=tied)
    source.generation_config.max_new_tokens = 33
    new, costs = convert(source, moments(source, [TEXT]), method, D)
    torch.testing.assert_close(logits(new), logits(source), rtol=0, atol=1e-4)
    assert all(cost.key < 1e-9 and cost.value < 1e-9 for cost in costs) and new.generation_config.max_new_tokens == 33
    assert new.config.attention == ("lrkv" if "lrkv" in method else "gqa" if method == "gqa" else "mha")
    new.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, DecoderForCausalLM) and torch.equal(logits(loaded), logits(new))


def test_the_source_stays_as_it_was_and_shares_nothing(model: Any, c: list[Tensor]) -> None:
    before = logits(model)
    for method in METHODS:
        new, _ = convert(model, c, method, 2)
        with torch.no_grad():
            for p in new.parameters():
                p.zero_()
    assert torch.equal(logits(model), before) and not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_moments_and_energies_are_those_of_what_attention_sees(model: Any, c: list[Tensor]) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def see(module: Any, args: tuple[Tensor], out: Tensor) -> None:
        seen.append((args[0].flatten(0, 1).double(), out.flatten(0, 1).double()))

    hooks = [layer.self_attn.q_proj.register_forward_hook(see) for layer in model.model.layers]
    logits(model)
    for hook in hooks:
        hook.remove()
    for i, layer in enumerate(model.model.layers):
        x, q = seen[i][0], seen[i][1].view(-1, H, 2, D // 2)
        torch.testing.assert_close(c[i], x.T @ x / len(x), rtol=1e-5, atol=1e-6)
        energies = query_energies(layer.self_attn.q_proj.weight, c[i], D)
        torch.testing.assert_close(energies, q.square().sum(2).mean(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
@pytest.mark.parametrize("heads", [H, 3])  # three do not share their ranks evenly
def test_costs_are_those_of_the_structures(heads: int, rank: int) -> None:
    model = made(num_attention_heads=heads)
    c = moments(model, [TEXT])
    costs = {method: convert(model, c, method, rank)[1] for method in METHODS}
    numbers = 2 * (D + heads * rank)
    expected = {"lrkv": numbers, "lrkv-mean": numbers, "per-head": numbers, "joint": numbers, "mla": min(numbers, 48)}
    expected |= {"gqa": 2 * D * (1 if rank == 0 else 2 if (heads, rank) == (H, 1) else heads)}
    for method, found in costs.items():
        assert [cost.numbers for cost in found] == [expected[method]] * LAYERS
    for i in range(LAYERS):
        found_lost = {method: torch.tensor((cost[i].key, cost[i].value)) for method, cost in costs.items()}
        for method in ("lrkv", "lrkv-mean", "per-head"):
            assert (found_lost["joint"] <= found_lost[method] + 1e-5).all()


@pytest.mark.parametrize("method", REFERENCES)
def test_references_have_weights_of_their_rank(method: str, model: Any, c: list[Tensor]) -> None:
    new, costs = convert(model, c, method, 1)
    for layer in new.model.layers:
        k, v = layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight
        if method == "mla":
            assert rank_of(torch.cat((k, v))) == costs[0].numbers
        for w in (k, v) if method != "mla" else ():
            assert rank_of(w.view(H, D, -1) if method == "per-head" else w) == costs[0].numbers // 2


def rank_of(w: Tensor) -> int:
    """The rank of a matrix, or the sum of those of several."""
    return int(torch.linalg.matrix_rank(w, rtol=1e-5).sum())


@pytest.mark.parametrize("method", ["lrkv", "lrkv-mean", "gqa"])
@torch.no_grad()
def test_converted_models_cache_what_they_say_and_read_it(method: str, model: Any, c: list[Tensor]) -> None:
    new, costs = convert(model, c, method, 1)
    cache = new(TEXT[:, :-1], use_cache=True).past_key_values
    assert [sum(t[0, :, 0].numel() for t in (x.keys, x.values)) for x in cache.layers] == [cost.numbers for cost in costs]
    read = new(TEXT[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(read[:, 0], logits(new)[:, -1], rtol=0, atol=1e-4)


def test_heads_that_share_a_structure_lose_less_as_lrkv() -> None:
    """Keys that are one head turned by phases, values that are one head turned at will, and noise of rank 1 in both."""
    source = made(hidden_size=H * D)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in source.model.layers:
            a = layer.self_attn
            k, v = torch.randn(2, D, H * D, generator=g) / (H * D) ** 0.5
            angle = torch.rand(H, D // 2, 1, generator=g) * 6
            turned = torch.polar(torch.ones_like(angle), angle) * torch.complex(*k.chunk(2))
            keys = torch.cat((turned.real, turned.imag), 1)
            values = torch.linalg.qr(torch.randn(H, D, D, generator=g)).Q @ v
            for weight, heads in ((a.k_proj.weight, keys), (a.v_proj.weight, values)):
                noise = torch.randn(H, D, 1, generator=g) @ torch.randn(H, 1, H * D, generator=g) / (H * D) ** 0.5
                weight.copy_((heads + 0.3 * noise).flatten(0, 1))
            a.o_proj.weight.copy_(torch.linalg.qr(torch.randn(H * D, H * D, generator=g)).Q)
    c = moments(source, [TEXT])
    costs = {method: convert(source, c, method, 2)[1] for method in METHODS}
    for rival in ("per-head", "lrkv-mean", "gqa"):
        for ours, theirs in zip(costs["lrkv"], costs[rival], strict=True):
            assert ours.numbers <= theirs.numbers and ours.key < theirs.key / 2 and ours.value < theirs.value / 2, rival


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (DecoderForCausalLM, {"attention": "lrkv", "rank": 2}, "is lrkv already"),
        (DecoderForCausalLM, {"attention": "gqa", "num_key_value_heads": 2}, "is gqa already"),
        (LlamaForCausalLM, {"num_key_value_heads": 2}, "4 query heads share 2 KV heads"),
        (LlamaForCausalLM, {"attention_bias": True}, "without attention_bias"),
        (Qwen3ForCausalLM, {"num_key_value_heads": 4}, "Give a model without QK-norm"),
    ],
)
def test_models_that_cannot_be_converted(kind: type, fields: dict[str, Any], message: str) -> None:
    source = made(kind, **fields)
    for call in (lambda: moments(source, [TEXT]), lambda: convert(source, [], "lrkv", 2)):
        with pytest.raises(UnsupportedModelError, match=message):
            call()


def test_other_families_and_bad_input_are_refused(model: Any, c: list[Tensor]) -> None:
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel cannot be converted. Give a LlamaForCausalLM"):
        convert(gpt, c, "lrkv", 2)
    with pytest.raises(BadInputError, match=r"There is no method 'svd'. Choose one of lrkv, lrkv-mean, gqa"):
        convert(model, c, "svd", 2)
    for rank in (-1, D + 1):
        with pytest.raises(BadInputError, match=f"rank cannot be {rank}. Give a whole number from 0 to the head size, {D}"):
            convert(model, c, "joint", rank)
    with pytest.raises(BadInputError, match="no tokens"):
        moments(model, [])


def test_progress_is_told(model: Any, c: list[Tensor]) -> None:
    tokens: list[int] = []
    layers: list[int] = []
    moments(model, TEXT.split(2), tokens.append)
    _, costs = convert(model, c, "lrkv", 2, layers.append)
    assert tokens == [80, 160, 240] and layers == [1, 2] and all(isinstance(cost, Cost) for cost in costs)
