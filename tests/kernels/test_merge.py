"""Merging partials in a kernel is `reference.merge` of them, moved back by the codec. Slots that the schedule does not name are NaN."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvstack.codecs.polar import PolarCodec
from kvstack.codecs.rotation import rotation
from kvstack.kernels import reference
from kvstack.kernels.decode import schedule
from kvstack.kernels.merge import merge_partials
from kvstack.kernels.pages import PAGE
from kvstack.kernels.reference import Partial
from kvstack.kernels.rotate import signs

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # in Triton's interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, GROUPS, STEPS = 2, 2, 2
RAGGED = (7 * PAGE, 0, 2 * PAGE + 1)
LOG2_E = math.log2(math.e)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def codec(head_dim: int, centre: bool) -> PolarCodec:
    return PolarCodec(rotation(head_dim, 5, DEVICE), 4, centre=draw(9, HEADS, head_dim) if centre else None)


def empty(batch: int, head_dim: int) -> Partial:
    """What a tier without tokens gives."""
    shape = batch, HEADS * GROUPS, STEPS
    return Partial(torch.zeros(*shape, head_dim, device=DEVICE), torch.full(shape, -math.inf, device=DEVICE))


@dataclass(frozen=True)
class Parts:
    """Arguments of `merge_partials`, and the same for `reference.merge`, in latent space."""

    args: tuple[Tensor, Tensor]
    cum: Tensor
    programs: int
    plain: list[Partial]


def over_pages(lengths: Sequence[int], programs: int, head_dim: int) -> Parts:
    """Random partials in the slots of the pairs of a program and a segment that meet; NaN in the others."""
    rows, segments = GROUPS * STEPS, len(lengths) * HEADS
    out = torch.full((programs + segments, rows, head_dim), math.nan, device=DEVICE)
    lse2 = torch.full((programs + segments, rows), math.nan, device=DEVICE)
    plain: list[Partial] = []
    pages = [-(-n // PAGE) for n in lengths]
    tiles = [(b, h) for b, n in enumerate(pages) for h in range(HEADS) for _ in range(n)]  # in the order of the line
    share = max(1, -(-len(tiles) // programs))
    met: dict[tuple[int, int], list[int]] = {}
    for i, segment in enumerate(tiles):
        if i // share not in met.setdefault(segment, []):
            met[segment].append(i // share)
    for (b, h), who in met.items():
        segment = b * HEADS + h
        for i, program in enumerate(who):
            slot = program + segment
            assert bool(lse2[slot].isnan().all()), "two pairs in one slot"
            out[slot], lse2[slot] = draw(slot, rows, head_dim), 3 * draw(slot + 1000, rows)
            if i == len(plain):
                plain.append(empty(len(lengths), head_dim))
            heads = slice(h * GROUPS, (h + 1) * GROUPS)
            plain[i].out[b, heads] = out[slot].unflatten(0, (GROUPS, STEPS))
            plain[i].lse[b, heads] = lse2[slot].unflatten(0, (GROUPS, STEPS)) / LOG2_E
    return Parts((out, lse2), schedule(torch.tensor(lengths, device=DEVICE), HEADS), programs, plain)


def over_exact(batch: int, blocks: int, head_dim: int, seen: float = 0.7) -> tuple[tuple[Tensor, Tensor], list[Partial]]:
    """Partials as `attend_exact` gives them, some of blocks where a query sees nothing; and the same for `reference.merge`."""
    rows = GROUPS * STEPS
    out, lse2 = draw(1, batch * HEADS, blocks, rows, head_dim), 3 * draw(2, batch * HEADS, blocks, rows)
    hidden = torch.rand(lse2.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE) >= seen
    out, lse2 = out.masked_fill(hidden[..., None], 0), lse2.masked_fill(hidden, -math.inf)
    shape = batch, HEADS * GROUPS, STEPS
    plain = [Partial(out[:, i].reshape(*shape, head_dim), lse2[:, i].reshape(shape) / LOG2_E) for i in range(blocks)]
    return (out, lse2), plain


def moved_back(part: Partial, codec: PolarCodec | None) -> Partial:
    if codec is None:
        return part
    b, _, _, d = part.out.shape
    out = codec.unproject(part.out.reshape(b, HEADS, -1, d)).reshape(part.out.shape)
    return Partial(out.masked_fill((part.lse == -math.inf)[..., None], 0), part.lse)


def check(
    body: Parts | None,
    exact: tuple[tuple[Tensor, Tensor], list[Partial]] | None,
    side: PolarCodec | None = None,
    sink: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    bound: float = 1e-6,
) -> Tensor:
    plain = [moved_back(p, side) for p in body.plain] if body else []
    plain += exact[1] if exact else []
    expected = reference.merge(plain, sink).out
    out = torch.full_like(expected, math.nan, dtype=dtype)
    line = (body.cum, body.programs) if body else (None, 0)
    turn = (signs(side), side.centre) if side else (None, None)
    merge_partials(out, body and body.args, exact and exact[0], *line, *turn, sink, HEADS)
    assert float((out - expected).norm() / expected.norm()) < bound
    nothing = (expected == 0).all(-1)
    assert not out[nothing].any()
    return out


# The partials that are expected of a segment, programs // 6 + 2, choose the block and the warps.
@pytest.mark.parametrize("programs", [1, 12, 18, 84, 90, 500])
def test_slots_of_few_and_of_many_programs(programs: int) -> None:
    out = check(over_pages(RAGGED, programs, 128), None, codec(128, centre=True))
    assert not out[1].any() and out[[0, 2]].any(-1).all()


def test_more_partials_than_one_block() -> None:
    """One long row has many more partials than are expected of it."""
    for programs, block in ((8, 4), (56, 16), (300, 64)):
        body = over_pages((0, 90 * PAGE, 0, 0), programs, 64)
        assert len(body.plain) > block
        check(body, None, codec(64, centre=False))


@pytest.mark.parametrize(
    ("head_dim", "with_body", "with_exact"),
    [(64, True, False), (64, False, True), (64, True, True), (128, True, True), (256, True, True)],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_tiers_and_sinks(head_dim: int, with_body: bool, with_exact: bool, sinks: bool) -> None:
    body = over_pages(RAGGED, 5, head_dim) if with_body else None
    exact = over_exact(len(RAGGED), 3, head_dim) if with_exact else None
    sink = draw(4, HEADS * GROUPS).half() if sinks else None
    check(body, exact, codec(head_dim, centre=True) if with_body else None, sink)


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("rotate", [False, True])
def test_rotation_and_centre_are_of_the_body_alone(rotate: bool, centre: bool) -> None:
    side = codec(128, centre)
    if not rotate:
        side.transform = None
    check(over_pages(RAGGED, 5, 128), over_exact(len(RAGGED), 2, 128), side)


def test_many_blocks_of_exact_tokens() -> None:
    """More than one block of partials, with one row that sees none of them."""
    (out, lse2), plain = over_exact(2, 6, 64)
    out[HEADS:], lse2[HEADS:] = 0, -math.inf
    for part in plain:
        part.out[1], part.lse[1] = 0, -math.inf
    assert not check(None, ((out, lse2), plain))[1].any()


def test_weights_do_not_overflow() -> None:
    body, (args, plain) = over_pages(RAGGED, 5, 64), over_exact(len(RAGGED), 2, 64)
    for lse2, parts in ((body.args[1], body.plain), (args[1], plain)):  # float32 has no such power of 2
        lse2.add_(5000)
        for part in parts:
            part.lse.add_(5000 / LOG2_E)
    check(body, (args, plain), codec(64, centre=True), bound=1e-3)  # float32 has 11 bits behind the point of 5000


@pytest.mark.parametrize("sinks", [False, True])
def test_nothing_seen_gives_zeros(sinks: bool) -> None:
    sink = draw(4, HEADS * GROUPS) if sinks else None
    body, (args, _) = over_pages((0, 0), 5, 64), over_exact(2, 2, 64, seen=0)
    assert not body.plain
    out = torch.full((2, HEADS * GROUPS, STEPS, 64), math.nan, device=DEVICE)
    merge_partials(out, body.args, args, body.cum, 5, None, None, sink, HEADS)
    assert torch.equal(out, torch.zeros_like(out))


def test_output_in_16_bits() -> None:
    args = over_pages(RAGGED, 5, 128), over_exact(len(RAGGED), 2, 128), codec(128, centre=True)
    long, short = check(*args), check(*args, dtype=torch.float16, bound=4e-4)
    assert torch.equal(short, long.half())
