"""Low-rank decode: the twin equals attention with every head's keys and values written out, and the kernel equals the twin."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from truth import error

from kvstack.kernels import lowrank_hopper, lowrank_reference
from kvstack.kernels.lowrank import lowrank_decode
from kvstack.kernels.lowrank_hopper import EXACT, LEAST, NOPE, ROWS, Tile, shape, splits
from kvstack.kernels.lowrank_reference import Rebuild
from kvstack.rope import Rope

torch.set_num_threads(1)

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BOUNDS = {torch.float16: 1e-3, **({torch.bfloat16: 8e-3} if GPU else {torch.float32: 1e-5})}  # the interpreter has no bfloat16
BEST = {"nope": NOPE, "exact": EXACT}


class Case:
    """Queries and records of rows of `lengths` in buffers of `slots`, NaN behind them, and attention in float64 from full keys."""

    def __init__(
        self, variant: str, lengths: tuple[int, ...], heads: int, head_dim: int, rank: int, dtype: torch.dtype, slots: int = 0
    ):
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        generator = torch.Generator().manual_seed(0)
        b, n, rope = len(lengths), slots or max(lengths), Rope.half(head_dim, device=DEVICE)
        self.lengths, self.scale = torch.tensor(lengths, dtype=torch.int32, device=DEVICE), head_dim**-0.5
        offsets = torch.arange(b, dtype=torch.int32, device=DEVICE) * 3
        self.position = offsets[:, None] + torch.arange(n, device=DEVICE)
        q, up, self.up_v = draw(b, heads, head_dim), draw(heads, head_dim, rank) / rank**0.5, draw(heads, head_dim, rank)
        k, latent = draw(b, n, head_dim), draw(b, n, heads, rank)
        now = self.lengths + offsets
        turned = rope.turn(q, now[:, None].expand(b, heads))
        k_turned = rope.turn(k, self.position)
        self.q = turned.to(dtype)[:, :, None]
        phase = rope.phase(torch.arange(n + 3 * b, device=DEVICE))
        residual = torch.einsum("bhd,hdr->bhr", q.float(), up.float()).to(dtype)
        self.residual = residual if variant == "nope" else Rebuild(up, phase.real.contiguous(), phase.imag.contiguous(), offsets)
        self.keys = torch.cat([k_turned.to(dtype), latent.flatten(2)], 2)
        self.values = draw(b, n, head_dim + heads * rank)
        behind = torch.arange(n, device=DEVICE) >= self.lengths[:, None]
        rebuilt = torch.einsum("hdr,bnhr->bhnd", up.float(), latent.float())
        if variant == "nope":
            x = torch.einsum("bhd,bnd->bhn", turned, k_turned) + torch.einsum("bhd,bhnd->bhn", q.float(), rebuilt)
        else:
            full = rope.turn(k[:, None].float() + rebuilt, self.position[:, None].expand(b, heads, n))
            x = torch.einsum("bhd,bhnd->bhn", turned, full)
        weights = (x.double() * self.scale).masked_fill(behind[:, None], -math.inf).softmax(-1).nan_to_num(0)
        v, v_latent = lowrank_reference.split(self.values.double(), heads, head_dim)
        full_v = v[:, None] + torch.einsum("hdr,bnhr->bhnd", self.up_v.double(), v_latent)
        self.want = torch.einsum("bhn,bhnd->bhd", weights, full_v)
        for records in (self.keys, self.values):
            records.masked_fill_(behind[..., None], math.nan)

    @property
    def args(self) -> tuple[Tensor, Tensor | Rebuild, Tensor, Tensor, Tensor, float]:
        return self.q, self.residual, self.keys, self.values, self.lengths, self.scale

    def out(self, means: tuple[Tensor, Tensor]) -> Tensor:
        """Attention `[B, H, D]` from both means."""
        shared, latent = (m.double() for m in means)
        return shared + torch.einsum("hdr,bhr->bhd", self.up_v.double(), latent)


def check(case: Case, tile: Tile) -> None:
    """The kernel against the twin, each mean by itself. Tables and queries of exact residuals are float16 in the kernel."""
    got, want = lowrank_hopper.attend(*case.args, tile), lowrank_reference.attend(*case.args)
    rounded = 1e-3 if isinstance(case.residual, Rebuild) else 0
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype and error(x.double(), y.double()) < max(BOUNDS[x.dtype], rounded)


@pytest.mark.parametrize("variant", BEST)
@pytest.mark.parametrize(("heads", "head_dim", "rank"), [(4, 64, 12), (3, 128, 60), (1, 64, 5), (2, 64, 1)])
def test_the_twin_is_attention_with_full_keys_and_values(variant: str, heads: int, head_dim: int, rank: int) -> None:
    case = Case(variant, (50, 1, 33), heads, head_dim, rank, torch.float32)
    assert error(case.out(lowrank_reference.attend(*case.args)), case.want) < 2e-6


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("variant", BEST)
@pytest.mark.parametrize(
    ("heads", "head_dim", "rank"), [(32, 128, 60), (32, 64, 24), (8, 128, 56), (6, 64, 46), (4, 256, 64), (12, 64, 51), (1, 64, 5)]
)
def test_heads_and_ranks(heads: int, head_dim: int, rank: int, variant: str, dtype: torch.dtype) -> None:
    check(Case(variant, (70, 1), heads, head_dim, rank, dtype), BEST[variant])


@pytest.mark.parametrize("tile", [NOPE, EXACT, Tile(tokens=16, columns=128, warps=4, stages=3, resident=2)])
@pytest.mark.parametrize("variant", BEST)
def test_any_tile(variant: str, tile: Tile) -> None:
    case = Case(variant, (130, 32, 65), 8, 64, 30, torch.float16)
    check(case, tile)
    assert error(case.out(lowrank_hopper.attend(*case.args, tile)), case.want) < 3e-3


@pytest.mark.parametrize("variant", BEST)
def test_splits_of_rows_of_any_length(variant: str) -> None:
    """Few programs share rows, and there are shares of short rows that get nothing."""
    slots, heads = 4 * LEAST, 2
    if not GPU:  # where there is one place for a program and two waves
        assert splits(1, slots, BEST[variant].resident, BEST[variant].tokens) == 2 * BEST[variant].resident
    for length in (1, 32, 33, 700, slots):
        check(Case(variant, (length,), heads, 64, 16, torch.float16, slots), BEST[variant])


@pytest.mark.parametrize("variant", BEST)
def test_a_row_without_tokens_gives_zeros(variant: str) -> None:
    case = Case(variant, (40, 0), 2, 64, 16, torch.float16)
    for means in (lowrank_hopper.attend(*case.args, BEST[variant]), lowrank_reference.attend(*case.args)):
        assert all(bool(m[0].any()) and not m[1].any() for m in means)
    check(case, BEST[variant])


def test_large_logits() -> None:
    """One token takes all the weight, early or late, and nothing overflows."""
    case = Case("nope", (90, 90), 4, 64, 16, torch.float16)
    case.scale = 30.0
    assert lowrank_reference.attend(*case.args)[1].isfinite().all()
    check(case, BEST["nope"])


def test_records_in_a_larger_buffer_and_transposed_queries() -> None:
    case = Case("nope", (60, 45), 4, 64, 16, torch.float16)
    want = lowrank_hopper.attend(*case.args, BEST["nope"])
    for name in ("keys", "values"):
        store = torch.full((2, 100, 64 + 64), math.nan, dtype=torch.float16, device=DEVICE)
        store[:, 20:80] = getattr(case, name)
        setattr(case, name, store[:, 20:80])
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert all(torch.equal(x, y) for x, y in zip(lowrank_hopper.attend(*case.args, BEST["nope"]), want, strict=True))


@pytest.mark.parametrize("variant", BEST)
def test_the_same_again_is_the_same(variant: str) -> None:
    args = (*Case(variant, (300,), 4, 64, 16, torch.float16).args, BEST[variant])
    assert all(torch.equal(x, y) for x, y in zip(lowrank_hopper.attend(*args), lowrank_hopper.attend(*args), strict=True))


@pytest.mark.parametrize("variant", BEST)
def test_the_device_and_the_type_choose(variant: str) -> None:
    for dtype in (torch.float16, torch.float32):
        case = Case(variant, (60, 5), 4, 64, 16, dtype)
        got, kernel = lowrank_decode(*case.args), GPU and dtype == torch.float16 and torch.cuda.get_device_capability() == (9, 0)
        want = lowrank_hopper.attend(*case.args, BEST[variant]) if kernel else lowrank_reference.attend(*case.args)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("heads", [1, 6, 7, 12, 18, 32, 40])
@pytest.mark.parametrize("rank", [1, 24, 51, 60, 64, 100])
def test_groups_divide_heads_and_fit_a_tile(heads: int, rank: int) -> None:
    for head_dim, tile in itertools.product((64, 128, 256), (NOPE, EXACT)):
        group, columns, padded, places = shape(heads, head_dim, rank, tile)
        most = tile.columns // max(1, head_dim // 128)
        assert heads % group == 0 and group <= ROWS and group * rank <= columns and (columns <= most or group == 1)
        assert rank <= padded < max(17, 2 * rank) and head_dim + rank <= places < 2 * (head_dim + rank)
        bigger = [g for g in range(group + 1, ROWS + 1) if heads % g == 0]
        assert all((1 << (g - 1).bit_length()) * padded > most for g in bigger)


def test_splits_fill_the_places_and_no_more() -> None:
    for programs in (1, 4, 128, 300, 5000):
        n = splits(programs, 32768, 264, 32)
        assert n == 1 or (n * programs <= lowrank_hopper.WAVES * 264 and 32768 / n >= LEAST)
    assert splits(128, 32768, 264, 32) == 4 and splits(1, 100, 264, 32) == 1 and splits(1, 32768, 264, 32) == 32768 // LEAST
