"""Numbers of 16 bits in pages: in the documented order, and the kernel stores what `pages.write` stores and nothing else."""

import pytest
import torch
from torch import Tensor

from kvstack.kernels.pages import PAGE, Format, Pages, pack, read, unpack, write
from kvstack.kernels.plain import store

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # in Triton's interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, SLOTS = 2, 3  # heads; pages of a row


def bits(seed: int, *shape: int) -> Tensor:
    """Any 16 bits, those of NaN too, `shape` int16."""
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def noisy_pages(head_dim: int, rows: int) -> Pages:
    """Pages of random bytes, in random order, with one that belongs to nobody."""
    f, random = Format(head_dim, 16, 16), torch.Generator().manual_seed(7)
    pool = torch.randint(256, (rows * SLOTS + 1, HEADS, f.nbytes), dtype=torch.uint8, generator=random)
    table = torch.randperm(rows * SLOTS, generator=random).view(rows, SLOTS).int()
    return Pages(f, pool.to(DEVICE), table.to(DEVICE), torch.zeros(rows, dtype=torch.int32, device=DEVICE))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_where_a_number_lies() -> None:
    """Row 1 of 2, column 93 = 16 * 5 + 8 * 1 + 2 * 2 + 1: s = 5, h = 1, t = 2, i = 1, of rows of 128 columns.

    A row has 128 numbers, 32 of every thread in the order (s, h, i), so it is number 128 + 32 * 2 + 4 * 5 + 2 * 1 + 1 = 215.
    """
    codes = torch.zeros(2, 128, dtype=torch.int16)
    codes[1, 93] = 0x1234
    packed = pack(codes, 16)
    assert packed.shape == (512,) and packed.nonzero().flatten().tolist() == [430, 431]
    assert packed[430:432].tolist() == [0x34, 0x12]
    assert torch.equal(unpack(packed, 16, 2), codes)


def test_where_a_token_lies() -> None:
    """The same in a page: K `[128, 64]`, V `[64, 128]` behind it, and the scales of the token behind both."""
    f = Format(64, 16, 16)
    pages = Pages(f, torch.zeros(1, 1, f.nbytes, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int32), ints(0).cpu())
    k, v = torch.zeros(1, 1, 1, 64, dtype=torch.int16), torch.zeros(1, 1, 1, 64, dtype=torch.int16)
    k[..., 13], v[..., 7] = 1, 2  # column 13 = 8 * 1 + 2 * 2 + 1; row 7 of V
    write(pages, k, v, torch.tensor([3.0, 5.0]).bfloat16().expand(1, 1, 1, 2), torch.tensor([93]), torch.tensor([1]))
    numbers = pages.pool.view(torch.int16).flatten()
    in_k, in_v, scales = 93 * 64 + 16 * 2 + 2 + 1, PAGE * 64 + 7 * 128 + 87, 2 * PAGE * 64 + 2 * 93
    assert numbers.nonzero().flatten().tolist() == [in_k, in_v, scales, scales + 1]
    assert numbers[[in_k, in_v]].tolist() == [1, 2] and numbers[scales:][:2].view(torch.bfloat16).tolist() == [3, 5]


@pytest.mark.parametrize(("head_dim", "layout"), [(64, "heads first"), (128, "tokens first"), (256, "heads first")])
def test_the_kernel_writes_what_the_torch_path_writes(head_dim: int, layout: str) -> None:
    """Over the border of a page, up to one, from one, one token, none."""
    starts, counts, n = ints(100, 77, 128, 383, 5), ints(60, 51, 17, 1, 0), 60
    wanted, found = (noisy_pages(head_dim, len(starts)) for _ in range(2))
    before = wanted.pool.clone()
    if layout == "tokens first":  # as a projection of queries, keys and values in one leaves them
        k, v = bits(1, 5, n, 3 * HEADS, head_dim)[:, :, HEADS:].transpose(1, 2).split(HEADS, 1)
    else:
        k, v = bits(1, 5, HEADS, n, head_dim), bits(2, 5, HEADS, 2 * n, head_dim + 8)[:, :, ::2, 8:]
    ones = torch.ones(5, HEADS, n, 2, dtype=torch.bfloat16, device=DEVICE)
    write(wanted, k, v, ones, starts, counts)
    store(k.view(torch.float16), v.view(torch.float16), found, starts, counts)
    assert torch.equal(found.pool, wanted.pool) and not torch.equal(found.pool, before)
    assert torch.equal(found.pool[-1], before[-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_one_by_one_and_at_once_are_the_same(dtype: torch.dtype) -> None:
    k, v = (bits(seed, 2, HEADS, 8, 64).view(dtype) for seed in (1, 2))
    once, steps = noisy_pages(64, 2), noisy_pages(64, 2)
    store(k, v, once, ints(124, 3), ints(8, 8))
    for i in range(8):
        store(k[:, :, i : i + 1], v[:, :, i : i + 1], steps, ints(124 + i, 3 + i), ints(1, 1))
    assert torch.equal(once.pool, steps.pool)
    for b, start in enumerate((124, 3)):
        found = [t[b, :, start : start + 8] for t in read(once)]
        assert torch.equal(found[0], k[b].view(torch.int16)) and torch.equal(found[1], v[b].view(torch.int16))
        assert bool((found[2] == 1).all())


def test_a_table_wider_than_the_prompt() -> None:
    """Strides of the table are taken as they are: a row of a larger table."""
    wide, narrow = noisy_pages(64, 3), noisy_pages(64, 3)
    k = bits(1, 1, HEADS, 30, 64).view(torch.float16)
    row = Pages(wide.format, wide.pool, wide.table[1:2], wide.lengths[1:2])
    store(k, k, row, ints(120), ints(30))
    ones = torch.ones(1, HEADS, 30, 2, dtype=torch.bfloat16, device=DEVICE)
    own = Pages(narrow.format, narrow.pool, narrow.table[1:2].clone(), narrow.lengths[1:2])
    write(own, k.view(torch.int16), k.view(torch.int16), ones, ints(120), ints(30))
    assert torch.equal(wide.pool, narrow.pool)
