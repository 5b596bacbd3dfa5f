"""Profiles: what calibration finds, what a file keeps, and which models a profile is refused for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from kvstack import artefact
from kvstack.calibrate import calibrate
from kvstack.errors import ArtefactError, BadInputError
from kvstack.profile import FORMAT, OPTIONAL, SHAPES, VERSION, Profile

torch.set_num_threads(1)
SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)


def tiny(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()


def tokens(b: int, t: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (b, t), generator=torch.Generator().manual_seed(seed))


def example(**changes: Any) -> Profile:
    centre = torch.arange(3 * 2 * 16, dtype=torch.float32).reshape(3, 2, 16)
    mean = torch.linspace(-1, 1, 3 * 4 * 8).reshape(3, 4, 8)
    parts = {
        "key_centre": centre, "value_centre": -centre, "query_mean_real": mean, "query_mean_imag": mean.square(),
        "query_norm": mean + 3, "rope_frequency": torch.linspace(1, 0.1, 8), "fingerprint": "abc", "source": "numbers", "tokens": 7,
    }  # fmt: skip
    return Profile(**{**parts, **changes})


def cached(model: Any, ids: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache)
    return cache


@torch.inference_mode()
def test_means_of_one_batch() -> None:
    model, ids = tiny(), tokens(2, 9)
    profile = calibrate(model, [ids], source="random")
    cache = cached(model, ids)
    for i in range(3):
        torch.testing.assert_close(profile.key_centre[i], cache.layers[i].keys.mean((0, 2)))
        torch.testing.assert_close(profile.value_centre[i], cache.layers[i].values.mean((0, 2)))
    assert profile.tokens == 18 and profile.source == "random"
    profile.check(model)


def test_every_token_weighs_the_same_and_padding_nothing() -> None:
    model = tiny()
    long, short = tokens(1, 12, 1), tokens(1, 5, 2)
    apart = calibrate(model, [long, short])
    ids = torch.cat([long, torch.nn.functional.pad(short, (0, 7), value=3)])
    mask = (torch.arange(12) < torch.tensor([[12], [5]])).long()
    seen: list[int] = []
    together = calibrate(model, [{"input_ids": ids, "attention_mask": mask}], progress=seen.append)
    torch.testing.assert_close(together.key_centre, apart.key_centre)
    torch.testing.assert_close(together.value_centre, apart.value_centre)
    assert seen == [17] and apart.tokens == 17
    unmasked = calibrate(model, [ids])
    assert (unmasked.key_centre - apart.key_centre).abs().max() > 1e-3


def test_sliding_layers_stay_zero() -> None:
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=kinds)).eval()
    profile = calibrate(model, [tokens(1, 9)])
    zero = [not layer.any() for layer in profile.key_centre]
    assert zero == [True, False, True]
    assert [not norm.any() for norm in profile.query_norm] == zero


def test_unusable_batches_are_refused() -> None:
    model = tiny()
    with pytest.raises(BadInputError, match="no tokens"):
        calibrate(model, [])
    with pytest.raises(BadInputError, match="into a list"):
        calibrate(model, {"input_ids": tokens(1, 4)})  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="no tokens"):
        calibrate(model, [{"input_ids": tokens(1, 4), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}])
    with pytest.raises(BadInputError, match=r"\[B, T\]"):
        calibrate(model, [tokens(1, 4)[0]])
    for name, what in (("q", "queries"), ("k", "keys")):
        model = tiny()
        getattr(model.model.layers[2].self_attn, f"{name}_proj").weight.data[0, 0] = float("nan")
        with pytest.raises(BadInputError, match=f"{what}.*NaN or Inf"):
            calibrate(model, [tokens(1, 4)])


FORECAST = {
    "forecast_hidden": torch.linspace(-1, 1, 3 * 2 * 32 * 5).reshape(3, 2, 32, 5), "forecast_hidden_bias": torch.ones(3, 2, 5),
    "forecast_out": torch.full((3, 2, 5, 2), 2.0), "forecast_out_bias": torch.full((3, 2, 2), 3.0),
    "forecast_fit": torch.full((3, 2, 2), 0.5),
}  # fmt: skip


@pytest.mark.parametrize("optional", [{}, {"query_covariance": torch.ones(3, 4, 16, 16), **FORECAST}], ids=["required", "all"])
def test_a_file_keeps_everything(optional: dict[str, Tensor], tmp_path: Path) -> None:
    profile = example(**optional)
    profile.save(tmp_path / "p.safetensors")
    loaded = Profile.load(tmp_path / "p.safetensors")
    assert profile.tensors().keys() == loaded.tensors().keys() == SHAPES.keys() | optional.keys()
    assert optional.keys() <= OPTIONAL.keys() <= vars(profile).keys()
    for name, t in profile.tensors().items():
        assert torch.equal(getattr(loaded, name), t)
    assert (loaded.fingerprint, loaded.source, loaded.tokens) == ("abc", "numbers", 7)


def test_statistics_of_a_layer() -> None:
    mean = torch.polar(torch.tensor([[[0.5, 2.0]], [[0.0, 0.0]]]), torch.tensor([[[0.3, -2.0]], [[0.0, 0.0]]]))
    centre, norm = torch.zeros(2, 1, 4), torch.tensor([[[1.0, 2.0]], [[0.0, 4.0]]])
    covariance = torch.arange(32.0).reshape(2, 1, 4, 4)
    profile = Profile(centre, centre, mean.real, mean.imag, norm, torch.ones(2), "abc", "", 1, covariance)
    torch.testing.assert_close(profile.concentration(), torch.tensor([[[0.5, 1.0]], [[0.0, 0.0]]]))
    stats = profile.layer(0)
    assert torch.equal(stats.mean, mean[0]) and torch.equal(stats.norm, norm[0]) and stats.covariance is not None
    assert torch.equal(profile.layer(1).covariance, covariance[1]) and example().layer(2).covariance is None


def test_the_forecast_of_a_layer() -> None:
    weights = example(**FORECAST).forecast(1)
    assert weights is not None and example().forecast(1) is None
    for name in ("hidden", "hidden_bias", "out", "out_bias"):
        assert torch.equal(getattr(weights, name), FORECAST[f"forecast_{name}"][1])


@pytest.mark.parametrize(
    "changes",
    [
        {"forecast_fit": None},
        {"forecast_hidden": None},
        {"forecast_hidden": torch.zeros(3, 2, 16, 5)},
        {"forecast_hidden_bias": torch.zeros(3, 2, 4)},
        {"forecast_out": torch.zeros(3, 2, 5, 3)},
        {name: torch.zeros(3, 2, 3) for name in ("forecast_out_bias", "forecast_fit")},
        {"forecast_out_bias": torch.full((3, 2, 2), float("inf"))},
    ],
)
def test_half_a_forecast_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ArtefactError, match="Calibrate again"):
        example(**{**FORECAST, **changes})


def test_another_model_is_refused() -> None:
    profile = calibrate(tiny(0), [tokens(1, 8)])
    profile.check(tiny(0))
    with pytest.raises(ArtefactError, match="Calibrate one on your model"):
        profile.check(tiny(1))


@pytest.mark.parametrize(
    "changes",
    [
        {"key_centre": torch.zeros(3, 2)},
        {"key_centre": torch.zeros(3, 2, 8)},
        {"value_centre": torch.zeros(2, 2, 16)},
        {"value_centre": torch.zeros(3, 2, 16, dtype=torch.float64)},
        {"value_centre": torch.full((3, 2, 16), float("nan"))},
        {"query_norm": torch.zeros(3, 2, 8)},
        {"query_covariance": torch.zeros(3, 4, 16, 8)},
        {"rope_frequency": torch.zeros(16)},
        {name: torch.zeros(3, 2, 8) for name in ("key_centre", "value_centre")},
    ],
)
def test_wrong_tensors_are_refused(changes: dict[str, Tensor]) -> None:
    with pytest.raises(ArtefactError, match="Calibrate again"):
        example(**changes)


def test_a_file_with_another_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p"
    about = {"layout": {"key_centre": ["Hkv", "D"]}, "fingerprint": "abc", "source": "", "tokens": 1}
    artefact.write(path, {"key_centre": torch.zeros(2, 16)}, FORMAT, VERSION, about)
    with pytest.raises(ArtefactError, match="Calibrate again"):
        Profile.load(path)
    whole = example().tensors()
    for tensors in ({n: t for n, t in whole.items() if n != "query_norm"}, whole | {"more": torch.zeros(1)}):
        artefact.write(path, tensors, FORMAT, VERSION, about | {"layout": {n: [] for n in tensors}})
        with pytest.raises(ArtefactError, match="Calibrate again"):
            Profile.load(path)
    artefact.write(path, whole, FORMAT, 1, about)
    with pytest.raises(ArtefactError, match="version 1, and this kvstack reads version 2"):
        Profile.load(path)
    artefact.write(path, {}, "kvstack.cache", VERSION, {})
    with pytest.raises(ArtefactError, match=r"a kvstack\.profile file is needed"):
        Profile.load(path)
