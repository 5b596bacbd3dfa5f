"""The rotation inside kernels is the codecs' own: exactly so for whole numbers, and for queries of any strides."""

import math

import pytest
import torch
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.codecs.fp8 import Fp8Codec
from kvstack.codecs.polar import PolarCodec
from kvstack.codecs.rotation import rotation
from kvstack.codecs.turboquant import TurboQuantCodec
from kvstack.errors import RecipeError
from kvstack.kernels.rotate import project, signs

torch.set_num_threads(1)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, GROUPS = 2, 3
SIZES = [64, 128, 256]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def polar(head_dim: int, centre: Tensor | None = None) -> PolarCodec:
    return PolarCodec(rotation(head_dim, 5, DEVICE), 4, centre=centre)


def queries(batch: int, steps: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """`[B, Hq, T, D]` as a projection leaves it, inside a larger tensor of NaN."""
    room = torch.full((batch, steps + 1, 2 * HEADS * GROUPS, head_dim + 8), math.nan, dtype=dtype, device=DEVICE)
    q = room[:, 1:, ::2, 8:].transpose(1, 2)
    q.copy_(draw(head_dim + steps, batch, HEADS * GROUPS, steps, head_dim))
    return q


def error(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("head_dim", SIZES)
def test_queries_go_where_the_codec_projects_them(head_dim: int, steps: int, dtype: torch.dtype) -> None:
    q, centre, factor = queries(3, steps, head_dim, dtype), draw(7, HEADS, head_dim), 0.3
    codec = polar(head_dim, centre)
    found, bias = project(q, signs(codec), centre, factor, HEADS)
    grouped = q.float().reshape(3, HEADS, GROUPS * steps, head_dim) * factor
    assert found.shape == (3 * HEADS, GROUPS * steps, head_dim) and found.dtype == bias.dtype == torch.float32
    assert error(found, codec.project(grouped).flatten(0, 1)) < 1e-6
    assert error(bias, (grouped * centre[:, None]).sum(-1).flatten(0, 1)) < 1e-6


@pytest.mark.parametrize("head_dim", SIZES)
def test_without_rotation_and_centre_queries_are_scaled(head_dim: int) -> None:
    q = queries(2, 1, head_dim, torch.float16)
    assert signs(Fp8Codec(head_dim)) is None
    found, bias = project(q, None, None, 0.25, HEADS)
    assert torch.equal(found, 0.25 * q.float().reshape(2 * HEADS, GROUPS, head_dim)) and not bias.any()


@pytest.mark.parametrize("head_dim", SIZES)
def test_a_unit_vector_gives_its_column_of_hadamards_matrix(head_dim: int) -> None:
    h = torch.ones(1, 1)
    while len(h) < head_dim:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    some = [0, 1, 2, head_dim // 2 - 1, head_dim // 2, head_dim - 1]
    q = torch.eye(head_dim, device=DEVICE)[some].reshape(1, len(some), 1, head_dim)
    found, _ = project(q, torch.ones(head_dim, device=DEVICE), None, 1.0, 1)
    assert torch.equal(found[0].cpu(), h[:, some].T)


@pytest.mark.parametrize("head_dim", SIZES)
def test_signs_are_those_of_the_codec(head_dim: int) -> None:
    codec = polar(head_dim)
    found = signs(codec)
    assert found is not None and codec.transform is not None and found.is_contiguous()
    plain = rotation(head_dim, None, DEVICE) * head_dim**0.5  # of +1 and -1
    assert torch.allclose(plain * found, codec.transform, rtol=1e-6) and len(found.unique()) == 2


def turned(head_dim: int) -> Tensor:
    """Orthogonal, but with no signs to speak of."""
    return torch.linalg.qr(draw(1, head_dim, head_dim).cpu())[0].to(DEVICE)


@pytest.mark.parametrize(
    "codec",
    [
        PolarCodec(turned(128), 4),
        PolarCodec(rotation(128, 5, DEVICE).roll(1, 0), 4),  # rows in another order
        PolarCodec(2 * rotation(128, 5, DEVICE), 4),
        TurboQuantCodec(128, 4, "gaussian", 0, DEVICE),  # rotated, and with a sketch below
    ],
    ids=["another rotation", "another order", "another size", "another shape"],
)
def test_other_transforms_are_refused(codec: Codec) -> None:
    with pytest.raises(RecipeError, match=r"no other rotation .* `polar` codec"):
        signs(codec)
