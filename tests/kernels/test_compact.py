"""Tokens that stay are the same bits at the front of their row, all else is what it was: the torch twin, and the kernel by the twin.

Pools are random bytes, in pages of any order, with NaN among scales and numbers: records move whatever they are.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvstack.kernels.compact import compact
from kvstack.kernels.move import move
from kvstack.kernels.pages import PAGE, WIDTHS, Format, Pages, read

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # of Triton's interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
H, SLOTS = 2, 4  # heads; pages of a row
# Every width on both sides, beside another one: sides move by themselves.
FORMATS = [(d, k, v) for d in (64, 128, 256) for k, v in zip(WIDTHS, WIDTHS[2:] + WIDTHS[:2], strict=True) if (d, k) != (64, 3)]
Move = Callable[[Pages, Tensor, Tensor, bool], None]


def noisy_pages(f: Format, rows: int) -> Pages:
    """Pages of random bytes, in random order, with one that belongs to nobody; the last one of every row is full of NaN."""
    random = torch.Generator().manual_seed(7)
    pool = torch.randint(256, (rows * SLOTS + 1, H, f.nbytes), dtype=torch.uint8, generator=random)
    table = torch.randperm(rows * SLOTS, generator=random).view(rows, SLOTS).int()
    pool[table[:, -1].long()] = 255
    return Pages(f, pool, table, torch.zeros(rows, dtype=torch.int32))


def some(seed: int, length: int, count: int) -> Tensor:
    """Random tokens of a row, `[H, count]`, ascending, others for every head."""
    random = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(length, generator=random)[:count].sort().values for _ in range(H)])


def without(length: int, *gone: int) -> Tensor:
    """All tokens but some, of every head."""
    return torch.tensor([n for n in range(length) if n not in gone]).expand(H, -1)


def in_place(tokens: Tensor) -> Tensor:
    """The same tokens, those below their number at their own places."""
    out = torch.full_like(tokens, -1)
    for row, place in zip(tokens, out, strict=True):
        stays = row[row < len(row)]
        place[stays] = stays
        place[place < 0] = row[len(stays) :]
    return out


def packed(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """keep `[B, H, M]`, with tokens that nobody has behind the counts, and counts `[B]`."""
    keep = torch.full((len(rows), H, max(r.shape[1] for r in rows) + 3), 2**30, dtype=torch.int32)
    for row, tokens in zip(keep, rows, strict=True):
        row[:, : tokens.shape[1]] = tokens
    return keep, torch.tensor([r.shape[1] for r in rows], dtype=torch.int32)


def moved(pages: Pages, keep: Tensor, counts: Tensor, move: Move, device: torch.device, ordered: bool = True) -> Tensor:
    """The pool after `move`, which reads and writes copies."""
    there = Pages(pages.format, *(t.clone().to(device) for t in (pages.pool, pages.table, pages.lengths)))
    move(there, keep.to(device), counts.to(device), ordered)
    return there.pool.cpu()


RAGGED = [
    some(1, 400, 150),  # over the border of a page
    some(2, 500, 128),  # one full page
    torch.zeros(H, 0, dtype=torch.long),  # none
    without(384),  # all
    without(300, 140),  # the first page stays
    torch.full((H, 1), 383),  # the last token of a page, alone
    torch.arange(200, 329).expand(H, -1),  # a block
    without(129, 0),  # all move by one, one over a border
    in_place(some(3, 470, 300)),  # only those behind the places move, to any place
    in_place(some(4, 500, 40)),
    in_place(without(300, 5, 6, 140, 141)),  # pages that get two
    without(140, 129),  # few move, each to where the one before was
]


@pytest.mark.parametrize(("head_dim", "k", "v"), [(64, 4, 3), (128, 3, 2), (128, 8, 4), (256, 16, 16), (64, 2, 8)])
def test_tokens_that_stay_are_the_same_bits(head_dim: int, k: int, v: int) -> None:
    pages, (keep, counts) = noisy_pages(Format(head_dim, k, v), len(RAGGED)), packed(RAGGED)
    after = replace(pages, pool=moved(pages, keep, counts, compact, CPU))
    for was, now in zip(read(pages), read(after), strict=True):
        was, now = was.view(torch.uint8), now.view(torch.uint8)
        for b, tokens in enumerate(RAGGED):
            count = tokens.shape[1]
            for h in range(H):
                assert torch.equal(now[b, h, :count], was[b, h, tokens[h]])
            assert torch.equal(now[b, :, count:], was[b, :, count:])
    assert torch.equal(after.pool[-1], pages.pool[-1])


@pytest.mark.parametrize(("head_dim", "k", "v"), FORMATS)
def test_the_kernel_moves_the_same_bits(head_dim: int, k: int, v: int) -> None:
    """Triton's interpreter, which takes long, has few sets for most formats, and fewer where no order is kept, token after token."""
    most, few = (RAGGED, RAGGED[-3:]) if (head_dim, k, v) == FORMATS[0] else (RAGGED[-3:], RAGGED[-1:])
    for ordered, sets in ((True, RAGGED), (False, RAGGED)) if DEVICE.type == "cuda" else ((True, most), (False, few)):
        pages, (keep, counts) = noisy_pages(Format(head_dim, k, v), len(sets)), packed(sets)
        wanted = moved(pages, keep, counts, compact, CPU)
        assert not torch.equal(wanted, pages.pool)
        assert torch.equal(moved(pages, keep, counts, move, DEVICE, ordered), wanted)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 512])
def test_random_sets_of_any_size(length: int) -> None:
    """Also again and again, as a cache does it."""
    sizes = sorted({0, 1, length // 3, length - 1, length})
    pages = noisy_pages(Format(128, 3, 4), len(sizes))
    for seed in range(3):
        keep, counts = packed([some(seed + i, length, n) for i, n in enumerate(sizes)])
        wanted = moved(pages, keep, counts, compact, CPU)
        assert torch.equal(moved(pages, keep, counts, move, DEVICE), wanted)
        pages = replace(pages, pool=wanted)


@pytest.mark.parametrize("way", [compact, move])
def test_no_nan_appears_where_attention_reads(way: Move) -> None:
    """Rows of 300 tokens, NaN behind them; the page that holds the end of what stays has old tokens behind it."""
    pages, keep = noisy_pages(Format(64, 4, 4), 2), [some(3, 300, 200), some(4, 300, 3)]
    scales = torch.full((len(pages.pool), H, PAGE, 2), math.nan, dtype=torch.bfloat16)
    scales[pages.table[:, :2].long()] = 1
    scales[pages.table[:, 2].long(), :, :44] = 1
    pages.pool[..., pages.format.scale_offset :] = scales.view(torch.uint8).flatten(-2)
    tokens, counts = packed(keep)
    after = read(replace(pages, pool=moved(pages, tokens, counts, way, CPU if way is compact else DEVICE)))[2]
    assert bool(after[0, :, :256].isfinite().all()) and bool(after[1, :, :128].isfinite().all())


def test_a_table_that_is_a_row_of_a_larger_one() -> None:
    pages, (keep, counts) = noisy_pages(Format(64, 4, 2), 3), packed(RAGGED[:1])
    row = replace(pages, table=pages.table[1:2, :4], lengths=pages.lengths[1:2])
    wide = replace(pages, pool=pages.pool.clone().to(DEVICE), table=pages.table.to(DEVICE)[1:2])
    move(wide, keep.to(DEVICE), counts.to(DEVICE), True)
    assert torch.equal(wide.pool.cpu(), moved(row, keep, counts, compact, CPU))
