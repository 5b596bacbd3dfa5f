"""A decode step through the portable kernels is what the torch path computes, in buffers poisoned with NaN; and who decides what."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.codecs.exact import ExactCodec
from kvstack.codecs.fp8 import Fp8Codec
from kvstack.codecs.polar import PolarCodec
from kvstack.codecs.rotation import rotation
from kvstack.kernels.append import append
from kvstack.kernels.decode import Body, Exact, Path, choose, decode, schedule
from kvstack.kernels.pages import PAGE, Format, Pages
from kvstack.kernels.reference import Shape

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # in Triton's interpreter

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HEADS = 2
PORTABLE, REFERENCE = Path("portable", "asked for"), Path("reference", "asked for")


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def codec(bits: int, head_dim: int, centre: bool = False, **options: Any) -> Codec:
    if bits == 16:
        return ExactCodec(head_dim, torch.float16)
    if bits == 8:
        return Fp8Codec(head_dim)
    return PolarCodec(rotation(head_dim, 5, DEVICE), bits, centre=draw(9, HEADS, head_dim) if centre else None, **options)


def filled(key: Codec, value: Codec, f: Format, lengths: tuple[int, ...]) -> Body:
    """Gaussian tokens in pages in random order; everything else is poison, and tables end in a page that nobody owns."""
    counts = [-(-n // PAGE) for n in lengths]
    ids = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(sum(lengths))).int()
    table = ids[-1].repeat(len(lengths), max(counts) + 1)
    for row, own in zip(table, ids[: sum(counts)].split(counts), strict=True):
        row[: len(own)] = own
    pool = torch.full((len(ids), HEADS, f.nbytes), 0x77, dtype=torch.uint8, device=DEVICE)  # codes of large numbers
    pool[..., f.scale_offset :] = 0xFF  # scales that are NaN
    pages = Pages(f, pool, table.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    k, v = (draw(seed, len(lengths), HEADS, max(lengths), f.head_dim, dtype=torch.float16) for seed in (1, 2))
    append(pages, key, value, k, v, torch.zeros_like(pages.lengths), pages.lengths)
    return Body.of(pages, key, value)


def near(batch: int, steps: int, head_dim: int, dtype: torch.dtype) -> Exact:
    """Exact tokens of which the queries see some, each others; NaN where a row sees nothing."""
    seen = draw(3, batch, steps, 70) > 0
    seen[0] = False
    unseen = ~seen.any(1)[:, None, :, None]
    k, v = (draw(seed, batch, HEADS, 70, head_dim, dtype=dtype).masked_fill(unseen, math.nan) for seed in (4, 5))
    return Exact(k, v, seen)


@dataclass(frozen=True)
class Case:
    k: int = 4
    v: int = 4
    head_dim: int = 64
    groups: int = 2
    steps: int = 1
    dtype: torch.dtype = torch.float16
    options: tuple[tuple[str, Any], ...] = ()
    exact: bool = True
    sink: bool = False
    softcap: float | None = None


CASES = {
    "plain": Case(exact=False, options=(("codebook", "exact"),)),
    "two tiers": Case(head_dim=128),
    "keys without rotation": Case(8, 3, groups=1, steps=2),
    "values without rotation": Case(2, 8, head_dim=128, groups=7, options=(("codebook", "exact"),)),
    "centre": Case(options=(("centre", True), ("scale", "unbiased")), steps=2),
    "soft cap and sinks": Case(4, 2, head_dim=128, softcap=2.0, sink=True),
    "everything": Case(3, 4, 256, 3, 2, torch.float32, (("centre", True),), True, True, 5.0),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_what_the_torch_path_computes(name: str) -> None:
    c, lengths = CASES[name], (200, 0, 129)
    key, value = (codec(bits, c.head_dim, **dict(c.options)) for bits in (c.k, c.v))
    body = filled(key, value, Format(c.head_dim, c.k, c.v), lengths)
    q = draw(6, len(lengths), c.steps, HEADS * c.groups, c.head_dim, dtype=c.dtype).transpose(1, 2)
    exact = near(len(lengths), c.steps, c.head_dim, c.dtype) if c.exact else None
    sink = draw(7, HEADS * c.groups) if c.sink else None
    args = q, body, exact, Shape(2 * c.head_dim**-0.5, c.softcap), sink
    found, expected = decode(*args, PORTABLE), decode(*args, REFERENCE)
    assert found.dtype == c.dtype and found.shape == q.shape
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < 1e-3
    if not c.exact:
        assert not found[1].any()  # a row without tokens


@pytest.mark.parametrize("steps", [1, 2])
def test_exact_tokens_alone(steps: int) -> None:
    q, exact, sink = draw(6, 3, 4, steps, 64), near(3, steps, 64, torch.float32), draw(7, 4)
    found, expected = (decode(q, None, exact, Shape(0.2, 5.0), sink, path) for path in (PORTABLE, REFERENCE))
    assert float((found - expected).norm() / expected.norm()) < 1e-5 and not found[0].any() and not expected[0].any()


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_torch_path_reads_what_was_stored(bits: int) -> None:
    """Against attention over the decoded vectors, written out."""
    key, value, lengths = codec(bits, 128, centre=True), codec(bits, 128), (200, 60)
    body = filled(key, value, Format(128, bits, bits), lengths)
    q, sink = draw(6, 2, 4, 2, 128), draw(7, 4)
    found = decode(q, body, None, Shape(0.1), sink, REFERENCE)
    for b, n in enumerate(lengths):
        k, v = (draw(seed, 2, HEADS, 200, 128, dtype=torch.float16)[b : b + 1, :, :n] for seed in (1, 2))
        k, v = (c.decode(c.encode(x)).double().repeat_interleave(2, 1)[0] for c, x in ((key, k), (value, v)))
        logits = torch.cat([q[b].double() @ k.mT * 0.1, sink.double()[:, None, None].expand(-1, 2, 1)], -1)
        expected = logits.softmax(-1)[..., :-1] @ v
        # The encoding kernel of a GPU may round a coordinate on an edge the other way.
        assert float((found[b] - expected).norm() / expected.norm()) < (2e-3 if GPU else 3e-6)


def test_without_a_path_the_device_decides() -> None:
    body = filled(codec(4, 64), codec(4, 64), Format(64, 4, 4), (130, 5))
    q, exact = draw(6, 2, 4, 1, 64), near(2, 1, 64, torch.float32)
    for args in ((q, body, exact), (q, None, exact)):
        path = choose(DEVICE) if args[1] is None else body.path
        assert torch.equal(decode(*args, Shape(0.1)), decode(*args, Shape(0.1), path=path))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=6), st.integers(1, 4))
def test_a_schedule_counts_the_pages_of_all_heads(lengths: list[int], heads: int) -> None:
    cum = schedule(torch.tensor(lengths, dtype=torch.int32), heads)
    pages = [len(range(0, n, PAGE)) * heads for n in lengths]
    assert cum.dtype == torch.int32 and cum.tolist() == list(itertools.accumulate(pages, initial=0))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_there_is_no_kernel_for_other_devices(device: str) -> None:
    assert choose(torch.device(device), codec(4, 64)) == Path("reference", f"there is no kernel for {device} devices")


@pytest.mark.skipif(not GPU, reason="there is no GPU")
def test_the_path_on_a_gpu() -> None:
    hopper = torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)
    e4m3, other = codec(4, 128), codec(4, 128, codebook="exact")
    assert choose(DEVICE, e4m3, Fp8Codec(128)).name == ("hopper" if hopper else "portable")
    assert choose(DEVICE, e4m3, other).name == "portable"
    assert choose(DEVICE, codec(16, 128)).name == ("hopper" if hopper else "reference")


@pytest.mark.parametrize(("k", "v"), [(4, 3), (2, 4), (3, 2), (8, 4), (4, 8)])
def test_tables_hold_the_levels_as_the_byte_permutation_looks_them_up(k: int, v: int) -> None:
    body = filled(codec(k, 128), codec(v, 128), Format(128, k, v), (1,))
    for side, bits, levels, table in zip((body.key, body.value), (k, v), body.levels, body.tables, strict=True):
        assert table.shape == (2, 4) and table.dtype == torch.int32 and bool((table == table[:, :1]).all())
        numbers = [int(table[i // 4, 0]) >> 8 * (i % 4) & 0xFF for i in range(8)]  # selector i takes byte i
        found = torch.tensor(numbers, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        if bits == 8:
            assert not found.any()
        else:
            assert isinstance(side, PolarCodec) and levels is side.levels
            wanted = levels[levels > 0] if bits == 4 else levels
            assert torch.equal(found[: len(wanted)], wanted.cpu()) and not found[len(wanted) :].any()


def test_what_a_body_knows_of_its_codecs() -> None:
    body = filled(codec(4, 128), codec(8, 128), Format(128, 4, 8), (1,))
    key, value = body.signs
    assert key is not None and body.key.transform is not None and torch.equal(key, body.key.transform[0]) and value is None
    assert body.half == torch.bfloat16
    assert Body.of(body.pages, codec(16, 128), codec(16, 128)).half == torch.float16
