"""The rotation: orthonormal, dense, seeded, shared."""

import pytest
import torch

from kvstack.codecs.rotation import rotation

CPU = torch.device("cpu")


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 192, 256])
def test_orthonormal_and_every_input_reaches_every_output(head_dim: int) -> None:
    r = rotation(head_dim, 3, CPU)
    assert r.dtype == torch.float32
    assert torch.allclose(r @ r.T, torch.eye(head_dim), atol=2e-6)
    size = r.abs() * head_dim**0.5
    if head_dim & (head_dim - 1) == 0:
        assert torch.allclose(size, torch.ones_like(size))
    assert size.min() > 0.2 and size.max() < 1.42


def test_signs_are_seeded() -> None:
    plain = rotation(192, None, CPU)
    signs = [(rotation(192, seed, CPU) * plain).sum(0).sign() for seed in (0, 1)]
    assert torch.allclose(rotation(192, 0, CPU), plain * signs[0])
    for s in signs:
        assert 60 < (s > 0).sum() < 132  # 96 +- 5 standard deviations
    assert not torch.equal(*signs)


def test_signs_never_change() -> None:
    """Saved caches depend on them."""
    signs = (rotation(16, 0, CPU)[0] > 0).int().tolist()
    assert signs == [0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1]


def test_one_tensor_for_all_layers() -> None:
    assert rotation(64, 5, CPU) is rotation(64, 5, torch.device("cpu"))
    with torch.inference_mode():
        first = rotation(64, 1234, CPU)
    assert not first.is_inference()  # or training could not use it later
