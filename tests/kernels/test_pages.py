"""The page format: bit for bit what its docstring says, both ways, and a write touches its own records and no others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstack.errors import RecipeError
from kvstack.kernels.pages import PAGE, WIDTHS, Format, Pages, pack, read, unpack, write

torch.set_num_threads(1)

COLUMNS = {2: 64, 3: 128, 4: 32, 8: 32, 16: 16}  # the fewest columns of a width


def draw(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def draw_codes(seed: int, bits: int, *shape: int) -> Tensor:
    """Any codes of a width, as `pack` takes them."""
    if bits < 16:
        return draw(seed, 2**bits, *shape)
    *batch, last = shape
    return draw(seed, 256, *batch, 2 * last).view(torch.int16)


def documented(raw: bytes, bits: int, rows: int, columns: int, row: int, column: int) -> int:
    """The code of one row and column of a packed matrix, by the words of the docstring and nothing else."""
    if bits == 16:
        s, h, t, i = column // 16, column % 16 // 8, column % 8 // 2, column % 2
        at = 2 * (columns * row + columns // 4 * t + 4 * s + 2 * h + i)
        return int.from_bytes(raw[at : at + 2], "little", signed=True)
    s, h, t, i = column // 32, column % 32 // 16, column % 16 // 4, column % 4
    n = 4 * h + i

    def word(plane: int, steps: int) -> int:
        """The word of thread t in this row that holds step s, `steps` steps a word, of the plane that begins at byte `plane`."""
        at = plane + 4 * (columns // (32 * steps) * (4 * row + t) + s // steps)
        return int.from_bytes(raw[at : at + 4], "little")

    if bits == 8:
        return raw[columns * row + columns // 4 * t + 8 * s + n]
    if bits == 4:
        magnitude, negative = word(0, 1) >> 4 * n & 7, word(0, 1) >> 8 * i + 7 - 4 * h & 1
        return 7 - magnitude if negative else 8 + magnitude
    code = word(0, 2) >> 4 * n + 2 * (s % 2) & 3
    return code if bits == 2 else code + 4 * (word(rows * columns // 4, 4) >> 4 * n + s % 4 & 1)


def test_numbers_of_32_bits_lie_as_they_are() -> None:
    x = torch.randn(2, PAGE, 64)
    packed = pack(x.view(torch.int32), 32)
    assert torch.equal(packed.view(torch.float32), x.flatten(1)) and torch.equal(unpack(packed, 32, PAGE).view(torch.float32), x)
    assert Format(64, 32, 32).nbytes == 2 * PAGE * 64 * 4 + 4 * PAGE


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(WIDTHS), st.integers(1, 3), st.integers(1, 5), st.lists(st.integers(1, 3), max_size=2), st.integers(0, 10**6))
def test_packing_loses_nothing_either_way(bits: int, runs: int, rows: int, batch: list[int], seed: int) -> None:
    columns = runs * COLUMNS[bits]
    codes = draw_codes(seed, bits, *batch, rows, columns)
    packed = pack(codes, bits)
    assert packed.shape == (*batch, rows * columns * bits // 8)
    assert torch.equal(unpack(packed, bits, rows), codes)
    raw = draw(seed, 256, *packed.shape)
    assert torch.equal(pack(unpack(raw, bits, rows), bits), raw)


def test_a_word_of_four_bits() -> None:
    codes = torch.full((2, 64), 8, dtype=torch.uint8)  # magnitude 0, positive: all bits zero
    # Thread 2, step 1 of row 1; (h, i) = (0, 0), ..., (0, 3), (1, 0), ..., (1, 3). Signed magnitudes +7 +0 -0 -7 +1 -1 +4 -4.
    codes[1, [40, 41, 42, 43, 56, 57, 58, 59]] = torch.tensor([15, 8, 7, 0, 9, 6, 12, 3], dtype=torch.uint8)
    # Magnitudes 0x44117007; signs of (0, 2), (0, 3), (1, 1), (1, 3) at the bits 23, 31, 11, 27.
    expected = torch.zeros(16, dtype=torch.int64)
    expected[8 + 2 * 2 + 1] = 0xCC917807
    assert pack(codes, 4).numpy().tobytes() == b"".join(int(w).to_bytes(4, "little") for w in expected)


@pytest.mark.parametrize("v", WIDTHS)
@pytest.mark.parametrize("k", WIDTHS)
def test_a_page_is_what_the_docstring_says(k: int, v: int) -> None:
    f = Format(128, k, v)
    raw = draw(k + 10 * v, 256, 1, 2, f.nbytes)
    pages = Pages(f, raw, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([PAGE]))
    keys, values, scales = read(pages)
    for h, token, d in ((0, 0, 0), (0, 127, 127), (1, 5, 21), (1, 77, 90), (1, 64, 32), (0, 31, 111), (0, 96, 3)):
        page = raw[0, h].numpy().tobytes()
        assert keys[0, h, token, d] == documented(page[: f.value_offset], k, PAGE, 128, token, d)
        assert values[0, h, token, d] == documented(page[f.value_offset : f.scale_offset], v, 128, PAGE, d, token)
        both = page[f.scale_offset + 4 * token :][:4]
        assert scales[0, h, token].view(torch.int16).numpy().tobytes() == both


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(64, 2, 3), (64, 4, 8), (128, 3, 3), (128, 8, 4), (256, 3, 2), (64, 16, 16)]),
    st.lists(st.tuples(st.integers(0, 383), st.integers(0, 200)), min_size=2, max_size=2),
    st.integers(0, 10**6),
)
def test_a_write_disturbs_nothing_else(form: tuple[int, int, int], spans: list[tuple[int, int]], seed: int) -> None:
    f, heads, n = Format(*form), 2, 200
    spans = [(start, min(count, 384 - start)) for start, count in spans]
    pool = draw(seed, 256, 8, heads, f.nbytes)
    table = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).int()[:6].reshape(2, 3)
    pages = Pages(f, pool, table, torch.zeros(2, dtype=torch.int32))
    before, old = pool.clone(), [x.clone() for x in read(pages)]
    new = [
        draw_codes(seed + 1, f.k, 2, heads, n, f.head_dim),
        draw_codes(seed + 2, f.v, 2, heads, n, f.head_dim),
        draw(seed + 3, 256, 2, heads, n, 4).view(torch.bfloat16),  # any bits, NaN too
    ]
    write(pages, *new, *(torch.tensor(x) for x in zip(*spans, strict=True)))
    for was, put in zip(old, new, strict=True):
        for b, (start, count) in enumerate(spans):
            was[b, :, start : start + count] = put[b, :, :count]
    for is_, expected in zip(read(pages), old, strict=True):
        assert torch.equal(is_.view(torch.uint8), expected.view(torch.uint8))
    unused = [p for p in range(8) if p not in table.flatten().tolist()]
    assert torch.equal(pool[unused], before[unused])


def test_tokens_may_come_in_any_order() -> None:
    f = Format(128, 3, 4)
    k, v, scales = draw(1, 8, 1, 1, 200, 128), draw(2, 16, 1, 1, 200, 128), draw(3, 256, 1, 1, 200, 4).view(torch.bfloat16)
    pools = []
    for spans in ([(0, 200)], [(130, 70), (0, 1), (1, 126), (127, 3)]):
        pages = Pages(f, torch.zeros(2, 1, f.nbytes, dtype=torch.uint8), torch.tensor([[1, 0]]), torch.zeros(1))
        for start, count in spans:
            some = [x[:, :, start : start + count] for x in (k, v, scales)]
            write(pages, *some, torch.tensor([start]), torch.tensor([count]))
        pools.append(pages.pool)
    assert torch.equal(*pools)


def test_sizes() -> None:
    assert Format(128, 4, 4).nbytes == PAGE * (64 + 64 + 4)
    assert Format(64, 8, 3).nbytes == PAGE * (64 + 24 + 4)


@pytest.mark.parametrize(("head_dim", "k", "v"), [(80, 4, 4), (128, 5, 4), (128, 4, 1), (64, 3, 4)])
def test_what_has_no_page_format_is_refused(head_dim: int, k: int, v: int) -> None:
    with pytest.raises(RecipeError, match=f"no page format for {k}-bit keys and {v}-bit values of size {head_dim}"):
        Format(head_dim, k, v)
