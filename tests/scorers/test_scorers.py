"""What every scorer owes: scores of the shape and kind promised, from its own valid tokens only, for each row and KV head by itself."""

from dataclasses import FrozenInstanceError, fields, replace
from itertools import product
from typing import Any, Literal, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from kvstack.errors import RecipeError
from kvstack.rope import Rope
from kvstack.scorers import (
    H2O,
    RKV,
    Expected,
    Forecast,
    ForecastWeights,
    Future,
    KeyDiff,
    KNorm,
    Layer,
    Oracle,
    QueryStats,
    Random,
    Selection,
    SnapKV,
    Streaming,
    Tri,
    View,
)

torch.set_num_threads(1)

H, G, D, N, M, T = 3, 2, 16, 24, 7, 60
COUNTS = ((24, 20, 24), (9, 15, 15), (6, 6, 4), (0, 0, 0))  # valid candidates of each row and KV head
SINKS = (2, 2, 1, 0)
WINDOW = (5, 5, 5, 0)
B = len(COUNTS)

EVERY: list[Selection] = [
    Tri(64),
    Forecast(64),
    Expected(64, future=20),
    SnapKV(64, queries=8, kernel=5),
    SnapKV(64, queries=3, kernel=3, pool="mean"),
    RKV(64, kernel=3, weight=40),
    RKV(64, queries=3),
    H2O(64),
    KNorm(64),
    KeyDiff(64),
    Streaming(64),
    Random(64, seed=3),
    Oracle(64),
]


def every(selections: list[Selection]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("selection", selections, ids=repr)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer() -> Layer:
    mean = torch.complex(gaussian(H * G, D // 2), gaussian(H * G, D // 2, seed=1))
    root = gaussian(H * G, D, D, seed=2) / D**0.5
    stats = QueryStats(mean, mean.abs() + 0.3, root @ root.mT)
    lse = 3 + gaussian(B, H * G, T, seed=3).abs()
    lse[1, :, 50:] = -torch.inf
    future = Future(gaussian(B, H * G, T, D, seed=4).masked_fill(lse.isinf()[..., None], torch.nan), lse)
    shapes = (H, 2 * D, 4), (H, 4), (H, 4, 2), (H, 2)
    forecast = ForecastWeights(*(gaussian(*shape, seed=10 + i) for i, shape in enumerate(shapes)))
    return Layer(D, H, G, Rope.half(D), torch.device("cpu"), 5, stats, future, forecast)


def view(selection: Selection, garbage: float = 0.0) -> View:
    """Rows of sinks, candidates and a window, each padded at its end with `garbage`; the last row has nothing at all."""
    count = torch.tensor(COUNTS)[..., None]
    sinks, window = (torch.tensor(x)[:, None] for x in (SINKS, WINDOW))
    valid, near_valid = torch.arange(N) < count, torch.arange(M) < sinks + window
    age = window[..., None] + count - 1 - torch.arange(N)
    near = torch.arange(M)
    near_age = torch.where(near < sinks, 100 - near, sinks + window - 1 - near)
    scorer = selection.build(layer())
    asked = (torch.arange(scorer.queries) >= torch.tensor([0, 0, 1, 99])[:, None]) & torch.ones(B, 1, dtype=torch.bool)

    def vectors(seed: int, mask: Tensor, heads: int, size: int) -> Tensor:
        mask = mask if mask.ndim == 3 else mask[:, None].expand(-1, heads, -1)
        x = gaussian(*mask.shape, size, seed=seed) + gaussian(heads, 1, size, seed=99)  # so that some keys are alike
        return x.masked_fill(~mask[..., None], garbage)

    return View(
        key=vectors(5, valid, H, D), value=vectors(6, valid, H, D) if scorer.values else None, valid=valid,
        age=age.masked_fill(~valid, 7 if garbage else -3), near_key=vectors(7, near_valid, H, D), near_valid=near_valid,
        near_age=near_age.masked_fill(~near_valid, 2 if garbage else 9), queries=vectors(8, asked, H * G, D), asked=asked,
        records=vectors(9, valid, H, scorer.records), seen=torch.tensor([40, 33, 55, T]), scale=D**-0.5,
    )  # fmt: skip


def scores(selection: Selection, v: View, of: Layer | None = None) -> Tensor:
    return selection.build(of or layer()).score(v)


@every(EVERY)
@pytest.mark.parametrize("garbage", [0.0, torch.nan])
def test_shape_and_kind(selection: Selection, garbage: float) -> None:
    v, queries = view(selection, garbage), selection.build(layer()).queries
    s = scores(selection, v)
    assert s.shape == (B, H, N) and s.dtype == torch.float32
    young = v.valid & (v.age < queries)
    assert torch.equal(s == torch.inf, young) and s[~young].isfinite().all()
    for b, h in product(range(3), range(H)):  # scores tell tokens apart
        free = s[b, h][v.valid[b, h] & ~young[b, h]]
        assert len(free.unique()) > len(free) / (getattr(selection, "kernel", 1) + 1)  # pooled ones are equal in runs


@every(EVERY)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_garbage_changes_nothing(selection: Selection, garbage: float) -> None:
    clean, dirty = view(selection), view(selection, garbage)
    assert torch.equal(scores(selection, clean)[clean.valid], scores(selection, dirty)[clean.valid])


@every(EVERY)
def test_what_says_so_depends_on_no_order(selection: Selection) -> None:
    """Candidates change places, and their ages stay behind."""
    v, ordered = view(selection, torch.nan), selection.build(layer()).ordered
    place = gaussian(B, H, N, seed=20).masked_fill(~v.valid, torch.inf).argsort(-1)
    key, value, records = (None if x is None else x.take_along_dim(place[..., None], 2) for x in (v.key, v.value, v.records))
    assert key is not None and records is not None
    was, now = scores(selection, v).take_along_dim(place, 2), scores(selection, replace(v, key=key, value=value, records=records))
    assert ordered != torch.allclose(was[v.valid], now[v.valid], rtol=1e-5, atol=1e-6)


@every(EVERY)
def test_a_row_is_the_same_alone(selection: Selection) -> None:
    v, whole = view(selection, torch.nan), layer()
    batch = scores(selection, v)
    for b in range(3):
        own, near = v.valid[b].any(0), v.near_valid[b]
        alone = View(
            key=v.key[b : b + 1, :, own], value=None if v.value is None else v.value[b : b + 1, :, own],
            valid=v.valid[b : b + 1, :, own], age=v.age[b : b + 1, :, own], near_key=v.near_key[b : b + 1, :, near],
            near_valid=near[near][None], near_age=v.near_age[b : b + 1, near], queries=v.queries[b : b + 1], asked=v.asked[b : b + 1],
            records=v.records[b : b + 1, :, own], seen=v.seen[b : b + 1], scale=v.scale,
        )  # fmt: skip
        assert whole.future is not None
        future = Future(whole.future.queries[b : b + 1], whole.future.lse[b : b + 1])
        got = scores(selection, alone, replace(whole, future=future))[0]
        torch.testing.assert_close(got[alone.valid[0]], batch[b][v.valid[b]], rtol=1e-5, atol=1e-6)


def of_heads(whole: Layer, v: View, heads: Tensor) -> tuple[Layer, View]:
    """The layer and the view with these KV heads only, in this order."""
    grouped = torch.arange(H * G).unflatten(0, (H, G))[heads].flatten()
    assert whole.stats is not None and whole.stats.covariance is not None and whole.future is not None and whole.forecast is not None
    stats = QueryStats(whole.stats.mean[grouped], whole.stats.norm[grouped], whole.stats.covariance[grouped])
    future = Future(whole.future.queries[:, grouped], whole.future.lse[:, grouped])
    forecast = ForecastWeights(*(getattr(whole.forecast, f.name)[heads] for f in fields(ForecastWeights)))
    view = replace(
        v, key=v.key[:, heads], value=None if v.value is None else v.value[:, heads], valid=v.valid[:, heads], age=v.age[:, heads],
        near_key=v.near_key[:, heads], queries=v.queries[:, grouped], records=v.records[:, heads],
    )  # fmt: skip
    return replace(whole, heads=len(heads), stats=stats, future=future, forecast=forecast), view


@every([s for s in EVERY if not isinstance(s, Random)])  # which looks at no head
def test_heads_do_not_know_each_other(selection: Selection) -> None:
    v, whole = view(selection), layer()
    truth, key = scores(selection, v), gaussian(B, H, 9, D)
    records = selection.build(whole).begin(key, key, torch.arange(9).expand(B, 9))
    for heads in (torch.tensor([2, 0, 1]), torch.tensor([1])):
        context, moved = of_heads(whole, v, heads)
        torch.testing.assert_close(scores(selection, moved, context), truth[:, heads], rtol=1e-5, atol=1e-6)
        begun = selection.build(context).begin(key[:, heads], key[:, heads], torch.arange(9).expand(B, 9))
        torch.testing.assert_close(begun, records[:, heads])


@every(EVERY)
def test_runs_repeat_and_leave_the_view_alone(selection: Selection) -> None:
    v, untouched = view(selection), view(selection)
    scorer = selection.build(layer())
    assert torch.equal(scorer.score(v), scorer.score(v)) and torch.equal(scorer.score(v), scores(selection, untouched))
    for field in fields(View):
        a, b = getattr(v, field.name), getattr(untouched, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@every(EVERY)
def test_records_begin_and_grow(selection: Selection) -> None:
    scorer, key = selection.build(layer()), gaussian(B, H, 9, D)
    records = scorer.begin(key.bfloat16(), key.bfloat16(), torch.arange(9).expand(B, 9))
    assert records.shape == (B, H, 9, scorer.records) and records.dtype == torch.float32
    weights = gaussian(B, H * G, 4, 9).softmax(-1)
    weights[..., 8] = 0
    seen = scorer.observe(records, weights)
    assert seen.shape == records.shape and seen.dtype == torch.float32 and torch.equal(seen[:, :, 8], records[:, :, 8])
    assert scorer.observes == (not torch.equal(seen, records))


@every(EVERY)
def test_selections_are_frozen_plain_data(selection: Selection) -> None:
    hints = get_type_hints(type(selection))
    for field in fields(selection):
        assert hints[field.name] in (int, bool) or get_origin(hints[field.name]) is Literal
    assert replace(selection) == selection and hash(replace(selection)) == hash(selection) != hash(replace(selection, budget=65))
    assert set(selection.needs) <= {"stats", "covariance", "forecast", "future"}
    with pytest.raises(FrozenInstanceError):
        selection.budget = 1  # type: ignore[misc]


@pytest.mark.parametrize("method", sorted({type(s) for s in EVERY}, key=lambda c: c.__name__))
@pytest.mark.parametrize(("name", "bad"), [("budget", 0), ("budget", 2.0), ("interval", 0), ("heads", "all"), ("prompt", "keep")])
def test_every_selection_refuses(method: type[Selection], name: str, bad: Any) -> None:
    with pytest.raises(RecipeError, match=f"`{name}` cannot be"):
        method(**{"budget": 8, name: bad})


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (SnapKV, {"queries": 0}, "`queries` cannot be 0. Give a whole number from 1 to 1024"),
        (SnapKV, {"kernel": 0}, "`kernel` cannot be 0. Give a whole number from 1 to 1023"),
        (SnapKV, {"kernel": 8}, "`kernel` cannot be 8.*Give an odd number, such as 7"),
        (SnapKV, {"kernel": True}, "`kernel` cannot be True"),
        (SnapKV, {"pool": "avg"}, "`pool` cannot be 'avg'. Give one of max, mean"),
        (RKV, {"queries": 2000}, "`queries` cannot be 2000"),
        (RKV, {"kernel": 2}, "`kernel` cannot be 2.*such as 1"),
        (RKV, {"weight": 101}, "`weight` cannot be 101. Give a whole number from 0 to 100"),
        (Expected, {"future": 0}, "`future` cannot be 0"),
        (Random, {"seed": -1}, "`seed` cannot be -1"),
        (Random, {"seed": 2**32}, "`seed` cannot be"),
    ],
)
def test_refused(method: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        method(64, **arguments)
