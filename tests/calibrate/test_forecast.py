"""Forecasts: targets against the model's own attention, the training on rules that are known, and what calibration makes of it."""

from dataclasses import replace

import pytest
import torch
from families import make, tokens
from torch import Tensor

from kvstack.calibrate import add_forecast, calibrate, forecast
from kvstack.calibrate.forecast import Samples, attention_ahead, rank_correlation, train
from kvstack.calibrate.run import Attended, run
from kvstack.errors import ArtefactError, BadInputError
from kvstack.kernels.reference import Shape
from kvstack.profile import Profile
from kvstack.rope import Rope
from kvstack.scorers import Forecast, Layer

torch.set_num_threads(1)
CPU = torch.device("cpu")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def literal_ahead(p: Tensor) -> Tensor:
    """`[T // 128, T]` of the probabilities `p [G, T, T]`: query by query."""
    t = p.shape[1]
    out = torch.zeros(t // 128, t)
    for event in range(t // 128):
        for q in range(128 * event, t):
            for one in p[:, q]:
                out[event] = out[event].maximum(one)
    return out


@pytest.mark.parametrize("t", [256, 300, 513])
@pytest.mark.parametrize("chunk", [128, 1024])
def test_the_target_is_the_greatest_attention_to_come(t: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "CHUNK", chunk)
    query, key, sink = 3 * gaussian(2, t, 8), gaussian(t, 8, seed=1), torch.tensor([0.5, 2.0])
    future = torch.ones(t, t).triu(1).bool()
    for cap, extra in ((None, None), (2.0, sink)):
        logits = query @ key.T * 0.4
        logits = (logits if cap is None else cap * (logits / cap).tanh()).masked_fill(future, -torch.inf)
        beside = torch.full((2, t, 1), -torch.inf) if extra is None else extra[:, None, None].expand(2, t, 1)
        p = torch.cat([logits, beside], -1).softmax(-1)[..., :t]
        torch.testing.assert_close(attention_ahead(query, key, Shape(0.4, cap), extra), literal_ahead(p))


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    longest = max(r.shape[1] for r in rows)
    room = [(longest - r.shape[1], 0) if side == "left" else (0, longest - r.shape[1]) for r in rows]
    pad = torch.nn.functional.pad
    ids = [pad(r, p, value=3) for r, p in zip(rows, room, strict=True)]
    mask = [pad(torch.ones_like(r), p) for r, p in zip(rows, room, strict=True)]
    return {"input_ids": torch.cat(ids), "attention_mask": torch.cat(mask)}


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_samples_are_those_of_the_model(side: str) -> None:
    """Each is found again: its token by key and value, its event by its age, its target in the attention of the row alone."""
    model, rows, each = make("qwen3-128"), [tokens(1, 390, 1), tokens(1, 256, 2)], 200
    batch, drawn = padded(rows, side), Samples(2, 128, 2 * each, each, seed=0)

    def take(seen: Attended) -> None:
        drawn.add(seen)

    run(model, batch["input_ids"], batch["attention_mask"].bool(), take, layers=[1])
    model.set_attn_implementation("eager")
    found: dict[str, Tensor] = {}
    layer = model.model.layers[1].self_attn
    hooks = [getattr(layer, n).register_forward_hook(lambda *a, n=n: found.update({n: a[2]})) for n in ("k_norm", "v_proj")]
    for i, row in enumerate(rows):
        p, t = model(row, output_attentions=True).attentions[1][0].unflatten(0, (2, 2)), row.shape[1]
        vectors = torch.cat([found["k_norm"].reshape(t, 2, 128), found["v_proj"].reshape(t, 2, 128)], -1).transpose(0, 1)
        own, events = slice(i * each, (i + 1) * each), set()
        for h in range(2):
            ahead = literal_ahead(p[h])
            token = torch.cdist(drawn.x[h, own].float(), vectors[h]).argmin(-1)
            torch.testing.assert_close(drawn.x[h, own].float(), vectors[h, token], rtol=2e-3, atol=2e-3)
            event = (drawn.age[h, own].long() + token) / 128
            assert torch.equal(event, event.round()) and (drawn.age[h, own] > 0).all()
            torch.testing.assert_close(drawn.target[h, own], ahead[event.long(), token], rtol=1e-3, atol=1e-4)
            events |= set(event.long().tolist())
        assert events == set(range(1, t // 128)), "after every event a whole block of queries"
    for hook in hooks:
        hook.remove()


def planted(heads: int = 2, d: int = 8, size: int = 6000) -> Samples:
    """Keys of some mean and spread, in which one direction (and for the second head one of the values) and the age decide."""
    samples = Samples(heads, d, size, size, seed=0)
    x = gaussian(heads, size, 2 * d)
    samples.x = (5 + 3 * x).half()
    samples.x[:, :, 3] = 7.0  # always the same
    samples.age = torch.rand(heads, size, generator=torch.Generator().manual_seed(1)) * 2000
    decides = torch.stack([x[h, :, h * d] for h in range(heads)])
    samples.target = torch.sigmoid(2 * decides - 1 - (samples.age / 128).log1p() * (1 + decides.tanh() / 2))
    return samples


def test_training_finds_a_planted_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, fits = planted(), []
    for steps in (1, 100, 1500):
        monkeypatch.setattr(forecast, "STEPS", steps)
        weights, fit = train(samples, CPU)
        fits.append(fit)
    assert (fits[0][:, 1] > fits[1][:, 1]).all() and (fits[1][:, 1] > fits[2][:, 1]).all(), "the loss falls"
    # The scorer, which knows nothing of means and spreads, says the same of keys that RoPE has turned.
    rope, position = Rope.half(8), torch.arange(6000)
    key, value = samples.x.float().split(8, -1)
    line = (
        Forecast(8)
        .build(Layer(8, 2, 1, rope, CPU, forecast=weights))
        .begin(rope.turn(key, position)[None], value[None], position[None])
    )
    logit = line[0, ..., 0] + line[0, ..., 1] * (samples.age / 128).log1p()
    assert (rank_correlation(logit, samples.target) > 0.93).all() and (fits[2][:, 0] > 0.93).all()
    assert (logit.sigmoid() - samples.target).abs().mean() < 0.05
    cost = torch.nn.functional.binary_cross_entropy_with_logits(logit, samples.target, reduction="none").mean(1)
    torch.testing.assert_close(fits[2][:, 1], cost, rtol=0.1, atol=0)
    least = torch.nn.functional.binary_cross_entropy(samples.target, samples.target, reduction="none").mean(1)
    assert (cost < least + 0.02).all()
    again, fit = train(planted(), CPU)
    assert torch.equal(fit, fits[2]) and torch.equal(again.hidden, weights.hidden)


def test_rank_correlation() -> None:
    a = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 1, 2, 2], [1, 1, 1, 1]])
    b = torch.tensor([[1.0, 9, 10, 90], [4, 3, 2, 1], [0, 0, 7, 7], [1, 2, 3, 4]])
    torch.testing.assert_close(rank_correlation(a, b), torch.tensor([1.0, -1.0, 1.0, 0.0]))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "STEPS", 200)
    monkeypatch.setattr(forecast, "BATCH", 512)


def same(a: Profile, b: Profile) -> bool:
    return all(torch.equal(t, b.tensors()[name]) for name, t in a.tensors().items())


@pytest.mark.usefixtures("quick")
def test_a_profile_with_a_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = make("qwen3-128"), [tokens(2, 300), tokens(1, 256, 1)]
    profile, seen = calibrate(model, batches, source="noise"), list[tuple[int, int]]()
    found = add_forecast(profile, model, batches, "more noise", samples=300, progress=lambda *at: seen.append(at))
    assert seen == [(i, 4) for i in range(1, 5)] and found.source == "noise; forecast: more noise" and found.tokens == profile.tokens
    assert found.forecast_hidden is not None and found.forecast_hidden.shape == (2, 2, 256, 16) and found.forecast_fit is not None
    assert found.forecast_fit[..., 0].mean() > 0.2 and not found.forecast_fit.requires_grad
    assert all(torch.equal(t, found.tensors()[name]) for name, t in profile.tensors().items())
    monkeypatch.setattr(forecast, "HELD", 1)  # one layer at a time
    seen.clear()
    with torch.inference_mode():
        assert same(add_forecast(profile, model, batches, samples=300, progress=lambda *at: seen.append(at)), found)
    assert seen[-1] == (6, 6)
    assert not same(add_forecast(profile, model, batches, samples=299), found)


@pytest.mark.usefixtures("quick")
def test_calibrate_trains_on_its_own_batches() -> None:
    model, batches = make("llama"), [tokens(1, 256)]
    found = calibrate(model, iter(batches), forecast=True, source="noise")
    assert same(found, add_forecast(calibrate(model, batches), model, batches)) and found.source == "noise"
    assert calibrate(model, batches).forecast_fit is None


@pytest.mark.usefixtures("quick")
def test_layers_and_caps_of_other_families() -> None:
    for family in ("gemma2-softcap", "gpt-oss-sinks"):
        found = calibrate(make(family), [tokens(1, 256)], forecast=True)
        assert found.forecast_out is not None and [bool(out.any()) for out in found.forecast_out] == [False, True], family


def test_what_has_no_forecast() -> None:
    model = make("llama")
    profile = calibrate(model, [tokens(1, 20)])
    with pytest.raises(BadInputError, match=r"256 tokens or more; one has 255\. Give others"):
        add_forecast(profile, model, [tokens(1, 300), padded([tokens(1, 255), tokens(1, 300)], "right")])
    with pytest.raises(BadInputError, match="there are none"):
        add_forecast(profile, model, [])
    with pytest.raises(ArtefactError, match="Calibrate one on your model"):
        add_forecast(replace(profile, fingerprint="x"), model, [tokens(1, 300)])
