"""The Hopper kernel against float64, on a Hopper GPU. Elsewhere it is compiled (`test_compile`), and its twins are tested."""

import pytest
import torch
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.codecs.exact import ExactCodec
from kvstack.codecs.fp8 import Fp8Codec
from kvstack.codecs.polar import PolarCodec
from kvstack.codecs.rotation import rotation
from kvstack.kernels.codes import from_page
from kvstack.kernels.decode import Body, Exact, Path, decode, schedule
from kvstack.kernels.pages import PAGE, Format, Pages, read
from kvstack.kernels.reference import Shape

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not HOPPER, reason="this kernel runs on Hopper GPUs only")
PATH = Path("hopper", "")
RAGGED = (1, 127, 128, 0, 1000, 5000)
H = 2


def codec(bits: int, d: int, centre: bool) -> Codec:
    if bits == 16:
        return ExactCodec(d, torch.bfloat16)
    if bits == 8:
        return Fp8Codec(d)
    mean = torch.randn(H, d, device="cuda") if centre else None
    return PolarCodec(rotation(d, 0, torch.device("cuda")), bits, centre=mean)


def body(lengths: tuple[int, ...], d: int, k: int, v: int, centre: bool = False) -> Body:
    """Random codes in pages in random order, with more pages in the pool than are used; scales behind the ends are NaN."""
    f = Format(d, k, v)
    counts = [-(-n // PAGE) for n in lengths]
    order = torch.randperm(sum(counts) + 3, device="cuda").int()
    table = torch.zeros(len(lengths), max(1, *counts), dtype=torch.int32, device="cuda")
    for row, ids in zip(table, order[: sum(counts)].split(counts), strict=True):
        row[: len(ids)] = ids
    pool = torch.randint(0, 256, (len(order), H, f.nbytes), dtype=torch.uint8, device="cuda")
    scales = torch.rand(len(order), H, PAGE, 2, device="cuda") + 0.5
    for i, (bits, part) in enumerate(((k, pool[..., : f.value_offset]), (v, pool[..., f.value_offset : f.scale_offset]))):
        if bits == 8:
            part.copy_((torch.randn(part.shape, device="cuda") * 50).to(torch.float8_e4m3fn).view(torch.uint8))
            scales[..., i] /= 50
        elif bits == 16:
            part.copy_(torch.randn(*part.shape[:-1], part.shape[-1] // 2, device="cuda").bfloat16().view(torch.uint8))
            scales[..., i] = 1
        elif i == 1:
            scales[..., i] *= 20
    for b, n in enumerate(lengths):
        if n % PAGE:
            scales[table[b, n // PAGE].long(), :, n % PAGE :] = torch.nan
    pool[..., f.scale_offset :] = scales.bfloat16().view(torch.uint8).flatten(-2)
    pages = Pages(f, pool, table, torch.tensor(lengths, dtype=torch.int32, device="cuda"))
    return Body.of(pages, codec(k, d, centre), codec(v, d, centre))


def expected(q: Tensor, b: Body, exact: Exact | None, shape: Shape, sink: Tensor | None) -> Tensor:
    """One softmax in float64 over what the codes stand for, by the definition of the codecs."""
    k, v, scales = read(b.pages)
    sides = [
        c.decode(from_page(c, x, s)).double() for c, x, s in ((b.key, k, scales[..., 0]), (b.value, v, scales[..., 1]))
    ]  # [B, H, N, D]
    seen = (torch.arange(k.shape[2], device="cuda") < b.pages.lengths[:, None, None]).expand(-1, q.shape[2], -1)
    if exact is not None:
        sides = [torch.cat([x, y.double()], 2) for x, y in zip(sides, (exact.k, exact.v), strict=True)]
        seen = torch.cat([seen, exact.seen.expand(len(seen), q.shape[2], -1)], 2)
    keys, values = (x.masked_fill(~seen.any(1)[:, None, :, None], 0).repeat_interleave(q.shape[1] // H, 1) for x in sides)
    x = q.double() @ keys.transpose(-1, -2) * shape.scale
    if shape.softcap is not None:
        x = shape.softcap * torch.tanh(x / shape.softcap)
    x = x.masked_fill(~seen[:, None], -torch.inf)
    if sink is not None:
        x = torch.cat([x, sink.double()[None, :, None, None].expand(*x.shape[:3], 1)], -1)
    p = x.softmax(-1)[..., : keys.shape[2]].nan_to_num(0)
    return p @ values


def error(q: Tensor, b: Body, exact: Exact | None = None, softcap: float | None = None, sink: Tensor | None = None) -> float:
    shape = Shape(q.shape[-1] ** -0.5, softcap)
    got, again = (decode(q, b, exact, shape, sink, PATH) for _ in range(2))
    assert torch.equal(got, again)
    want = expected(q, b, exact, shape, sink)
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 2), (8, 8), (16, 16), (4, 2), (2, 3), (8, 4), (16, 4)])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_widths_and_head_sizes(d: int, bits: tuple[int, int]) -> None:
    if d == 64 and bits[0] == 3:
        pytest.skip("there is no such page format")
    torch.manual_seed(0)
    limit = 1e-5 if bits == (16, 16) else 2e-3
    assert error(torch.randn(len(RAGGED), 4 * H, 1, d, device="cuda"), body(RAGGED, d, *bits)) <= limit


@pytest.mark.parametrize(("g", "t"), [(1, 1), (4, 2), (7, 1), (16, 1), (4, 8), (16, 8)])
def test_groups_and_steps(g: int, t: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(len(RAGGED), t, g * H, 128, device="cuda").transpose(1, 2)
    assert error(q, body(RAGGED, 128, 4, 4)) <= 2e-3


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("t", [1, 3])
def test_centres_exact_tokens_sinks_and_soft_cap(t: int, softcap: float | None) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, len(RAGGED), H, 140, 128, device="cuda")
    seen = torch.rand(len(RAGGED), t, 140, device="cuda") < 0.5
    k[:, :, ~seen.any(0).any(0)] = torch.nan
    q, sink = torch.randn(len(RAGGED), 4 * H, t, 128, device="cuda"), torch.randn(4 * H, device="cuda")
    assert error(q, body(RAGGED, 128, 4, 4, centre=True), Exact(k, 10 * v, seen), softcap, sink) <= 2e-3


def test_a_million_tokens_are_no_less_exact() -> None:
    torch.manual_seed(0)
    short, long = (error(torch.randn(1, 4 * H, 1, 128, device="cuda"), body((n,), 128, 4, 4)) for n in (1 << 12, 1 << 20))
    assert long <= 2e-3 and long <= 2 * short


def test_pages_of_zeros_give_zeros() -> None:
    b = body((300,), 128, 4, 4)
    b.pages.pool[..., b.pages.format.scale_offset :] = 0
    out = decode(torch.randn(1, 4 * H, 1, 128, device="cuda"), b, None, Shape(0.1), path=PATH)
    assert torch.equal(out, torch.zeros_like(out))


def test_a_graph_follows_the_lengths() -> None:
    torch.manual_seed(0)
    b = body((1000, 1000), 128, 4, 4)
    q, shape = torch.randn(2, 4 * H, 1, 128, device="cuda"), Shape(0.1)
    b.pages.pool[..., b.pages.format.scale_offset :].view(torch.bfloat16).nan_to_num_(1.0)
    decode(q, b, None, shape, path=PATH)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(q, b, None, shape, path=PATH)
    for lengths in ([1000, 1000], [1, 700], [0, 128]):
        b.pages.lengths.copy_(torch.tensor(lengths))
        b.cum.copy_(schedule(b.pages.lengths, H))
        graph.replay()
        assert torch.equal(out, decode(q, b, None, shape, path=PATH))
