"""Linear scores over pages: the torch twin is TriAttention's own score of decoded keys, and the kernel is the twin.

Pools are poisoned: pages nobody owns, and what lies behind the ends of rows, have random codes and scales that are NaN.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from truth import error

from kvstack.codecs.base import Codec
from kvstack.codecs.exact import ExactCodec
from kvstack.codecs.fp8 import Fp8Codec
from kvstack.codecs.polar import PolarCodec
from kvstack.codecs.rotation import rotation
from kvstack.kernels import linear, linear_hopper, score
from kvstack.kernels.append import append
from kvstack.kernels.codes import page_format
from kvstack.kernels.decode import Path
from kvstack.kernels.pages import PAGE, Pages
from kvstack.kernels.score import score_linear
from kvstack.rope import Rope
from kvstack.scorers.base import QueryStats, View, by_group
from kvstack.scorers.tri import TriScorer, fold

torch.set_num_threads(1)
pytestmark = [  # all of Triton's interpreter; NaN is behind the ends of rows
    pytest.mark.filterwarnings(f"ignore:{what}")
    for what in ("Conversion of an array:DeprecationWarning", "All-NaN slice:RuntimeWarning", "invalid value:RuntimeWarning")
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability() == (9, 0)
H, SLOTS = 2, 3  # heads; pages of a row
RAGGED = (300, 0, 1, 129, 128, 384)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codec(bits: int, head_dim: int, **options: Any) -> Codec:
    if bits == 16:
        return ExactCodec(head_dim, torch.float16)
    return Fp8Codec(head_dim) if bits == 8 else PolarCodec(rotation(head_dim, 5, CPU), bits, **options)


def neighbours(head_dim: int) -> Rope:
    """Bands of neighbouring coordinates, the last of which do not turn."""
    rope = Rope.half(head_dim)
    return replace(rope, pairs=torch.arange(head_dim).view(-1, 2).T, frequency=rope.frequency * (rope.frequency > 1e-3))


@dataclass(frozen=True)
class Case:
    """Arguments of `score_linear`, and the keys `[B, H, N, D]` that the codes stand for."""

    pages: Pages
    key: Codec
    rope: Rope
    w: Tensor
    c: Tensor
    keys: Tensor

    def on(self, device: torch.device) -> tuple[Pages, Codec, Rope, Tensor, Tensor]:
        """The arguments on a device; the codec is changed in place."""
        p = Pages(self.pages.format, *(t.to(device) for t in (self.pages.pool, self.pages.table, self.pages.lengths)))
        for name, x in vars(self.key).items():
            if isinstance(x, Tensor):
                setattr(self.key, name, x.to(device))
        return p, self.key, self.rope, self.w.to(device), self.c.to(device)


def case(
    key: Codec, head_dim: int, groups: int = 4, lengths: tuple[int, ...] = RAGGED, rope: Rope | None = None, size: float = 1.0
) -> Case:
    value, rows = codec(2, head_dim), len(lengths)
    f = page_format(head_dim, key, value)
    random = torch.Generator().manual_seed(7)
    pool = torch.randint(256, (rows * SLOTS + 1, H, f.nbytes), dtype=torch.uint8, generator=random)
    pool[..., f.scale_offset :] = torch.full((PAGE, 2), math.nan).bfloat16().view(torch.uint8).flatten()
    table = torch.randperm(rows * SLOTS, generator=random).view(rows, SLOTS).int()
    pages = Pages(f, pool, table, torch.tensor(lengths, dtype=torch.int32))
    k = draw(1, rows, H, SLOTS * PAGE, head_dim) * size * torch.exp(draw(2, head_dim))  # channels of many sizes
    append(pages, key, value, k, k, torch.zeros_like(pages.lengths), pages.lengths)
    w, c = draw(3, rows, H, groups, head_dim), draw(4, H, groups, head_dim // 2).abs()
    return Case(pages, key, rope or Rope.half(head_dim), w / size, c / size, key.decode(key.encode(k)))


def check(c: Case, way: Any = linear, bound: float = 5e-4) -> None:
    wanted, found = score_linear(*c.on(CPU)), way.score_pages(*c.on(DEVICE)).cpu()
    assert found.shape == wanted.shape and found.dtype == wanted.dtype == torch.float32
    behind = torch.arange(wanted.shape[-1]) >= c.pages.lengths[:, None]
    for x in (wanted, found):
        assert bool((x.movedim(-1, 1)[behind] == 0).all())
    for b in c.pages.lengths.nonzero().flatten().tolist():
        assert error(found[b], wanted[b]) < bound


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
@pytest.mark.parametrize("rope", [Rope.half(128), neighbours(128)], ids=["halves", "neighbours"])
def test_the_twin_is_the_score_of_the_scorer(rope: Rope, bits: int) -> None:
    """Of keys that the codec decodes, with W as a vector."""
    groups, stats = 3, QueryStats(torch.complex(draw(5, 3 * H, 64), draw(6, 3 * H, 64)), 2 + draw(7, 3 * H, 64).abs())
    c, seen = case(codec(bits, 128), 128, groups, rope=rope), torch.tensor([5000, 0, 1, 129, 100_000, 384])
    turned, rest = fold(stats, rope, seen)
    w = by_group(rope.vectors(turned), H)
    valid = (torch.arange(SLOTS * PAGE) < c.pages.lengths[:, None, None]).expand(-1, H, -1)
    view = View.of_keys(c.keys, None, valid, torch.zeros_like(valid).long(), seen, 1.0)
    found = score_linear(c.pages, c.key, rope, w, rest.unflatten(0, (H, groups)))
    wanted = TriScorer(stats, rope, view.key.shape[1]).raw(view)
    assert found.shape == wanted.shape and error(found, wanted) < 1e-5


@pytest.mark.parametrize(("head_dim", "bits"), [(d, bits) for d in (64, 128, 256) for bits in (2, 3, 4, 8, 16) if (d, bits) != (64, 3)])
def test_widths_and_head_sizes(head_dim: int, bits: int) -> None:
    check(case(codec(bits, head_dim), head_dim))


@pytest.mark.parametrize("groups", [1, 7, 16])
@pytest.mark.parametrize("rope", [Rope.half(64), neighbours(64)], ids=["halves", "neighbours"])
def test_query_heads_and_pairs(rope: Rope, groups: int) -> None:
    check(case(codec(4, 64), 64, groups, (130, 20), rope))


def test_rows_with_factors_of_their_own() -> None:
    c = case(codec(4, 64), 64, 3, (130, 20))
    own = torch.stack([c.c, draw(9, *c.c.shape).abs()])  # [B, H, G, D / 2]
    check(replace(c, c=own))
    found = score_linear(*replace(c, c=own).on(CPU))
    for b in range(2):
        assert torch.equal(found[b], score_linear(*replace(c, c=own[b]).on(CPU))[b])


def test_more_query_heads_than_a_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(codec(4, 64), 64, 20, (130, 20))
    wanted = score_linear(*c.on(CPU))
    if DEVICE == CPU:  # by the interpreter
        monkeypatch.setattr(score, "choose", lambda *_: Path("portable", "asked for"))
    assert error(score_linear(*c.on(DEVICE)).cpu(), wanted) < 5e-4


@pytest.mark.parametrize("options", [{}, {"codebook": "exact", "scale": "unbiased"}])
def test_a_codec_with_a_centre(options: dict[str, Any]) -> None:
    check(case(codec(4, 128, centre=10 * draw(9, H, 128), **options), 128, lengths=(200, 3)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_norms_of_any_size(size: float, bits: int) -> None:
    """Of keys; weights are as much smaller."""
    check(case(codec(bits, 64), 64, lengths=(100,), size=size))


def test_rows_and_heads_have_their_own_weights() -> None:
    """A weight that is zero but for one head of one row leaves all others at zero."""
    c = case(codec(4, 64), 64, 2, (140, 140))
    w = torch.zeros_like(c.w)
    w[1, 0, 1] = c.w[1, 0, 1]
    found = linear.score_pages(*replace(c, w=w, c=torch.zeros_like(c.c)).on(DEVICE)).cpu()
    assert bool(found[1, 0, 1, :140].all()) and found.count_nonzero() == 140


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU")
def test_numbers_of_bfloat16() -> None:
    """Which Triton's interpreter gets wrong."""
    check(case(ExactCodec(128, torch.bfloat16), 128))


@pytest.mark.skipif(not HOPPER, reason="there is no Hopper GPU")
@pytest.mark.parametrize("rope", ["halves", "neighbours"])
@pytest.mark.parametrize("groups", [1, 4, 7, 16])
@pytest.mark.parametrize(
    ("head_dim", "bits"), [(d, bits) for d in linear_hopper.HEAD_DIMS for bits in (2, 3, 4, 8, 16) if (d, bits) != (64, 3)]
)
def test_hopper(head_dim: int, bits: int, groups: int, rope: str) -> None:
    """With and without a centre, in 16 bits of both types, and with norms of any size."""
    turn = Rope.half(head_dim) if rope == "halves" else neighbours(head_dim)
    for size in (1.0, 1e-3, 1e3):
        keys = [codec(bits, head_dim)]
        if bits < 8:
            keys.append(codec(bits, head_dim, centre=10 * draw(9, H, head_dim)))
        if bits == 16:
            keys.append(ExactCodec(head_dim, torch.bfloat16))
        for key in keys:
            check(case(key, head_dim, groups, rope=turn, size=size), linear_hopper)
