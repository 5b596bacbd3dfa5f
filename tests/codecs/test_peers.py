"""The peers: FP8, min-max integers, KIVI and vLLM's `turboquant_4bit_nc` are no worse than what they claim to be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstack.codecs import Codec, Context, Fp8, Kivi, MinMax, Precision, Side, TurboQuant4bitNC
from kvstack.codecs.lloyd import lloyd_max
from kvstack.codecs.minmax import dequantise, quantise

torch.set_num_threads(1)

CPU = torch.device("cpu")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(precision: Precision, side: Side = "key", head_dim: int = 128) -> Codec:
    return precision.build(side, Context(head_dim, 1, torch.float32, CPU))


def coded(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x))


def distortion(x: Tensor, x_hat: Tensor) -> float:
    return float((x - x_hat).square().sum() / x.square().sum())


@given(st.integers(-60, 60), st.integers(0, 1000))
def test_fp8_rounds_to_three_bits(exponent: int, seed: int) -> None:
    x = gaussian(1, 1, 16, 64, seed=seed) * 2.0**exponent
    error, largest = (coded(build(Fp8(), head_dim=64), x) - x).abs(), x.abs().amax(-1, keepdim=True)
    assert (error <= torch.maximum(x.abs() / 16, largest / 448 * 2**-9)).all()  # half a step of normal and of subnormal numbers
    assert distortion(x, coded(build(Fp8(), head_dim=64), x)) < 1e-3


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(0, 1000), st.floats(-1e4, 1e4), st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 1e4]))
def test_integers_are_within_half_a_step(bits: int, seed: int, mean: float, spread: float) -> None:
    x = mean + spread * gaussian(4, 64, seed=seed)
    x_hat = dequantise(*quantise(x, bits, -1), dim=-1)
    low, high = x.aminmax(dim=-1, keepdim=True)
    step = torch.maximum((high - low) / (2**bits - 1), x.abs().amax(-1, keepdim=True) / 32_000)
    # The scale is bfloat16, off by up to 2^-8: of the step, and of the whole range where it was rounded down.
    slack = step * (0.51 + 2**bits * 2**-8) + x.abs() * 1e-6 + torch.finfo(torch.float32).tiny
    assert ((x - x_hat).abs() <= slack).all()


def test_integers_of_gaussian_vectors() -> None:
    """A range of about 5.4 standard deviations in 15 steps: step^2 / 12."""
    x = gaussian(1, 1, 4096, 128)
    step = (x.amax(-1) - x.amin(-1)) / 15
    found = float((x - coded(build(MinMax()), x)).square().mean() / (step.square() / 12).mean())
    assert found == pytest.approx(1, rel=0.02)


def test_kivi_keys_do_not_see_channel_means_and_scales() -> None:
    x, channels = gaussian(1, 1, 256, 128), 100 * gaussian(128, seed=1)
    alone = distortion(x, coded(build(Kivi()), x))
    assert alone < 0.2
    shifted = coded(build(Kivi()), x * channels + 30 * channels)
    assert float(((shifted - 30 * channels) / channels - x).square().mean()) == pytest.approx(alone, rel=0.1)
    assert float(((coded(build(MinMax(2)), x * channels + 30 * channels) - 30 * channels) / channels - x).square().mean()) > 50 * alone


def test_kivi_values_do_not_see_token_scales() -> None:
    x = gaussian(1, 1, 256, 128)
    codec, tokens = build(Kivi(), "value"), 2.0 ** torch.arange(-20, 12).repeat(8)[:, None]
    assert torch.equal(coded(codec, x * tokens), coded(codec, x) * tokens)
    x[..., 7] *= 1000  # an outlier spoils its own group of channels only
    assert distortion(x[..., 32:], coded(codec, x)[..., 32:]) < 0.2


@pytest.mark.parametrize("group", [8, 32, 64])
def test_kivi_groups(group: int) -> None:
    key, value = build(Kivi(group=group), "key"), build(Kivi(group=group), "value")
    assert (key.block, value.block) == (group, 1)
    assert key.bytes_per_token == value.bytes_per_token == 32 + 4 * 128 / group


def test_kivi_takes_whole_blocks() -> None:
    with pytest.raises(AssertionError, match="no whole blocks of 32"):
        build(Kivi()).encode(gaussian(1, 1, 33, 128))


def test_turboquant_4bit_nc() -> None:
    x = gaussian(1, 1, 4096, 128)
    key, value = build(TurboQuant4bitNC(), "key"), build(TurboQuant4bitNC(), "value")
    assert key.bytes_per_token + value.bytes_per_token == 134
    assert torch.allclose(coded(key, x).norm(dim=-1), x.norm(dim=-1), rtol=2**-8)
    assert distortion(x, coded(key, x)) == pytest.approx(lloyd_max(4, 128).distortion, rel=0.03)
    assert key.transform is not None and torch.equal(key.transform, key.transform.T)  # H without signs is symmetric
    assert value.transform is None
    assert torch.equal(coded(value, x), coded(build(MinMax()), x))
