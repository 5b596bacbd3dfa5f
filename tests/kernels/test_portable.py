"""Decode attention over pages in plain Triton: equal to float64 attention over what `pages.read` gives, for all widths and schedules.

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
from kvstack.codecs.packing import unpack
from kvstack.codecs.polar import PolarCodec
from kvstack.kernels import reference
from kvstack.kernels.pages import PAGE, WIDTHS, Format, Pages, read, write
from kvstack.kernels.portable import decode_pages
from kvstack.kernels.reference import Shape, Side

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # in Triton's interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = 2
RAGGED = (300, 0, 1, 129, 128)
PAIRS = [
    (d, k, v)
    for d, k, v in itertools.product((64, 128, 256), WIDTHS, WIDTHS)
    if max(k, v) <= 8 and not (d == 64 and k == 3) and (d == 128 or k != v)
]


@dataclass(frozen=True)
class Case:
    """Arguments of `decode_pages`."""

    q: Tensor
    bias: Tensor
    pages: Pages
    cum: Tensor
    k_levels: Tensor
    v_levels: Tensor


def case(f: Format, rows: int, lengths: tuple[int, ...], k_scale: float = 0.1, v_scale: float = 1.0, spare: int = 3) -> Case:
    g = torch.Generator().manual_seed(rows + sum(lengths))
    counts = [-(-n // PAGE) for n in lengths]
    ids = torch.randperm(sum(counts) + spare, generator=g).int()
    table = ids[-1].repeat(len(lengths), max(counts) + 1)  # behind a row's end: a page that nobody owns
    pool = torch.randint(256, (len(ids), HEADS, f.nbytes), dtype=torch.uint8, generator=g)
    scales = torch.full((len(ids), HEADS, PAGE, 2), math.nan)
    used = 0
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[b, :count] = ids[used : used + count]
        used += count
        for p in range(count):
            page, n = int(table[b, p]), min(PAGE, length - p * PAGE)
            scales[page, :, :n] = (torch.rand(HEADS, n, 2, generator=g) + 0.5) * torch.tensor([k_scale, v_scale])
            for bits, side in ((f.k, slice(0, f.value_offset)), (f.v, slice(f.value_offset, f.scale_offset))):
                if bits == 8:
                    pool[page, :, side] &= 0xBF  # numbers below 2, never NaN, subnormal ones too
    pool[..., f.scale_offset :] = scales.bfloat16().view(torch.uint8).flatten(-2)
    pages = Pages(f, pool.to(DEVICE), table.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    segments = len(lengths) * HEADS
    books = (Polar(b, 1).build("key", Context(f.head_dim, 1, torch.float32, torch.device(DEVICE))) for b in (min(f.k, 4), min(f.v, 4)))
    levels = [codec.levels for codec in books if isinstance(codec, PolarCodec)]
    q, bias = torch.randn(segments, rows, f.head_dim, generator=g), torch.randn(segments, rows, generator=g)
    return Case(q.to(DEVICE), bias.to(DEVICE), pages, schedule(lengths), *levels)


def schedule(lengths: tuple[int, ...]) -> Tensor:
    tiles = [HEADS * -(-n // PAGE) for n in lengths]
    return torch.tensor([0, *itertools.accumulate(tiles)], dtype=torch.int32, device=DEVICE)


def run(c: Case, programs: int, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Slots, NaN where nobody writes."""
    slots, rows, d = programs + c.q.shape[0], *c.q.shape[1:]
    out, lse2 = torch.full((slots, rows, d), math.nan, device=DEVICE), torch.full((slots, rows), math.nan, device=DEVICE)
    decode_pages(c.q, c.bias, c.pages, c.cum, c.k_levels, c.v_levels, out, lse2, programs, softcap)
    return out, lse2


def merge(c: Case, programs: int, out: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Means `[B * H, R, D]` and base-2 log sums `[B * H, R]` in float64 of the slots that the schedule names; no others are written.

    Empty rows have zero and -inf.
    """
    mean, total = torch.zeros_like(c.q, dtype=torch.float64), torch.full_like(c.bias, -math.inf, dtype=torch.float64)
    cum = c.cum.tolist()
    per, named = -(-cum[-1] // programs), []
    for b, h in itertools.product(range(len(cum) - 1), range(HEADS)):
        count, segment = (cum[b + 1] - cum[b]) // HEADS, b * HEADS + h
        if count:
            first = cum[b] + h * count
            slots = [segment + p for p in range(first // per, (first + count - 1) // per + 1)]
            named += slots
            lse = lse2[slots].double() * math.log(2)
            mean[segment] = (torch.softmax(lse, 0)[..., None] * out[slots]).sum(0)
            total[segment] = lse.logsumexp(0) / math.log(2)
    others = [s for s in range(len(lse2)) if s not in named]
    assert len(set(named)) == len(named) and bool(out[others].isnan().all()) and bool(lse2[others].isnan().all())
    return mean, total


def check(c: Case, programs: int, softcap: float | None = None, bound: float = 1e-3) -> None:
    mean, total = merge(c, programs, *run(c, programs, softcap))
    expected, expected_total = truth(c, softcap)
    assert error(mean, expected) < bound
    some = expected_total.isfinite()
    assert torch.equal(some, total.isfinite()) and float((total - expected_total)[some].abs().max()) < 20 * bound


@pytest.mark.parametrize(("head_dim", "k", "v"), PAIRS)
def test_widths_and_head_sizes(head_dim: int, k: int, v: int) -> None:
    check(case(Format(head_dim, k, v), 4, (200, 0, 1)), 2)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("groups", [1, 4, 7, 16])
def test_query_rows(groups: int, steps: int, softcap: float | None) -> None:
    check(case(Format(64, 4, 4), groups * steps, (130, 20)), 3, softcap)


@pytest.mark.parametrize("programs", [1, 5, 64])
def test_lengths_and_schedules(programs: int) -> None:
    c = case(Format(64, 4, 2), 4, RAGGED)
    check(c, programs)
    one = merge(c, 1, *run(c, 1))[0]
    assert error(merge(c, programs, *run(c, programs))[0], one) < 1e-5


def test_the_same_again_is_the_same() -> None:
    c = case(Format(128, 4, 4), 4, RAGGED)
    for x, y in zip(run(c, 5), run(c, 5), strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize(("factor", "bound"), [(1, 5e-4), (200, 1e-2)])
def test_only_queries_and_weights_are_rounded(factor: float, bound: float) -> None:
    """Not the numbers of 8 bits. Logits of hundreds feel the rounding of the queries."""
    c = case(Format(128, 8, 8), 4, (500,))
    check(replace(c, q=factor * c.q), 2, bound=bound)


@pytest.mark.parametrize("size", [1e-5, 1e4])
def test_norms_of_any_size(size: float) -> None:
    c = case(Format(64, 4, 4), 4, (200,), k_scale=0.1 / size, v_scale=size)
    c = replace(c, q=c.q * size)
    check(c, 2)


def test_large_values_of_no_weight_hide_nothing() -> None:
    """Every other token has values a million times larger and is looked away from: what it leaves must not drown the rest."""
    n, f = 100, Format(64, 8, 4)
    c = case(f, 4, (n,))
    odd = (torch.arange(n, device=DEVICE) % 2 == 1)[None, None, :, None].expand(1, HEADS, n, 1)
    minus_one, one = 0xB8, 0x38
    k = torch.where(odd, one, minus_one).to(torch.uint8).expand(1, HEADS, n, f.head_dim)
    scales = torch.cat([torch.ones_like(odd, dtype=torch.float32), torch.where(odd, 1.0, 1e6)], -1).bfloat16()
    write(c.pages, k, read(c.pages)[1][:, :, :n].clone(), scales, torch.zeros(1, dtype=torch.int32), c.pages.lengths)
    check(replace(c, q=c.q.abs()), 1)


def test_nothing_to_read() -> None:
    c = case(Format(64, 4, 4), 4, (0, 0))
    out, lse2 = run(c, 3)
    assert bool(out.isnan().all()) and bool(lse2.isnan().all())


def test_a_pool_of_more_than_two_gigabytes() -> None:
    small = case(Format(128, 4, 4), 4, (100,))
    used = int(small.pages.table[0, 0])
    count = 2**31 // (HEADS * small.pages.format.nbytes) + 2
    pool = torch.empty(count, HEADS, small.pages.format.nbytes, dtype=torch.uint8, device=DEVICE)  # never touched, but for one page
    pool[-1] = small.pages.pool[used]
    large = replace(small, pages=replace(small.pages, pool=pool, table=torch.full_like(small.pages.table, count - 1)))
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(run(large, 1), run(small, 1), strict=True))


def test_a_codec_s_tier_is_the_reference_s() -> None:
    """Through a codec with rotation, centre and scale rule, against `reference.attend` of the same codes."""
    b, groups, d, n = 2, 3, 128, 150
    g = torch.Generator().manual_seed(0)
    q, k, v, centre = (
        torch.randn(*s, d, generator=g).to(DEVICE) for s in ((b, groups * HEADS, 1), (b, HEADS, n), (b, HEADS, n), (HEADS,))
    )
    context = Context(d, HEADS, torch.float32, torch.device(DEVICE), centre)
    key, value = (Polar(4, 3, scale="unbiased", centre=True).build(side, context) for side in ("key", "value"))
    assert isinstance(key, PolarCodec) and isinstance(value, PolarCodec)
    sides = [Side(key, key.encode(k)), Side(value, value.encode(v))]
    shape = Shape(d**-0.5, 30.0)
    lengths = (n, 40)
    mask = (torch.arange(n) < torch.tensor(lengths)[:, None, None]).to(DEVICE)
    expected = reference.attend(q, *sides, mask, shape)

    c = case(Format(d, 4, 3), groups, lengths)
    scales = torch.stack([s.codes[1] for s in sides], -1)
    codes = [unpacked(s) for s in sides]
    write(c.pages, *codes, scales, torch.zeros(b, dtype=torch.int32), c.pages.lengths)
    grouped = q.reshape(b, HEADS, groups, d) * shape.scale * math.log2(math.e)
    bias = (grouped * centre[:, None]).sum(-1)
    c = replace(
        c, q=key.project(grouped).flatten(0, 1).contiguous(), bias=bias.flatten(0, 1), k_levels=key.levels, v_levels=value.levels
    )
    mean, total = merge(c, 3, *run(c, 3, shape.softcap))
    out = value.unproject(mean.float().unflatten(0, (b, HEADS))).reshape_as(expected.out)
    assert error(out, expected.out) < 1e-3
    assert torch.allclose((total * math.log(2)).reshape(expected.lse.shape).float(), expected.lse, atol=1e-3)


def unpacked(side: Side) -> Tensor:
    """Indices `[B, H, N, D]` of a tier of a PolarCodec."""
    assert isinstance(side.codec, PolarCodec)
    return unpack(side.codes[0], side.codec.bits)
