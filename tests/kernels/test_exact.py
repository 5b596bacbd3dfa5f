"""Attention over exact tokens in plain Triton: equal to float64 attention, whatever the mask, and indifferent to what is not seen."""

import math

import pytest
import torch
from torch import Tensor

from kvstack.kernels.exact import BLOCK, attend_exact

torch.set_num_threads(1)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float16: 3e-4, torch.bfloat16: 3e-4, torch.float32: 3e-6}
HEADS = 2


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def poison(x: Tensor, seen: Tensor) -> Tensor:
    """`x [B, H, S, D]`, with NaN where no query of a row sees the slot."""
    return x.masked_fill(~seen.any(1)[:, None, :, None], math.nan)


def truth(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Means `[B * H, R, D]` and base-2 log sums `[B * H, R]` in float64; zero and -inf where nothing is seen."""
    b, h, s, d = k.shape
    grouped = q.double().reshape(b, h, -1, d)
    x = grouped @ k.double().mT * scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    hidden = ~seen.expand(b, q.shape[2], s)[:, None, None].expand(b, h, q.shape[1] // h, q.shape[2], s).reshape(x.shape)
    x = x.masked_fill(hidden, -math.inf)
    mean = torch.softmax(x, -1).nan_to_num(0) @ v.double()
    return mean.flatten(0, 1), x.logsumexp(-1).flatten(0, 1) / math.log(2)


def merged(out: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks of `attend_exact` as one."""
    assert not bool(out.isnan().any() | lse2.isnan().any())
    assert not out[lse2 == -math.inf].any()
    lse = lse2.double() * math.log(2)
    weights = torch.softmax(lse, 1).nan_to_num(0)
    return (weights[..., None] * out).sum(1), lse.logsumexp(1) / math.log(2)


def check(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float | None = None) -> None:
    """Compare; unseen slots are poisoned on the way."""
    scale = q.shape[-1] ** -0.5
    expected, expected_lse = truth(q, k, v, seen, scale, softcap)
    mean, lse = merged(*attend_exact(q, *(poison(x, seen.expand(len(q), -1, -1)) for x in (k, v)), seen, scale, softcap))
    bound = BOUNDS[k.dtype]
    assert float((mean - expected).norm() / expected.norm()) < bound
    some = expected_lse.isfinite()
    assert torch.equal(some, lse.isfinite()) and float((lse - expected_lse)[some].abs().max()) < 10 * bound


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("groups", [1, 4, 7, 16])
def test_query_rows_and_types(groups: int, steps: int, dtype: torch.dtype) -> None:
    b, s, d = 2, 100, 64
    seen = draw(4, b, steps, s) > 0.5
    check(
        draw(1, b, HEADS * groups, steps, d, dtype=dtype),
        draw(2, b, HEADS, s, d, dtype=dtype),
        draw(3, b, HEADS, s, d, dtype=dtype),
        seen,
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("slots", [1, BLOCK, BLOCK + 1, 300])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sizes(head_dim: int, slots: int, softcap: float | None) -> None:
    q, k, v = (draw(i, 1, n, m, head_dim, dtype=torch.bfloat16) for i, (n, m) in enumerate(((8, 2), (HEADS, slots), (HEADS, slots))))
    seen = draw(4, 1, 2, slots) > 0
    seen[..., 0] = True
    check(3 * q, k, v, seen, softcap)


@pytest.mark.parametrize("shape", [(1, 1, 70), (2, 1, 70), (1, 3, 70)])
def test_a_mask_may_be_shared(shape: tuple[int, int, int]) -> None:
    check(draw(1, 2, 4, 3, 64), draw(2, 2, HEADS, 70, 64), draw(3, 2, HEADS, 70, 64), draw(4, *shape) > 0)


def test_queries_that_see_nothing() -> None:
    seen = torch.zeros(2, 3, 150, dtype=torch.bool, device=DEVICE)
    q, k, v = draw(1, 2, 4, 3, 64), draw(2, 2, HEADS, 150, 64), draw(3, 2, HEADS, 150, 64)
    out, lse2 = attend_exact(q, poison(k, seen), poison(v, seen), seen, 1.0, None)
    assert not out.any() and bool((lse2 == -math.inf).all())
    seen[0, 1, 100] = True  # one query of one row sees one slot
    check(q, k, v, seen)


def test_no_slots() -> None:
    nothing = draw(2, 2, HEADS, 0, 64)
    seen = torch.ones(2, 1, 0, dtype=torch.bool, device=DEVICE)
    out, lse2 = attend_exact(draw(1, 2, 4, 3, 64), nothing, nothing, seen, 1.0, None)
    assert out.shape == (2 * HEADS, 0, 6, 64) and lse2.shape == (2 * HEADS, 0, 6)


def test_any_strides() -> None:
    """Queries and keys as projections leave them, values in a larger poisoned store, a window of a mask."""
    b, t, s, d = 2, 2, 90, 64
    q, k = draw(1, b, t, 6, d).transpose(1, 2), draw(2, b, s, HEADS, d).transpose(1, 2)
    store = torch.full((b, HEADS + 1, 200, 2 * d), math.nan, device=DEVICE)
    v = store[:, 1:, 50 : 50 + s, d:]
    v.copy_(draw(3, b, HEADS, s, d))
    seen = (draw(4, b, s, t) > 0).transpose(1, 2)
    scale = d**-0.5
    mean, _ = merged(*attend_exact(q, k, v, seen, scale, None))
    expected, _ = truth(q, k, v, seen, scale, None)
    assert float((mean - expected).norm() / expected.norm()) < BOUNDS[torch.float32]


def test_large_logits_and_values() -> None:
    """Sixteen-bit vectors are taken as they are: logits in the hundreds are exact, and values keep the range of bfloat16."""
    q, k, v = (draw(i, 1, n, m, 64, dtype=torch.bfloat16) for i, (n, m) in enumerate(((4, 1), (HEADS, 200), (HEADS, 200))))
    check(200 * q, k, 1e30 * v, torch.ones(1, 1, 200, dtype=torch.bool, device=DEVICE))


def test_the_same_again_is_the_same() -> None:
    args = (draw(1, 2, 8, 3, 128), draw(2, 2, HEADS, 200, 128), draw(3, 2, HEADS, 200, 128), draw(4, 2, 3, 200) > 0, 0.1, 20.0)
    assert all(torch.equal(x, y) for x, y in zip(attend_exact(*args), attend_exact(*args), strict=True))
