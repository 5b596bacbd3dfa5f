"""Attention of a chunk over pages by the kernels against the reference: in the interpreter, or by the device's own kernel."""

import pytest
import torch

from kvstack.bench import own
from kvstack.bench.problem import Problem
from kvstack.codecs.polar import PolarCodec
from kvstack.codecs.rotation import rotation
from kvstack.kernels import past
from kvstack.kernels.decode import Body, Path, choose
from kvstack.kernels.pages import Format
from kvstack.kernels.past import attend_past
from kvstack.kernels.reference import Shape

pytest.importorskip("triton")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # in Triton's interpreter
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LENGTHS = (130, 0, 300)
H, G, D, T = 2, 2, 64, 11


def body(k: int, v: int) -> Body:
    """Random codes, with centres: every launch has something to do."""
    key, value = (
        PolarCodec(rotation(D, seed, DEVICE), bits, codebook="e4m3", centre=torch.randn(H, D, device=DEVICE))
        for seed, bits in ((0, k), (1, v))
    )
    return Body.of(own.random_pages(Format(D, k, v), Problem(LENGTHS, G * H, H, D), DEVICE), key, value)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("parts", [1, 3])
def test_it_is_the_partial_of_the_reference(monkeypatch: pytest.MonkeyPatch, parts: int, softcap: float | None) -> None:
    torch.manual_seed(0)
    b, shape = body(4, 3), Shape(D**-0.5, softcap)
    q = torch.randn(len(LENGTHS), T, G * H, D, device=DEVICE).transpose(1, 2)
    want = attend_past(q, b, shape, Path("reference", ""))
    path = choose(DEVICE, b.key, b.value) if GPU else Path("portable", "")
    monkeypatch.setattr(past, "splits", lambda *_: parts)
    got = attend_past(q, b, shape, path)
    assert (got.out - want.out).norm() <= 1e-3 * want.out.norm()
    assert torch.equal(got.lse.isfinite(), want.lse.isfinite()) and (got.out[1] == 0).all()
    some = want.lse.isfinite()
    assert (got.lse - want.lse)[some].abs().max() <= 2e-3


def test_few_queries_share_a_long_past_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past, "processors", lambda _: 132)
    assert past.splits(512, 256, DEVICE) == 1  # there is enough to do
    assert past.splits(16, 256, DEVICE) == 8
    assert past.splits(16, 20, DEVICE) == 2  # of eight pages at least
    assert past.splits(1, 3, DEVICE) == 1
