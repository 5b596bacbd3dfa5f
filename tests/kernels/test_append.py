"""New tokens into pages without a kernel: the codecs' own codes, where they belong, with all else untouched."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.codecs.exact import ExactCodec
from kvstack.codecs.fp8 import Fp8Codec
from kvstack.codecs.polar import PolarCodec
from kvstack.codecs.rotation import rotation
from kvstack.errors import BadInputError
from kvstack.kernels.append import append
from kvstack.kernels.codes import from_page
from kvstack.kernels.pages import PAGE, Format, Pages, read

torch.set_num_threads(1)

H, SLOTS, N = 2, 3, 150
STARTS, COUNTS = [100, 256, 0], [150, 7, 0]
CPU = torch.device("cpu")
GPU = torch.cuda.is_available()


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codec(bits: int, head_dim: int, dtype: torch.dtype, **options: Any) -> Codec:
    if bits == 16:
        return ExactCodec(head_dim, dtype)
    return Fp8Codec(head_dim) if bits == 8 else PolarCodec(rotation(head_dim, 5, CPU), bits, **options)


def noisy_pages(f: Format, rows: int) -> Pages:
    """Pages of random bytes, in random order, with one that belongs to nobody."""
    random = torch.Generator().manual_seed(7)
    pool = torch.randint(256, (rows * SLOTS + 1, H, f.nbytes), dtype=torch.uint8, generator=random)
    table = torch.randperm(rows * SLOTS, generator=random).view(rows, SLOTS).int()
    return Pages(f, pool, table, torch.zeros(rows, dtype=torch.int32))


def same(x: Tensor, y: Tensor) -> bool:
    """Bit for bit, NaN too."""
    return x.dtype == y.dtype and torch.equal(*(t.clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (x, y)))


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("head_dim", "k", "v", "dtype"),
    [
        (64, 4, 2, torch.float32), (128, 3, 3, torch.bfloat16), (256, 2, 4, torch.float16), (128, 8, 8, torch.float32),
        (64, 8, 3, torch.bfloat16), (128, 16, 16, torch.bfloat16), (256, 16, 16, torch.float16),
    ],
)  # fmt: skip
def test_pages_hold_the_codes_of_the_codecs(head_dim: int, k: int, v: int, dtype: torch.dtype) -> None:
    pages = noisy_pages(Format(head_dim, k, v), len(STARTS))
    free, before = pages.pool[-1].clone(), [t.clone() for t in read(pages)]
    centre = draw(9, H, head_dim)
    codecs = codec(k, head_dim, dtype, centre=centre), codec(v, head_dim, dtype, scale="unbiased")
    x = [draw(seed, len(STARTS), N, H, head_dim, dtype=dtype).transpose(1, 2) for seed in (1, 2)]

    append(pages, *codecs, *x, ints(STARTS), ints(COUNTS))

    written = torch.zeros(len(STARTS), H, SLOTS * PAGE, dtype=torch.bool)
    found = read(pages)
    for i, (c, tokens) in enumerate(zip(codecs, x, strict=True)):
        stored, wanted = from_page(c, found[i], found[2][..., i]), c.encode(tokens)
        for field, new in zip(stored, wanted, strict=True):  # codes, and scales if there are any
            for b, (start, count) in enumerate(zip(STARTS, COUNTS, strict=True)):
                assert same(field[b, :, start : start + count], new[b, :, :count])
                written[b, :, start : start + count] = True
        if isinstance(c, ExactCodec):
            assert bool((found[2][..., i][written] == 1).all())
    assert torch.equal(pages.pool[-1], free)
    for now, was in zip(found, before, strict=True):
        assert same(now[~written], was[~written])


@pytest.mark.parametrize("bits", [3, 8, 16])
def test_token_by_token_and_at_once_are_the_same_bits(bits: int) -> None:
    side, x = codec(bits, 128, torch.float32 if bits < 16 else torch.float16), draw(1, 2, H, 40, 128, dtype=torch.float16)
    once, steps = (noisy_pages(Format(128, bits, bits), 2) for _ in range(2))
    append(once, side, side, x, 2 * x, ints([110, 3]), ints([40, 40]))
    for i in range(40):
        some = x[:, :, i : i + 1]
        append(steps, side, side, some, 2 * some, ints([110 + i, 3 + i]), ints([1, 1]))
    assert torch.equal(once.pool, steps.pool)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_stored(bits: int) -> None:
    pages, side = noisy_pages(Format(64, bits, bits), 1), codec(bits, 64, torch.float32)
    before, x = pages.pool.clone(), draw(1, 1, H, 2, 64)
    broken = x.clone()
    broken[0, 1, 1, 5] = math.inf
    with pytest.raises(BadInputError, match="NaN or Inf"):
        append(pages, side, side, x, broken, ints([0]), ints([2]))
    assert torch.equal(pages.pool, before)


@pytest.mark.skipif(not GPU, reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_kernel_stores_numbers_as_the_codec_does(dtype: torch.dtype) -> None:
    """Whatever the type of what comes."""
    side, x = ExactCodec(128, torch.bfloat16), draw(1, 2, H, 40, 128).to(dtype)
    here = noisy_pages(Format(128, 16, 16), 2)
    there = Pages(here.format, *(t.cuda() for t in (here.pool, here.table, here.lengths)))
    append(here, side, side, x, 2 * x, ints([110, 3]), ints([40, 7]))
    append(there, side, side, x.cuda(), 2 * x.cuda(), ints([110, 3]).cuda(), ints([40, 7]).cuda())
    assert torch.equal(here.pool, there.pool.cpu())
