"""The rotation: orthonormal, block-diagonal where it must be, seeded, shared."""

import pytest
import torch

from kvstack.codecs.rotation import rotation

CPU = torch.device("cpu")


@pytest.mark.parametrize(("head_dim", "block"), [(8, 8), (64, 64), (80, 16), (96, 32), (128, 128), (192, 64), (256, 256)])
def test_orthonormal_and_block_diagonal(head_dim: int, block: int) -> None:
    r = rotation(head_dim, 3, CPU)
    assert r.dtype == torch.float32
    assert torch.allclose(r @ r.T, torch.eye(head_dim), atol=1e-6)
    tiles = r.unflatten(0, (-1, block)).unflatten(-1, (-1, block))  # [n, block, n, block]
    for i in range(head_dim // block):
        for j in range(head_dim // block):
            size = block**-0.5 if i == j else 0.0
            assert torch.allclose(tiles[i, :, j].abs(), torch.full((block, block), size))


def test_signs_are_seeded_and_of_each_block() -> None:
    plain = rotation(192, None, CPU)
    assert torch.equal(plain[::64].sum(0) > 0, torch.ones(192, dtype=torch.bool))  # first rows of H are all +
    signs = [(rotation(192, seed, CPU) * plain).sum(0).sign() for seed in (0, 1)]
    assert torch.equal(rotation(192, 0, CPU), plain * signs[0])
    for s in signs:
        assert 60 < (s > 0).sum() < 132  # 96 +- 5 standard deviations
        assert not torch.equal(s[:64], s[64:128])
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
