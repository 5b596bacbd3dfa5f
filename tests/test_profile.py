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
from kvstack.profile import FORMAT, SHAPES, VERSION, Profile

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
    parts = {"key_centre": centre, "value_centre": -centre, "fingerprint": "abc", "source": "numbers", "tokens": 7}
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
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(BadInputError, match="NaN or Inf"):
        calibrate(model, [tokens(1, 4)])


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    profile = example()
    profile.save(tmp_path / "p.safetensors")
    loaded = Profile.load(tmp_path / "p.safetensors")
    for name in SHAPES:
        assert torch.equal(getattr(loaded, name), getattr(profile, name))
    assert (loaded.fingerprint, loaded.source, loaded.tokens) == ("abc", "numbers", 7)


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
    artefact.write(path, {}, "kvstack.cache", VERSION, {})
    with pytest.raises(ArtefactError, match=r"a kvstack\.profile file is needed"):
        Profile.load(path)
