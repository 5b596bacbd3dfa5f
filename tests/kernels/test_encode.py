"""The encoding kernel gives what the codecs and `pages.write` give, wherever it writes, and touches nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.codecs.fp8 import Fp8Codec
from kvstack.codecs.packing import unpack
from kvstack.codecs.polar import PolarCodec
from kvstack.codecs.rotation import rotation
from kvstack.kernels.book import CELLS, UNIT, book, cells
from kvstack.kernels.encode import Machine, config, encode, launch
from kvstack.kernels.encode_hopper import fits
from kvstack.kernels.pages import PAGE, Format, Pages, read

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # of Triton's interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
H, SLOTS = 2, 3  # heads; pages of a row
ROOM = 2**20  # of shared memory, for what the interpreter does not mind


def codec(bits: int, head_dim: int, centre: bool = False, **options: Any) -> Codec:
    if bits == 8:
        return Fp8Codec(head_dim)
    mean = gaussian(99, H, head_dim).to(DEVICE) if centre else None
    return PolarCodec(rotation(head_dim, 5, DEVICE), bits, centre=mean, **options)


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy_pages(f: Format, rows: int) -> Pages:
    """Pages of random bytes, in random order, with one that belongs to nobody."""
    random = torch.Generator().manual_seed(7)
    pool = torch.randint(256, (rows * SLOTS + 1, H, f.nbytes), dtype=torch.uint8, generator=random)
    table = torch.randperm(rows * SLOTS, generator=random).view(rows, SLOTS).int()
    return Pages(f, pool.to(DEVICE), table.to(DEVICE), torch.zeros(rows, dtype=torch.int32, device=DEVICE))


def ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def indices(side: Codec, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as a page holds them, and scales, by the codec."""
    codes, scales = side._encode(x)
    return (codes.view(torch.uint8) if isinstance(side, Fp8Codec) else unpack(codes, side.bits)), scales


@dataclass(frozen=True)
class Case:
    head_dim: int
    k: int
    v: int
    options: dict[str, Any]
    dtype: torch.dtype = torch.float16


CASES = [
    Case(128, 4, 4, dict()),
    Case(128, 3, 3, dict(scale="plain")),
    Case(128, 2, 2, dict(codebook="exact", scale="unbiased", centre=True)),
    Case(128, 4, 3, dict(codebook="exact", search=True, scale="plain")),
    Case(128, 8, 4, dict(search=True), torch.float32),
    Case(64, 4, 8, dict(centre=True), torch.float32),
    Case(64, 2, 3, dict(codebook="exact")),
    Case(256, 3, 2, dict()),
    Case(256, 4, 4, dict(codebook="exact", scale="unbiased"), torch.float32),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.k}-{c.v}-{c.head_dim}")
@pytest.mark.parametrize("n", [3, 11, 150])  # steps, small and large tiles
def test_it_gives_what_the_codecs_give_and_touches_nothing_else(case: Case, n: int) -> None:
    f = Format(case.head_dim, case.k, case.v)
    pages, starts, counts = noisy_pages(f, 3), [230, 19, 7], [n, n // 2, 0]
    # Rows of a batch of tokens, with neighbours that are no heads; behind the counts lies what must not matter.
    spread = gaussian(1, 3, n, 2 * H, case.head_dim)[:, :, ::2].transpose(1, 2).to(case.dtype)
    k, v = spread.to(DEVICE), (1e-2 * gaussian(2, 3, H, n, case.head_dim) ** 3).to(case.dtype).to(DEVICE)
    key, value = codec(case.k, case.head_dim, **case.options), codec(case.v, case.head_dim, **case.options)
    wanted, written = read(pages), torch.zeros(3, H, SLOTS * PAGE, dtype=torch.bool)
    for at, (side, x) in enumerate(((key, k), (value, v))):
        codes, scales = indices(side, x)
        for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
            wanted[at][b, :, start : start + count] = codes[b, :, :count]
            wanted[2][b, :, start : start + count, at] = scales[b, :, :count]
            written[b, :, start : start + count] = True
            x[b, :, count:] = torch.nan
    free = pages.pool[-1].clone()

    encode(k, v, key, value, pages, ints(starts), ints(counts))

    found = read(pages)
    assert torch.equal(pages.pool[-1], free)
    for at in (0, 1):
        differ = (found[at].int() - wanted[at].int()).abs()
        assert differ.max() <= 1 and differ.bool().float().mean() < 1e-3
        assert not differ[~written].any()
    scale_bits = [t[2].view(torch.int16).int() for t in (found, wanted)]
    ulp = (scale_bits[0] - scale_bits[1]).abs()
    assert ulp.max() <= 1 and ulp.bool().float().mean() < 0.01 and not ulp[~written].any()


def whole_numbers(seed: int, n: int, head_dim: int) -> Tensor:
    """Vectors whose rotation and squares are exact in any order of summation."""
    x = torch.randint(-20, 21, (1, H, n, head_dim), generator=torch.Generator().manual_seed(seed))
    return x.to(torch.float16).to(DEVICE)


@pytest.mark.parametrize("k, v", [(4, 3), (3, 4), (2, 8)])
def test_token_by_token_and_at_once_are_the_same_bits(k: int, v: int) -> None:
    key, value, n, start = codec(k, 128), codec(v, 128), 40, 118
    x, y = whole_numbers(1, n, 128), whole_numbers(2, n, 128)
    pools = []
    for steps in ([n], [1, 1, 2, 5, 1, 30]):
        pages, at = noisy_pages(Format(128, k, v), 1), 0
        for step in steps:
            some = slice(at, at + step)
            encode(x[:, :, some], y[:, :, some], key, value, pages, ints([start + at]), ints([step]))
            at += step
        pools.append(pages.pool)
    assert torch.equal(*pools)


@pytest.mark.parametrize("kind, chunk", [("mma", 128), ("mma", 32), ("wgmma", 128), ("mfma", 128)])
def test_every_configuration_gives_the_same_bits(kind: str, chunk: int) -> None:
    """A GPU with wgmma has room for the matrix, and never multiplies by 32 coordinates at once; Triton 3.6 gets that wrong there."""
    if chunk < 128 and DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0):
        pytest.skip("no such configuration is used on this GPU")
    pools, x = [], whole_numbers(3, 70, 128)
    for how in (config(70, 128, x.dtype, Machine(ROOM, "mma")), config(1, 128, x.dtype, Machine(ROOM, kind))):
        pages = noisy_pages(Format(128, 4, 3), 1)
        how = replace(how, chunk=chunk, fragment=kind)
        launch(x, x.flip(2), codec(4, 128), codec(3, 128), pages, ints([90]), ints([70]), how)
        pools.append(pages.pool)
    # On a GPU, squares are added up in another order, and a coordinate that lies on an edge may fall to the other side.
    assert float((pools[0] != pools[1]).double().mean()) <= (1e-3 if torch.cuda.is_available() else 0)


def encoded(x: Tensor, side: Codec, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of K `[n, D]` of one head."""
    pages = noisy_pages(Format(x.shape[-1], bits, bits), 1)
    both = x.to(DEVICE).expand(1, H, -1, -1)
    encode(both, both, side, side, pages, ints([0]), ints([x.shape[0]]))
    k, v, scales = (t[0, 0, : x.shape[0]].cpu() for t in read(pages))
    assert torch.equal(k, v) and scales[:, 0].tolist() == pytest.approx(scales[:, 1].tolist(), rel=0, nan_ok=True)
    return k, scales[:, 0]


@pytest.mark.parametrize("bits, rule", [(2, "matched"), (4, "plain"), (4, "unbiased"), (8, "none")])
def test_norms_of_any_size_and_zeros(bits: int, rule: str) -> None:
    side = codec(bits, 128, scale=rule)
    x = gaussian(4, 1, 128).repeat(4, 1) * torch.tensor([1.0, 2.0**-20, 2.0**14, 0.0])[:, None]
    codes, scales = encoded(x, side, bits)
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])
    assert torch.equal(scales[:3], scales[0] * torch.tensor([1.0, 2.0**-20, 2.0**14]))
    if bits == 8:  # the codec's scale is never 0
        assert not codes[3].any() and scales[3] == torch.finfo(torch.bfloat16).tiny
    else:
        assert scales[3] == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy of the interpreter
@pytest.mark.parametrize("bits", [4, 8])
def test_a_vector_that_is_not_finite_harms_no_other(bits: int) -> None:
    x, side = gaussian(5, 40, 128), codec(bits, 128)
    codes, scales = encoded(x, side, bits)
    x[3, 7], x[17, 0], x[18, 127] = torch.nan, torch.inf, -torch.inf
    harmed, harmed_scales = encoded(x, side, bits)
    others = torch.ones(40, dtype=torch.bool)
    others[[3, 17, 18]] = False
    assert torch.equal(codes[others], harmed[others]) and torch.equal(scales[others], harmed_scales[others])


def test_ties_of_e4m3_go_to_the_even_number() -> None:
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 .. 448, all of them
    halves = torch.cat([(numbers[1:] + numbers[:-1]) / 2, numbers[-1:], numbers[:1]])
    x = torch.stack([halves, -halves, halves * (1 + 2**-20), halves * (1 - 2**-20)])
    x[:, 126] = 448.0  # so that the scale is 1
    codes, scales = encoded(x, codec(8, 128), 8)
    assert (scales == 1).all()
    assert torch.equal(codes.view(torch.float8_e4m3fn).float(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("codebook", ["exact", "e4m3"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_polynomials_of_a_codebook(bits: int, head_dim: int, codebook: Any) -> None:
    side = PolarCodec(rotation(head_dim, 0, torch.device("cpu")), bits, codebook=codebook)
    b, magnitudes = book(side), 2 ** (bits - 1)
    edges, levels = side._edges[magnitudes:], side.levels[magnitudes:]
    y = torch.linspace(0, 6, 100_003)
    near = (y[:, None] - edges).abs().min(1).values < 1e-5
    p = torch.zeros_like(y)
    for c in b.ladder:  # in float32, as the kernel does
        p = p * (y.clamp(max=b.cap) - b.origin) + c
    assert torch.equal(p.round().int()[~near], torch.bucketize(y, edges, out_int32=True)[~near]) and near.float().mean() < 1e-3
    rank = np.arange(magnitudes)
    assert np.allclose(np.polyval(b.levels, rank - 3.0), levels, rtol=1e-6)
    squares = [sum(c for s, c in enumerate(b.squares) if s & r == s) for r in rank]
    assert np.allclose(np.array(squares) / UNIT, levels**2, atol=8 / UNIT)
    assert 256 * max(squares) < 2**31


@pytest.mark.parametrize("codebook", ["exact", "e4m3"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_cells_of_a_codebook(bits: int, head_dim: int, codebook: Any) -> None:
    side = PolarCodec(rotation(head_dim, 0, torch.device("cpu")), bits, codebook=codebook)
    constants, table = cells(side)
    numbers, looked_up = torch.from_numpy(table[:CELLS]).view(torch.float32), table[CELLS::4].copy().view(np.uint8).astype(int)
    y = torch.linspace(-12, 12, 100_003)
    t = (y * constants.factor + 0.5).clamp(0, 1)  # in float32, as the kernel does
    p = t * 16 + numbers[(t * 31).round().int()]
    index, near = torch.bucketize(y, side._edges, out_int32=True), (y[:, None] - side._edges).abs().min(1).values < 2e-6
    assert torch.equal(p.floor().int()[~near], index[~near] + 16) and near.float().mean() < 1e-3
    assert (p.view(torch.int32) >> 19 & 15)[~near].tolist() == index[~near].tolist()  # what the kernel takes
    low, high = looked_up[:8], looked_up[8:]
    sums = low**2 if constants.whole else low + 256 * high
    of = np.arange(2**bits)  # the entry of an index
    if bits == 4:
        of = np.where(of < 8, 7 - of, of - 8)
    assert np.allclose(sums[of] / constants.unit, side.levels.double() ** 2, atol=0 if constants.whole else 0.51 / constants.unit)
    assert constants.whole == (codebook == "e4m3") and head_dim * max(sums) < 2**31


def test_what_the_kernel_for_hopper_takes() -> None:
    x, side = torch.zeros(2, 128, H, 128, dtype=torch.float16, device=DEVICE).transpose(1, 2), codec(4, 128, centre=True)
    assert fits(x, x, side, codec(2, 128, scale="plain"))
    for other in (codec(8, 128), codec(4, 128, search=True), codec(4, 128, scale="unbiased")):
        assert not fits(x, x, other, side) and not fits(x, x, side, other)
    assert not fits(x[:, :, 1:], x[:, :, 1:], side, side)  # less than a page
    assert not fits(x.float(), x.float(), side, side)
    odd = torch.zeros(2, H, 128, 132, dtype=torch.float16, device=DEVICE)
    assert not fits(odd[..., :128], odd[..., :128], side, side) and not fits(x, odd[..., 4:], side, side)
