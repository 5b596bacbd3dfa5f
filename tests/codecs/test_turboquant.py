"""The negative control: the QJL stage is unbiased, has the variance that theory gives it, and is dominated at equal bits."""

import pytest
import torch
from torch import Tensor

from kvstack.codecs import Context, Polar, Precision, TurboQuant, TurboQuant4bitNC
from kvstack.codecs.lloyd import lloyd_max
from kvstack.codecs.polar import PolarCodec
from kvstack.codecs.turboquant import TurboQuantCodec

torch.set_num_threads(1)

CPU = torch.device("cpu")
D = 128


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(precision: Precision) -> tuple[float, float]:
    """Slope of <q, x_hat> on <q, x>, and variance of their difference in units of |q|^2 |x|^2 / D."""
    codec = precision.build("key", Context(D, 1, torch.float32, CPU))
    x, q = gaussian(1, 1, 4096, D), gaussian(1, 1, 1024, D, seed=1)
    size = q.norm(dim=-1)[..., None] * x.norm(dim=-1)[..., None, :] / D**0.5
    truth, estimate = q @ x.mT / size, codec.project(q) @ codec.latent(codec.encode(x)).mT / size
    return float((truth * estimate).mean() / truth.square().mean()), float((truth - estimate).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gaussian_sketch_is_unbiased_and_dominated(bits: int) -> None:
    slope, variance = logits(TurboQuant(bits))
    assert slope == pytest.approx(1, abs=0.01)  # over one sketch; it is the mean over sketches that is 1
    assert variance == pytest.approx(torch.pi / 2 * lloyd_max(bits - 1, D).distortion, rel=0.05)
    ours_slope, ours = logits(Polar(bits, scale="unbiased"))
    assert ours_slope == pytest.approx(1, abs=0.002)
    assert variance > 3 * ours


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_orthogonal_sketch_is_unbiased_and_dominated(bits: int) -> None:
    slope, variance = logits(TurboQuant(bits, sketch="orthogonal"))
    assert slope == pytest.approx(1, abs=0.005)
    assert variance == pytest.approx((torch.pi / 2 - 1) * lloyd_max(bits - 1, D).distortion, rel=0.05)
    assert variance > 1.4 * logits(Polar(bits, scale="unbiased"))[1]


@pytest.mark.parametrize("sketch", ["gaussian", "orthogonal"])
def test_mean_over_sketches_is_the_vector(sketch: str) -> None:
    x = gaussian(1, 1, 16, 8)
    codecs = [TurboQuant(2, sketch, seed).build("key", Context(8, 1, torch.float32, CPU)) for seed in range(300)]
    mean = torch.stack([c.decode(c.encode(x)) for c in codecs]).mean(0)
    assert (mean - x).square().sum() / x.square().sum() < 2 * torch.pi / 2 * lloyd_max(1, 8).distortion / 300
    assert (mean * x).sum() / x.square().sum() == pytest.approx(1, abs=0.012)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_equal_bits_and_one_more_scalar(bits: int) -> None:
    context = Context(D, 1, torch.float32, CPU)
    for side in ("key", "value"):
        assert TurboQuant(bits).build(side, context).bytes_per_token == Polar(bits, bits).build(side, context).bytes_per_token + 2


def test_peers_have_the_codebook_of_their_papers() -> None:
    context = Context(D, 1, torch.float32, CPU)
    with_sketch = TurboQuant(4).build("key", context)
    assert isinstance(with_sketch, TurboQuantCodec)
    for codec, bits in ((with_sketch.first, 3), (TurboQuant4bitNC().build("key", context), 4)):
        assert isinstance(codec, PolarCodec)
        assert codec.levels.tolist() == pytest.approx(lloyd_max(bits, D).levels)


def test_layers_and_sides_share_one_transform() -> None:
    contexts = [Context(64, 2, torch.bfloat16, torch.device("cpu")) for _ in range(2)]
    codecs = [TurboQuant().build(side, c) for side in ("key", "value") for c in contexts]
    assert len({id(c.transform) for c in codecs}) == 1
    assert codecs[0].transform is not None and codecs[0].transform.shape == (128, 64)
