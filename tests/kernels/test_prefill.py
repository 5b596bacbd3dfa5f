"""Prefill over pages in plain Triton: equal to float64 attention over what `pages.read` gives.

Every pool is poisoned: pages nobody owns, and what lies behind the ends of rows, have random codes and scales that are NaN.
"""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from truth import error, truth

from kvstack.codecs import Context, Polar
from kvstack.codecs.polar import PolarCodec
from kvstack.kernels.pages import PAGE, Format, Pages, read, write
from kvstack.kernels.prefill import prefill_pages

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # in Triton's interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = 2
PAIRS = [
    (d, k, v)
    for d, k, v in itertools.product((64, 128, 256), (2, 3, 4, 8), (2, 3, 4, 8))
    if (d, k) != (64, 3) and (k != v if d == 128 else (k + v) % 5 == 1)
]


@dataclass(frozen=True)
class Case:
    """Arguments of `prefill_pages`."""

    q: Tensor
    bias: Tensor
    pages: Pages
    k_levels: Tensor
    v_levels: Tensor


def case(f: Format, rows: int, lengths: tuple[int, ...], k_scale: float = 0.02, v_scale: float = 1.0) -> Case:
    """Random codes and queries; scales of neighbouring pages differ by powers of two."""
    g = torch.Generator().manual_seed(rows + sum(lengths))
    batch, segments, counts = len(lengths), len(lengths) * HEADS, [-(-n // PAGE) for n in lengths]
    ids = torch.randperm(sum(counts) + 2, generator=g).int()
    table = ids[-1].repeat(batch, max(counts) + 1)  # behind a row's end: a page that nobody owns
    for row, own in zip(table, ids[: sum(counts)].split(counts), strict=True):
        row[: len(own)] = own
    pool = torch.randint(256, (len(ids), HEADS, f.nbytes), dtype=torch.uint8, generator=g)
    pool[..., f.scale_offset :] = torch.full((PAGE * 2,), math.nan).bfloat16().view(torch.uint8)
    pages = Pages(f, pool.to(DEVICE), table.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    size = (batch, HEADS, max(counts) * PAGE)
    # As E4M3 numbers: below 2, never NaN, subnormal ones too.
    k, v = (
        torch.randint(2 ** min(b, 7), (*size, f.head_dim), dtype=torch.uint8, generator=g) & (0x3F if b == 8 else 0xFF)
        for b in (f.k, f.v)
    )
    k, v = (x | (torch.randint(2, x.shape, dtype=torch.uint8, generator=g) << 7 if b == 8 else 0) for x, b in ((k, f.k), (v, f.v)))
    power = 2.0 ** (torch.arange(size[-1]) // PAGE % 3)
    scales = (torch.rand(*size, 2, generator=g) + 0.5) * torch.tensor([k_scale, v_scale]) * power[:, None]
    write(pages, k.to(DEVICE), v.to(DEVICE), scales.bfloat16().to(DEVICE), torch.zeros(batch, dtype=torch.int32), pages.lengths)
    books = (Polar(b, 1).build("key", Context(f.head_dim, 1, torch.float32, torch.device(DEVICE))) for b in (min(f.k, 4), min(f.v, 4)))
    levels = [codec.levels for codec in books if isinstance(codec, PolarCodec)]
    q, bias = torch.randn(segments, rows, f.head_dim, generator=g), torch.randn(segments, rows, generator=g)
    return Case(q.to(DEVICE), bias.to(DEVICE), pages, *levels)


def run(c: Case, splits: int = 1, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Means `[B * H, R, D]` and base-2 log sums `[B * H, R]` of the merged splits, in float64."""
    segments, rows, d = c.q.shape
    out = torch.full((segments, splits, rows, d), math.nan, device=DEVICE)
    lse2 = torch.full((segments, splits, rows), math.nan, device=DEVICE)
    prefill_pages(c.q, c.bias, c.pages, c.k_levels, c.v_levels, out, lse2, softcap)
    assert torch.equal((out == 0).all(-1), lse2.isneginf())
    lse = lse2.double() * math.log(2)
    return (torch.softmax(lse, 1).nan_to_num(0)[..., None] * out).sum(1), lse.logsumexp(1) / math.log(2)


def check(c: Case, splits: int = 1, softcap: float | None = None, bound: float = 1e-3) -> None:
    (mean, total), (expected, expected_total) = run(c, splits, softcap), truth(c, softcap)
    assert error(mean, expected) < bound
    some = expected_total.isfinite()
    assert torch.equal(some, total.isfinite()) and float((total - expected_total)[some].abs().max()) < 20 * bound


@pytest.mark.parametrize(("head_dim", "k", "v"), PAIRS)
def test_widths_and_head_sizes(head_dim: int, k: int, v: int) -> None:
    check(case(Format(head_dim, k, v), 20, (300, 0, 1)))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 28, 130])
def test_query_rows(rows: int, softcap: float | None) -> None:
    check(case(Format(64, 4, 4), rows, (130, 20)), softcap=softcap)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_splits(splits: int) -> None:
    c = case(Format(64, 4, 2), 16, (700, 0, 129, 128))
    check(c, splits)
    assert error(run(c, splits)[0], run(c)[0]) < 2e-4


def test_only_11_bits_of_queries_weights_and_products_with_scales() -> None:
    check(case(Format(128, 8, 8), 16, (500,)), bound=5e-4)


@pytest.mark.parametrize("size", [1e-5, 1e4])
def test_norms_of_any_size(size: float) -> None:
    c = case(Format(64, 4, 4), 16, (200,), k_scale=0.02 / size, v_scale=size)
    check(replace(c, q=c.q * size))


@pytest.mark.parametrize("near", [True, False])
def test_large_values_of_no_weight_hide_nothing(near: bool) -> None:
    """Half the tokens, in the same pages or in others, have values a million times larger and are looked away from."""
    n, f = 256, Format(64, 8, 4)
    c = case(f, 16, (n,))
    token = torch.arange(n, device=DEVICE)
    away = (token % 2 == 0 if near else token < PAGE)[None, None, :, None].expand(1, HEADS, n, 1)
    minus_one, one = 0xB8, 0x38
    k = torch.where(away, minus_one, one).to(torch.uint8).expand(1, HEADS, n, f.head_dim)
    scales = torch.cat([torch.ones_like(away, dtype=torch.float32), torch.where(away, 1e6, 1.0)], -1).bfloat16()
    write(c.pages, k, read(c.pages)[1][:, :, :n].clone(), scales, torch.zeros(1, dtype=torch.int32), c.pages.lengths)
    check(replace(c, q=c.q.abs()))


def test_values_of_no_size_have_weight() -> None:
    """A page of scales that are zero halves the mean of another one like it."""
    c = case(Format(64, 4, 4), 16, (256,))
    k, v, scales = read(c.pages)
    scales[:, :, :PAGE] = 0
    write(c.pages, k[:, :, :256], v[:, :, :256], scales[:, :, :256], torch.zeros(1, dtype=torch.int32), c.pages.lengths)
    check(c)


def test_nothing_to_read() -> None:
    c = case(Format(64, 4, 4), 4, (0, 0))
    mean, total = run(c, 2)
    assert bool((mean == 0).all()) and bool(total.isneginf().all())


def test_a_pool_of_more_than_two_gigabytes() -> None:
    small = case(Format(128, 4, 4), 16, (100,))
    used, size = int(small.pages.table[0, 0]), small.pages.format.nbytes
    pool = torch.empty(2**31 // (HEADS * size) + 2, HEADS, size, dtype=torch.uint8, device=DEVICE)  # never touched, but for one page
    pool[-1] = small.pages.pool[used]
    large = replace(small, pages=replace(small.pages, pool=pool, table=torch.full_like(small.pages.table, len(pool) - 1)))
    assert all(torch.equal(x, y) for x, y in zip(run(large), run(small), strict=True))
