"""Retrofits: exact at full rank, what is said to be lost is lost, monotone, nothing beats Eckart-Young, a gauge that pays."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstack.attention import lowrank_fit as lf
from kvstack.attention.retrofit import dense, fit_key, fit_mla, fit_value, pool_key, pool_value, svd_key, svd_value
from kvstack.errors import BadInputError
from kvstack.rope import Rope

torch.set_num_threads(1)

D = 16
METHODS = ("aligned", "mean")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(d: int) -> Tensor:
    """E[x x^T] of a spectrum 1/k in a random basis, with a mean that is not zero."""
    basis = torch.linalg.qr(gaussian(d, d, seed=9)).Q
    mean = gaussian(d, 1, seed=8) / d**0.5
    return basis / torch.arange(1, d + 1) @ basis.T + mean @ mean.T


class Layer:
    """Random weights float32, `heads` KV heads and `groups` query heads for each, of width d."""

    def __init__(self, heads: int = 4, groups: int = 1, d: int = 64, dtype: torch.dtype = torch.float32) -> None:
        self.c, self.heads = moment(d), heads
        rows = (heads * D, heads * groups * D)
        self.w_k, self.w_v, self.w_q, o = ((gaussian(rows[i > 1], d, seed=i) / d**0.5).to(dtype) for i in range(4))
        self.w_o = o.T.contiguous()
        self.energies = energies(self.w_q, self.c)

    def key(self, *args: Any) -> Any:
        return self.w_k, self.w_q, self.c, self.energies, *args

    def value(self, *args: Any) -> Any:
        return self.w_v, self.w_o, self.c, D, *args


def energies(w: Tensor, c: Tensor) -> Tensor:
    """E |q_j|^2 `[H, D / 2]` of heads `w [H D, d]`, plane by plane."""
    return ((w.double() @ c) * w).sum(1).view(-1, 2, D // 2).sum(1)


def attention(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor) -> Tensor:
    """Causal softmax attention with RoPE of `x [T, d]`."""
    position = torch.arange(100, 100 + len(x))
    q, k, v = ((x @ w.T).unflatten(1, (-1, D)).transpose(0, 1) for w in (w_q, w_k, w_v))
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    rope = Rope.half(D)
    logits = rope.turn(q, position) @ rope.turn(k, position).mT / D**0.5
    weights = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1) @ w_o.T


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("heads", "groups", "d"), [(4, 1, 64), (2, 2, 64), (4, 1, 48), (1, 3, 40)])
def test_full_rank_changes_nothing(heads: int, groups: int, d: int, method: Any) -> None:
    layer = Layer(heads, groups, d)
    x = 3 * gaussian(40, d, seed=5).float()
    old = attention(x, layer.w_q, layer.w_k, layer.w_v, layer.w_o)
    key, w_q = fit_key(*layer.key(D, method))
    value, w_o = fit_value(*layer.value(D, method))
    new = attention(x, w_q, dense(key), dense(value), w_o)
    torch.testing.assert_close(new, old, rtol=0, atol=1e-5 * float(old.abs().max()))
    assert new.dtype == torch.float32 and w_o.shape == layer.w_o.shape and max(key.lost, value.lost) < 1e-12
    assert not torch.allclose(w_q, layer.w_q, atol=1e-2) and not torch.allclose(
        w_o, layer.w_o, atol=1e-2
    )  # gauge and metric are in them


def output_error(layer: Layer, w_o: Tensor, w_v: Tensor) -> float:
    """The share of what reaches the output, summed over query heads as if each read its own tokens, that new weights get wrong."""

    def paths(w_o: Tensor, w_v: Tensor) -> Tensor:
        o, v = w_o.T.double().unflatten(0, (-1, D)).mT, w_v.double().unflatten(0, (-1, D))
        return o @ v.repeat_interleave(len(o) // len(v), 0)  # [Hq, d, d]

    old, new = paths(layer.w_o, layer.w_v), paths(w_o, w_v)
    return float(((old - new) @ layer.c * (old - new)).sum() / (old @ layer.c * old).sum())


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_lost_of_values_is_the_error_of_the_output(method: Any, groups: int, rank: int) -> None:
    layer = Layer(4, groups, dtype=torch.float64)
    fit, w_o = fit_value(*layer.value(rank, method))
    assert fit.lost == pytest.approx(output_error(layer, w_o, dense(fit)), rel=1e-3) and fit.lost > 0.05


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_lost_of_keys_is_the_error_of_the_logits(method: Any, groups: int, rank: int) -> None:
    """Over random relative positions, which leave each plane's |q|^2 |dk|^2; RoPE must commute with what went into the queries."""
    layer = Layer(4, groups, dtype=torch.float64)
    fit, w_q = fit_key(*layer.key(rank, method))
    old, new = (w.unflatten(0, (4, groups * D)) for w in (layer.w_q, w_q))
    turn = (new @ torch.linalg.pinv(old))[:, :D, :D]  # queries of the first of each group
    rope = Rope.half(D).turn(torch.eye(D), torch.tensor(7)).double()
    torch.testing.assert_close(turn @ rope, rope @ turn, rtol=0, atol=1e-5)
    full = (turn.inverse().mT @ layer.w_k.unflatten(0, (4, D))).flatten(0, 1)  # the new heads, had nothing been lost
    q = energies(w_q, layer.c).unflatten(0, (4, groups)).sum(1)
    error, total = (float((q * energies(w, layer.c)).sum()) for w in (full - dense(fit), full))
    assert fit.lost == pytest.approx(error / total, rel=1e-3) and fit.lost > 0.05


@pytest.mark.parametrize("rank", [0, 5, D])
@pytest.mark.parametrize("gauge", [lf.orthogonal, lf.phases])
def test_every_block_and_every_sweep_lowers_the_error(gauge: lf.Gauge, rank: int) -> None:
    a = gaussian(5, D, 48)
    fit = lf.descend(a, rank, gauge, a[0])
    assert all(after <= before + 1e-9 for before, after in pairwise(fit.errors)) and len(fit.errors) > 1
    rest = fit.up @ fit.down
    assert fit.errors[-1] == pytest.approx(lf.energy(fit.turn @ a - fit.shared - rest), abs=1e-9)
    assert fit.errors[-1] <= lf.unaligned(a, rank).errors[-1] + 1e-9
    target = fit.shared + rest
    best = gauge(a, target)
    torch.testing.assert_close(best @ best.mT, torch.eye(D).double().expand(5, D, D))
    for seed in range(20):  # no other turn of the group is nearer
        other = gauge(a, gaussian(5, D, 48, seed=seed))
        assert lf.energy(best @ a - target) < lf.energy(other @ a - target)


def planted(gauge: lf.Gauge, heads: int = 12, d: int = 192, own: float = 1.0) -> Tensor:
    """Heads `[H, D, d]`: a common one and `own` times one of their own, each scrambled by the gauge."""
    common, scramble = gaussian(D, d), gauge(gaussian(heads, D, d, seed=1), gaussian(heads, D, d, seed=2))
    return scramble @ (common + own * gaussian(heads, D, d, seed=3))


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_gauge_beats_plain_svds_on_scrambled_heads(share: float) -> None:
    d, heads = 192, 12
    c, w_o = torch.diag(1 / torch.arange(1, d + 1)), torch.linalg.qr(gaussian(d, d)).Q
    args = planted(lf.orthogonal).flatten(0, 1), w_o, c, D, round((share * heads * D - D) / heads)
    gauge, mean = fit_value(*args)[0].lost, fit_value(*args, "mean")[0].lost
    joint, per_head = (svd_value(*args, joint)[1] for joint in (True, False))
    assert joint < gauge < min(per_head, mean) / 1.5


def test_a_shared_part_under_low_rank_rests_is_found() -> None:
    """Rests have more energy than it, so it is not the mean of the turned heads."""
    rests = gaussian(8, D, 3) @ (2 * gaussian(8, 3, 96, seed=1))
    a = lf.orthogonal(gaussian(8, D, 96, seed=2), gaussian(8, D, 96, seed=3)) @ (gaussian(D, 96, seed=4) + rests)
    assert lf.unaligned(a, 3).errors[-1] > 0.1 * lf.energy(a)
    assert lf.aligned(a, 3, lf.orthogonal).errors[-1] < 3e-3 * lf.energy(a)


def test_phases_find_the_common_key() -> None:
    """Keys that differ by phases and lengths only: one head serves all, which a plain mean does not see."""
    layer = Layer(12, 1, 192)
    lengths = torch.rand(12, D // 2, generator=torch.Generator().manual_seed(1)) + 0.5
    w_k = (planted(lf.phases, own=0) / lengths.repeat(1, 2)[..., None]).flatten(0, 1)
    args = w_k, layer.w_q, layer.c, lengths**2
    assert fit_key(*args, 0)[0].lost < 1e-5 and fit_key(*args, 0, "mean")[0].lost > 0.5
    assert pool_key(*args, 3)[2] < 1e-5


@pytest.mark.parametrize("rank", [0, 2, 7, D])
def test_eckart_young(rank: int) -> None:
    layer, r = Layer(6, 1, 96), rank
    for lost, fits in (
        ([svd_value(*layer.value(r), j)[1] for j in (True, False)], [fit_value(*layer.value(r, m))[0].lost for m in METHODS]),  # type: ignore[arg-type]
        ([svd_key(*layer.key(r), j)[1] for j in (True, False)], [fit_key(*layer.key(r, m))[0].lost for m in METHODS]),
    ):
        assert lost[0] <= min(lost[1], *fits) + 1e-9
        assert fits[0] <= fits[1] + 1e-9
        assert (lost[0] < 1e-9) == (rank == D)


def test_ranks_left_over_go_where_they_serve_most() -> None:
    a = torch.diag_embed(torch.tensor([[4.0, 2, 1], [8, 3, 1]], dtype=torch.float64))
    for width, dropped in ((0, 95), (1, 31), (2, 15), (3, 6), (4, 2), (6, 0), (9, 0)):
        assert lf.energy(a - lf.truncated_heads(a, width)) == pytest.approx(dropped, abs=1e-12)
    assert lf.energy(a - lf.truncated_together(a, 1)) == pytest.approx(15)  # heads share directions: 16 + 64, 4 + 9, 1 + 1


def test_rank_zero_is_the_shared_part_alone() -> None:
    layer = Layer()
    for fit, _ in (fit_key(*layer.key(0)), fit_value(*layer.value(0))):
        assert fit.down.shape == (0, 64) and fit.up.shape == (4, D, 0)
        assert torch.equal(dense(fit), fit.shared.repeat(4, 1))
    assert fit_value(*layer.value(0))[0].lost == pytest.approx(pool_value(*layer.value(1))[2])


def test_the_dense_weight_is_head_after_head() -> None:
    fit, _ = fit_value(*Layer().value(3))
    record = torch.cat([fit.shared, fit.down]) @ gaussian(64, 1).float()
    heads = (dense(fit) @ gaussian(64, 1).float()).view(4, D)
    for h in range(4):
        torch.testing.assert_close(heads[h], record[:D, 0] + fit.up[h] @ record[D + 3 * h : D + 3 * h + 3, 0])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_pooled_heads(kv_heads: int) -> None:
    """As many heads as there were: nothing changes. Fewer: as much is lost as `lost` says, and not more than by rank 0 of all heads."""
    layer = Layer(4, 2)
    (w_k, w_q, lost_k), (w_v, w_o, lost_v) = pool_key(*layer.key(kv_heads)), pool_value(*layer.value(kv_heads))
    assert w_k.shape == w_v.shape == (kv_heads * D, 64) and w_q.shape == layer.w_q.shape and w_o.shape == layer.w_o.shape
    x = 3 * gaussian(40, 64, seed=5).float()
    old, new = attention(x, layer.w_q, layer.w_k, layer.w_v, layer.w_o), attention(x, w_q, w_k, w_v, w_o)
    if kv_heads == 4:
        assert max(lost_k, lost_v) < 1e-12
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5 * float(old.abs().max()))
    else:
        assert lost_v == pytest.approx(output_error(layer, w_o, w_v), rel=1e-3) and min(lost_k, lost_v) > 0.1
    assert lost_k <= fit_key(*layer.key(0))[0].lost + 1e-9 and lost_v <= fit_value(*layer.value(0))[0].lost + 1e-9


@pytest.mark.parametrize("width", [1, 20, 64])
def test_mla(width: int) -> None:
    layer = Layer()
    fit = fit_mla(layer.w_k * 7, layer.w_v, layer.c, width)
    pairs = (layer.w_k.double() * 7, fit.up_k.double() @ fit.down.double()), (layer.w_v.double(), fit.up_v.double() @ fit.down.double())
    lost = [float(((w - v) @ layer.c * (w - v)).sum() / (w @ layer.c * w).sum()) for w, v in pairs]
    assert fit.lost == pytest.approx(sum(lost) / 2, rel=1e-3, abs=1e-9) and (fit.lost < 1e-9) == (width == 64)
    down = fit.down.double()
    torch.testing.assert_close(down @ layer.c @ down.T, torch.eye(width).double(), rtol=0, atol=1e-2)  # C's jitter is not in here
    assert fit.lost <= fit_mla(layer.w_k, layer.w_v, layer.c, width).lost + 1e-6  # the size of either side does not count


WRONG: dict[str, tuple[Callable[[Layer], Any], str]] = {
    "rank": (lambda x: fit_value(*x.value(D + 1)), "rank cannot be 17. Give a whole number from 0 to 16"),
    "negative rank": (lambda x: svd_key(*x.key(-1), True), "rank cannot be -1"),
    "method": (lambda x: fit_key(*x.key(1, "best")), "no method 'best'. Give aligned or mean"),
    "head size": (lambda x: fit_value(x.w_v, x.w_o, x.c, 15, 1), "heads of size 15. Give the weights"),
    "no head size": (lambda x: fit_value(x.w_v, x.w_o, x.c, 0, 1), "heads of size 0. Give the weights"),
    "query heads": (lambda x: fit_value(x.w_v, x.w_o[:, :-D], x.c, D, 1), "are not those of heads"),
    "width": (lambda x: fit_key(x.w_k[:, 1:], *x.key(1)[1:]), "are not those of heads"),
    "moment": (lambda x: fit_value(x.w_v, x.w_o, x.c[1:, 1:], D, 1), r"second moment is \(63, 63\).*Give E"),
    "no moment": (lambda x: fit_value(x.w_v, x.w_o, -x.c, D, 1), "not positive. Give E"),
    "energies": (lambda x: fit_key(x.w_k, x.w_q, x.c, x.energies[1:], 1), "Query energies.*Give the mean"),
    "negative energies": (lambda x: fit_key(x.w_k, x.w_q, x.c, -x.energies, 1), "are negative. Give the mean"),
    "no energy": (lambda x: fit_key(x.w_k, x.w_q, x.c, 0 * x.energies, 1), "all zero.*Give those of a trained layer"),
    "nan": (lambda x: fit_value(x.w_v * torch.nan, x.w_o, x.c, D, 1), "w_v.*not finite. Give"),
    "dimensions": (lambda x: fit_value(x.w_v[None], x.w_o, x.c, D, 1), "w_v.*no matrix"),
    "kv_heads": (lambda x: pool_value(*x.value(3)), "4 heads make no 3 groups. Give a divisor of 4"),
    "latent": (lambda x: fit_mla(x.w_k, x.w_v, x.c, 65), "width cannot be 65"),
    "two layers": (lambda x: fit_mla(x.w_k, x.w_v[1:], x.c, 8), "differ. Give those of one layer"),
    "zero": (lambda x: fit_mla(x.w_k, 0 * x.w_v, x.c, 8), "all zero.*Give trained weights"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_fitted_is_refused(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(BadInputError, match=message):
        call(Layer())
