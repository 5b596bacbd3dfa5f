"""Attention of a chunk over pages by the kernels against the reference: in the interpreter, or by the device's own kernel."""

import pytest
import torch

from kvstack.bench import own
from kvstack.bench.problem import Problem
from kvstack.codecs.polar import PolarCodec
from kvstack.codecs.rotation import rotation
from kvstack.kernels import past
from kvstack.kernels.decode import LOG2_E, Body, Path, choose
from kvstack.kernels.pages import PAGE, Format
from kvstack.kernels.past import attend_past
from kvstack.kernels.reference import Shape

pytest.importorskip("triton")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # in Triton's interpreter
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LENGTHS = (130, 0, 300)
H, G, T = 2, 2, 11


def body(k: int, v: int, d: int) -> Body:
    """Random codes, with centres: every launch has something to do."""
    key, value = (
        PolarCodec(rotation(d, seed, DEVICE), bits, centre=torch.randn(H, d, device=DEVICE)) for seed, bits in ((0, k), (1, v))
    )
    return Body.of(own.random_pages(Format(d, k, v), Problem(LENGTHS, G * H, H, d), DEVICE), key, value)


@pytest.mark.parametrize(("d", "softcap"), [(64, None), (64, 3.0), (128, None), (256, 3.0)])
@pytest.mark.parametrize("parts", [1, 3])
def test_it_is_the_partial_of_the_reference(monkeypatch: pytest.MonkeyPatch, parts: int, d: int, softcap: float | None) -> None:
    torch.manual_seed(0)
    b, shape = body(4, 3, d), Shape(d**-0.5, softcap)
    q = torch.randn(len(LENGTHS), T, G * H, d, device=DEVICE).transpose(1, 2)
    want = attend_past(q, b, shape, Path("reference", ""))
    path = choose(DEVICE, b.key, b.value) if GPU else Path("portable", "")
    monkeypatch.setattr(past, "splits", lambda *_: parts)
    got = attend_past(q, b, shape, path)
    assert (got.out - want.out).norm() <= 1e-3 * want.out.norm()
    assert torch.equal(got.lse.isfinite(), want.lse.isfinite()) and (got.out[1] == 0).all()
    some = want.lse.isfinite()
    assert (got.lse - want.lse)[some].abs().max() <= 2e-3


@pytest.mark.parametrize("size", [2.0**-4, 1.0, 2.0**4, 2.0**8])
def test_logits_of_any_size(size: float) -> None:
    """Older pages are the heavier ones. The kernel for Hopper comes to them last: it has to raise what its weights are relative to, and
    with the two largest sizes to do all pages again. Numbers are such that float16 holds them exactly."""
    torch.manual_seed(0)
    lengths, d = (700, 40, 300), 128
    key, value = (PolarCodec(rotation(d, seed, DEVICE), 4) for seed in (0, 1))
    assert key.transform is not None
    b = Body.of(own.random_pages(Format(d, 4, 4), Problem(lengths, G * H, H, d), DEVICE), key, value)
    scales = b.pages.pool[..., b.pages.format.scale_offset :].view(torch.bfloat16).unflatten(-1, (PAGE, 2))
    for row, n in zip(b.pages.table, lengths, strict=True):
        for i in range(-(-n // PAGE)):
            scales[row[i].long(), :, : n - i * PAGE, 0] = 2.0**-i
    q = torch.randint(-2, 3, (len(lengths), G * H, T, d), device=DEVICE).float() @ key.transform
    shape = Shape(size / LOG2_E)
    want = attend_past(q, b, shape, Path("reference", ""))
    got = attend_past(q, b, shape, choose(DEVICE, b.key, b.value) if GPU else Path("portable", ""))
    assert (got.out - want.out).norm() <= 2e-3 * want.out.norm()
    assert torch.allclose(got.lse, want.lse, rtol=1e-4, atol=2e-3)


def test_few_queries_share_a_long_past_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past, "processors", lambda _: 132)
    assert past.splits(512, 256, DEVICE) == 1  # there is enough to do
    assert past.splits(16, 256, DEVICE) == 8
    assert past.splits(16, 20, DEVICE) == 2  # of eight pages at least
    assert past.splits(1, 3, DEVICE) == 1
