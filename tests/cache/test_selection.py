"""Which tokens of a layer leave, without a model: councils, choosers, and the memory that is given back."""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvstack.cache.paged import PagedTier
from kvstack.cache.selection import Council, council
from kvstack.cache.static import Size, StaticStore, Steps
from kvstack.cache.store import LayerStore
from kvstack.cache.tier import Tier
from kvstack.codecs.base import Context
from kvstack.errors import BadInputError, RecipeError
from kvstack.kernels.pages import PAGE
from kvstack.kernels.reference import Shape
from kvstack.recipe import Recipe
from kvstack.rope import Rope
from kvstack.scorers import H2O, KNorm, SnapKV, Streaming
from kvstack.scorers.base import Layer, Scorer, Selection, View

torch.set_num_threads(1)
H, G, D = 2, 2, 64
SHAPE, CPU = Shape(D**-0.5), torch.device("cpu")
CONTEXT = Context(D, H, torch.float32, CPU)


@dataclass(frozen=True)
class Liked(Selection):
    """Tokens of the second head of the first layer are worth more than those of the first, and all others are worth less."""

    def build(self, layer: Layer) -> Scorer:
        """See `Selection.build`."""
        return LikedScorer(torch.tensor([1.0, 2.0] if layer.index == 0 else [0.0, 0.0]))


class LikedScorer(Scorer):
    """Of one head, later tokens are worth a little more. records: the first number of the key."""

    records = 1

    def __init__(self, worth: Tensor) -> None:
        self.worth = worth

    def begin(self, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
        """See `Scorer.begin`."""
        return key[..., :1].float()

    def score(self, view: View) -> Tensor:
        """See `Scorer.score`."""
        return self.worth[:, None] - 1e-3 * view.age


def layers(selection: Selection, tier: str, batch: int, count: int = 2) -> list[LayerStore]:
    base, meeting = Recipe.parse(tier), council(selection, count)
    recipe = Recipe(base.precision, base.window, base.sinks, selection)
    return [
        LayerStore(recipe, batch, CONTEXT, CONTEXT, selection.build(Layer(D, H, G, Rope.half(D), CPU, index=i)), meeting)
        for i in range(count)
    ]


def read(stores: list[LayerStore], t: int, valid: Tensor | None = None, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed + int(stores[0].lengths.sum()))
    for store in stores:
        q, k, v = (torch.randn(len(store.lengths), h, t, D, generator=g) for h in (G * H, H, H))
        assert store.attend(q, k, v, SHAPE, valid=valid).isfinite().all()


def held(store: LayerStore) -> list[list[int]]:
    """Tokens of body and window of each head of each row."""
    rows = (store.body.lengths + store.window.lengths)[:, None].expand(-1, H if store.split == 1 else 1)
    return rows.reshape(len(store.lengths), H).tolist()


def test_a_council_waits_for_all_and_forgets() -> None:
    told: list[tuple[int, Tensor]] = []
    meeting, scores, counts = Council(2, "pooled"), torch.tensor([[[1.0, 3.0]]]), torch.ones(1, 1, dtype=torch.long)
    for turn in range(2):
        meeting.hand_in(scores, counts, lambda m: told.append((0, m)))
        assert len(told) == 2 * turn and len(meeting.waiting) == 1
        meeting.hand_in(scores - 1.5, counts, lambda m: told.append((1, m)))
        assert not meeting.waiting
    assert [(i, m.flatten().tolist()) for i, m in told] == [(0, [False, True]), (1, [False, True])] * 2
    assert [council(KNorm(9, heads=h), 5).layers for h in ("separate", "shared", "union", "pooled")] == [1, 5, 5, 5]  # type: ignore[arg-type]


@pytest.mark.parametrize("tier", ["polar4", "polar4(window=3, sinks=2)", "exact", "exact(window=3, sinks=2)"])
def test_a_head_may_lose_its_whole_body(tier: str) -> None:
    """One head of one layer takes all places; ages, records, crops, beams and files go on from there."""
    stores = layers(Liked(20, interval=8, heads="pooled"), tier, 2)
    read(stores, 40, torch.arange(40) >= torch.tensor([[0], [14]]))
    sinks, near = stores[0].recipe.sinks, stores[0].recipe.sinks + stores[0].recipe.window
    # Of 40 and 26 tokens only the first are 20 + 8 or more. There the bodies of 4 heads, of 40 - near tokens each, compete.
    places, most = 4 * (20 - near), 40 - near
    assert [store.body.lengths[:H].tolist() for store in stores] == [[min(most, places - most), most], [0, 0]]
    assert all(held(store)[1] == [26 - sinks] * H for store in stores)
    for _ in range(3):
        read(stores, 8)
    for store in stores:
        chooser = store.chooser
        assert chooser is not None and isinstance(chooser.scorer, LikedScorer)
        assert all(20 <= n < 28 for n in chooser.load.tolist())
        view = chooser._view(store.sinks, store.window, store.body, store.lengths, 1.0)
        assert torch.allclose(view.records[..., 0][view.valid], view.key[..., 0][view.valid], atol=0.5), "records follow their tokens"
        for age, valid in zip(view.age.flatten(0, 1), view.valid.flatten(0, 1), strict=True):
            n, window = int(valid.sum()), store.recipe.window
            assert age[valid].tolist() == list(range(n + window - 1, window - 1, -1)), "the newest candidate follows the window"
        with pytest.raises(BadInputError, match="as long as what shall be removable"):
            store.crop(30)
        store.crop(int(chooser.fresh.min()))
        store.select(torch.tensor([1, 0, 1]))
        copy = layers(Liked(20, interval=8, heads="pooled"), tier, 3)[0]
        copy.load_state(store.state())
        assert held(copy) == held(store) and held(store)[0] == held(store)[2]
        assert copy.chooser is not None and torch.equal(copy.chooser.load, chooser.load)
    read(stores, 8)
    total = torch.tensor([held(s) for s in stores]).sum((0, 2)) + 2 * H * sinks
    assert (total >= 2 * H * 20).all() and (total < 2 * H * 28).all()


@pytest.mark.parametrize("window", [0, 4])
def test_a_prompt_that_stays_within_the_budget_leaves_room_for_the_window(window: int) -> None:
    for n in (24 - window, 25 - window):
        (store,) = layers(KNorm(24, interval=8, prompt="error"), f"exact(window={window}, sinks=2)", 1, 1)
        if n + window > 24:
            with pytest.raises(BadInputError, match="25 tokens, and" if not window else "4 are for the window"):
                read([store], n)
            continue
        read([store], n)
        for _ in range(window):
            read([store], 1)
        first = store.body.sides()[0].codes[0][:, :, : n - 2].clone()
        for _ in range(30):
            read([store], 1)
        assert torch.equal(store.body.sides()[0].codes[0][:, :, : n - 2], first), "all of it stays"


def test_a_prompt_that_is_cut_is_protected_as_far_as_it_is_left() -> None:
    (store,) = layers(Streaming(24, interval=8, prompt="protect"), "exact", 1, 1)
    read([store], 40)
    read([store], 1)  # the prompt is over
    for cut, left in ((29, 12), (12, 0)):
        store.crop(cut)
        assert store.chooser is not None and store.chooser.prompt.tolist() == [left]
    read([store], 10)
    for _ in range(60):
        read([store], 1)
    assert store.chooser.prompt.tolist() == [10], "after nothing was left, a new prompt came"
    assert 10 + 24 <= store.body.longest < 10 + 24 + 8


@pytest.mark.parametrize("selection", [SnapKV(24, interval=8, queries=4), H2O(24, interval=8)])
def test_what_a_scorer_keeps_holds_no_graph(selection: Selection) -> None:
    (store,) = layers(selection, "polar4(window=4, sinks=2)", 1, 1)
    for t in (30, 1, 3):
        store.attend(*(torch.randn(1, h, t, D, requires_grad=True) for h in (G * H, H, H)), SHAPE)
        assert not any(t.requires_grad for t in store.state().values())
        chooser = store.chooser
        assert chooser is not None and not chooser.records.buffers[0][0].requires_grad
    small = (chooser.load, chooser.prompt, chooser.fresh, chooser.asked)
    stored = chooser.records.nbytes if chooser.scorer.records else 0
    assert chooser.nbytes == sum(t.nbytes for t in small) + stored + (0 if chooser.queries is None else chooser.queries.nbytes)


def test_tokens_without_queries_are_refused() -> None:
    (store,) = layers(KNorm(24), "polar4", 1, 1)
    with pytest.raises(RecipeError, match="Leave the selection out"):
        store.append(*torch.randn(2, 1, H, 3, D))


def test_nothing_is_evicted_where_sinks_and_window_hold_all() -> None:
    recipe = Recipe.parse("knorm(200, interval=8)+polar4(window=60, sinks=4)")
    steps = Steps(Size(1, H, 50), recipe.sinks, recipe.window, CPU)
    assert recipe.selection is not None
    store = StaticStore(recipe, steps, CONTEXT, CONTEXT, recipe.selection.build(Layer(D, H, G, Rope.half(D), CPU)))
    assert store.body is None
    store.evict()


def check_pool(tier: PagedTier) -> None:
    """Every page has one owner, or is free, once."""
    owned = [int(p) for row, n in zip(tier.pages.table, tier.held.tolist(), strict=True) for p in row[:n]]
    assert sorted(owned + tier.free) == list(range(tier.used)) and tier.used <= len(tier.pages.pool)
    assert (tier.held >= -(-tier.lengths // PAGE)).all() and torch.equal(tier.pages.lengths.long(), tier.lengths)


@pytest.mark.parametrize("seed", range(6))
def test_pages_are_used_once_and_none_is_lost(seed: int) -> None:
    """Any order of calls, against a tier in plain buffers."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    codecs = [Recipe.parse("polar4").precision.build(side, Context(D, 1, torch.float32, CPU)) for side in ("key", "value")]
    plain, paged = Tier(*codecs, 3, 1, CPU), PagedTier(*codecs, 3, 1, CPU)

    def some(most: list[int]) -> Tensor:
        return torch.tensor([draw.choice([0, n, draw.randint(0, n)]) for n in most])

    for call in draw.choices(["append", "keep", "truncate", "select", "state"], [5, 3, 2, 1, 1], k=16):
        lengths = plain.lengths.tolist()
        if call == "append":
            k, v = torch.randn(2, len(lengths), 1, 300, D, generator=g)
            given = k, v, some([300] * len(lengths))
        elif call == "keep":
            counts = some(lengths)
            index = torch.zeros(len(lengths), 1, int(counts.max()), dtype=torch.int32)
            for row, n, c in zip(index, lengths, counts.tolist(), strict=True):
                row[0, :c] = torch.randperm(n, generator=g)[:c].sort().values
            given = index, counts
        else:
            given = {"truncate": (some(lengths),), "select": (torch.randint(0, len(lengths), (3,), generator=g),)}.get(call, ())
        if call == "state":
            plain.load_state(paged.state())
            paged.load_state(plain.state())
        else:
            for tier in (plain, paged):
                getattr(tier, call)(*given)
        check_pool(paged)
        states = plain.state(), paged.state()
        assert all(torch.equal(t, states[1][name]) for name, t in states[0].items()), call


def test_pages_that_nobody_asks_for_are_given_back() -> None:
    codecs = [Recipe.parse("polar4").precision.build(side, CONTEXT) for side in ("key", "value")]
    tier = PagedTier(*codecs, 1, H, CPU)

    def evict(left: int) -> None:
        tier.keep(torch.arange(left).expand(1, H, -1), torch.tensor([left]))

    def append(pages: int) -> None:
        tier.append(*torch.randn(2, 1, H, pages * PAGE, D), torch.tensor([pages * PAGE]))

    append(20)
    body = tier.body(tier.lengths)
    evict(11 * PAGE)
    assert len(tier.pages.pool) == 20 and tier.body(tier.lengths) is body, "nine of twenty pages may be asked for soon"
    append(1)
    evict(11 * PAGE)
    assert len(tier.pages.pool) == 11 and not tier.free
    assert tier.body(tier.lengths).pages.pool is tier.pages.pool and tier.body(tier.lengths) is tier.body(tier.lengths)
    for _ in range(3):
        append(1)
        evict(11 * PAGE)
        assert len(tier.pages.pool) == 12 and len(tier.free) == 1, "what is asked for every time stays"
    evict(5 * PAGE)
    assert len(tier.pages.pool) == 5 and tier._body is None, "and nothing holds the old pool"
