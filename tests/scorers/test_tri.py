"""`tri` folded is the published series: a loop over 17 offsets in float64, on keys whose RoPE is inverted at their true positions."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvstack.rope import Rope
from kvstack.scorers import Layer, QueryStats, Tri, View
from kvstack.scorers.tri import OFFSETS, TriScorer

torch.set_num_threads(1)

CENTRES = Path(__file__).parents[3] / "shared/data/qwen3_8b_q_centers.safetensors"
D = 32


def plain(theta: float = 10_000.0, head_dim: int = D) -> Rope:
    return Rope.half(head_dim, theta)


def llama3() -> Rope:
    """Frequencies cut by 8 below a wavelength, smoothly between: no power of any base."""
    base = plain(500_000.0)
    turns = 8192 * base.frequency / (2 * math.pi)
    smooth = ((turns - 1) / 3).clamp(0, 1)
    return Rope(base.pairs, base.frequency * (smooth + (1 - smooth) / 8), base.scale)


def yarn() -> Rope:
    base = llama3()
    return Rope(base.pairs, base.frequency, torch.full_like(base.scale, 0.1 * math.log(32) + 1))


def partial() -> Rope:
    """The first half of the head turns, in halves; the rest makes bands that do not."""
    f = torch.arange(D // 4)
    real, frequency = (
        torch.cat([f, D // 2 + f]),
        torch.cat([plain(head_dim=D // 2).frequency, torch.zeros(D // 4, dtype=torch.float64)]),
    )
    return Rope(torch.stack([real, real + D // 4]), frequency, torch.ones(D // 2, dtype=torch.float64))


def interleaved() -> Rope:
    base = plain()
    return Rope(torch.arange(D).view(-1, 2).T, base.frequency, base.scale)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal(stats: QueryStats, rope: Rope, cached: Tensor, position: Tensor, seen: int) -> Tensor:
    """Scores `[Hq, N]` float64 of one row: each query head with the keys `cached [Hq, N, D]` of its KV head, at `position [N]`."""
    x = cached.double()
    angle = position.double()[:, None] * rope.frequency
    cos, sin = angle.cos(), angle.sin()
    turned_re, turned_im = x[..., rope.pairs[0]] / rope.scale, x[..., rope.pairs[1]] / rope.scale
    re, im = turned_re * cos + turned_im * sin, turned_im * cos - turned_re * sin  # RoPE inverted
    length, phase = (re.square() + im.square()).sqrt(), torch.atan2(im, re)
    mean = stats.mean.to(torch.complex128)[:, None]
    norm = stats.norm.double()[:, None]
    total = torch.zeros(cached.shape[:2], dtype=torch.float64)
    for offset in (2**i for i in range(17)):
        distance = (seen - position + offset).double()[:, None]
        series = mean.abs() * length * torch.cos(rope.frequency * distance + mean.angle() - phase)
        rest = (norm - mean.abs()) * length
        total += (rope.scale**2 * (series + rest)).sum(-1)
    return total / 17


def make_view(key: Tensor, seen: Tensor, query_heads: int) -> View:
    """The keys `[B, H, N, D]` as candidates, all valid but the last two of the first row, and four more of its first KV head."""
    b, h, n, d = key.shape
    valid = torch.ones(b, h, n, dtype=torch.bool)
    valid[0, :, -2:] = valid[0, 0, :4] = False
    none = torch.zeros(b, 0, dtype=torch.long)
    return View(
        key=key, value=None, valid=valid, age=torch.arange(n - 1, -1, -1).expand(b, h, n), near_key=key[:, :, :0],
        near_valid=none.bool(), near_age=none, queries=key.new_zeros(b, query_heads, 0, d), asked=none.bool(),
        records=key.new_zeros(b, h, n, 0), seen=seen, scale=d**-0.5,
    )  # fmt: skip


def check(stats: QueryStats, rope: Rope, heads: int, seed: int = 0) -> None:
    """Raw and final scores of two rows, short and long, against the literal series."""
    hq, head_dim, n = len(stats.mean), rope.pairs.numel(), 40
    seen = torch.tensor([60, 100_000])
    position = torch.stack([torch.arange(10, 10 + n), torch.randperm(100_000, generator=torch.Generator().manual_seed(seed))[:n]])
    key = gaussian(2, heads, n, head_dim, seed=seed + 1) + 2 * gaussian(heads, 1, head_dim, seed=seed + 2)
    cached = rope.turn(key, position[:, None])
    view = make_view(cached, seen, hq)
    scorer = Tri(8).build(Layer(head_dim, heads, hq // heads, rope, torch.device("cpu"), stats=stats))
    assert isinstance(scorer, TriScorer)
    raw, final = scorer.raw(view).flatten(1, 2), scorer.score(view)
    groups = hq // heads
    for b, h in product(range(2), range(heads)):
        own, group = view.valid[b, h], slice(h * groups, (h + 1) * groups)
        truth = literal(stats, rope, cached[b].repeat_interleave(groups, 0), position[b], int(seen[b]))[group][:, own]
        assert (raw[b, group][:, own] - truth).abs().max() < 1e-5 * truth.abs().max()
        z = (truth - truth.mean(-1, keepdim=True)) / truth.std(-1, correction=0, keepdim=True)
        assert (final[b, h, own] - z.amax(0)).abs().max() < 1e-4


@pytest.mark.parametrize("make", [plain, llama3, yarn, partial, interleaved])
def test_fold_is_the_series(make: Callable[[], Rope]) -> None:
    rope, hq, bands = make(), 6, D // 2
    mean = torch.complex(gaussian(hq, bands, seed=3), gaussian(hq, bands, seed=4))
    norm = mean.abs() + gaussian(hq, bands, seed=5).abs()
    for heads in (2, 6):
        check(QueryStats(mean.to(torch.complex64), norm.float()), rope, heads)


@pytest.mark.skipif(not CENTRES.is_file(), reason="the centres of Qwen3-8B are not here")
@pytest.mark.parametrize("layer", [0, 17, 35])
def test_fold_is_the_series_on_real_centres(layer: int) -> None:
    tensors = load_file(CENTRES)
    mean = torch.complex(tensors["q_mean_real"][layer], tensors["q_mean_imag"][layer])
    check(QueryStats(mean, tensors["q_abs_mean"][layer]), plain(1e6, 128), heads=8, seed=layer)


def test_coordinates_that_do_not_turn_are_a_wanted() -> None:
    """Bands of frequency 0 with no rest: the score is the product of mean and key, wherever the query is."""
    rope = partial()
    still = rope.frequency == 0
    mean = torch.complex(gaussian(2, D // 2, seed=6), gaussian(2, D // 2, seed=7)).to(torch.complex64) * still
    view = make_view(gaussian(2, 2, 9, D, seed=8).float(), torch.tensor([9, 5000]), 2)
    got = TriScorer(QueryStats(mean, mean.abs()), rope, view.key.shape[1]).raw(view)[:, :, 0]
    wanted = (view.key * rope.vectors(mean)[None, :, None]).sum(-1)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[0][view.valid[0]], wanted[0][view.valid[0]], rtol=1e-5, atol=1e-5)


def test_offsets_are_published() -> None:
    assert OFFSETS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
