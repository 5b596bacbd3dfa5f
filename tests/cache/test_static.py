"""The store of fixed size: its ring against a list of tokens, and its attention against the flexible store's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstack.cache.static import Size, StaticStore, Steps
from kvstack.cache.store import LayerStore
from kvstack.codecs import Context
from kvstack.errors import RecipeError
from kvstack.kernels.codes import from_page
from kvstack.kernels.decode import schedule
from kvstack.kernels.pages import PAGE, Format, read
from kvstack.kernels.reference import Shape
from kvstack.recipe import Recipe

torch.set_num_threads(1)
CPU = torch.device("cpu")
H, GROUPS, D = 2, 2, 64


class Ring:
    """One row, by the words of the module: which token is in which slot, and which are in the body."""

    def __init__(self, sinks: int, window: int, new: int, prompt: int) -> None:
        self.sinks, self.window, self.new, self.length = sinks, window, new, prompt
        self.body = list(range(sinks, prompt - window))
        self.held = {self.slot(token): token for token in range(prompt) if token not in self.body}

    def slot(self, token: int) -> int:
        return token if token < self.sinks else self.sinks + (token - self.sinks) % (self.window + self.new)

    def step(self) -> tuple[list[int], list[set[int]], list[int]]:
        """Slots of the new tokens, those that each of their queries must see, and those that leave for the body."""
        tokens = range(self.length, self.length + self.new)
        put = [self.slot(token) for token in tokens]
        self.held.update(zip(put, tokens, strict=True))
        sees = [{slot for slot, held in self.held.items() if held <= token and held not in self.body} for token in tokens]
        for token, slots in zip(tokens, sees, strict=True):  # all tokens, and each of them once
            assert sorted([*self.body, *(self.held[slot] for slot in slots)]) == list(range(token + 1))
        self.length += self.new
        first = self.sinks + len(self.body)
        leaving = range(first, max(first, self.length - self.window))
        out = [self.slot(token) for token in leaving]
        assert [self.held[slot] for slot in out] == list(leaving)
        self.body += leaving
        return put, sees, out


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([0, 1, 5, 128]), st.sampled_from([0, 4]), st.sampled_from([1, 3]),
    st.lists(st.integers(0, 300), min_size=1, max_size=3), st.integers(1, 12),
)  # fmt: skip
def test_a_step_is_what_a_ring_does(window: int, sinks: int, new: int, prompts: list[int], count: int) -> None:
    rows = [Ring(sinks, window, new, n) for n in prompts]
    steps = Steps(Size(len(rows), H, 1000, new), sinks, window, CPU)
    steps.lengths.copy_(torch.tensor(prompts))
    steps.refresh()
    places = [t.data_ptr() for t in vars(steps).values() if isinstance(t, Tensor)]
    for _ in range(count):
        assert steps.lengths.tolist() == [row.length for row in rows] and steps.body.tolist() == [len(row.body) for row in rows]
        for i, row in enumerate(rows):
            put, sees, out = row.step()
            assert steps.slots[i].tolist() == put
            assert [set(x.nonzero().flatten().tolist()) for x in steps.seen[i]] == sees
            assert steps.leaving[i, : int(steps.leaves[i])].tolist() == out
        assert torch.equal(steps.cum, schedule(steps.body, H))
        steps.advance()
    assert places == [t.data_ptr() for t in vars(steps).values() if isinstance(t, Tensor)]  # as a graph needs it


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(seed: int, b: int, t: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (draw(seed + i, b, heads, t, D, dtype=dtype) for i, heads in enumerate((H * GROUPS, H, H)))
    return q, k, v


def context(dtype: torch.dtype = torch.float32) -> Context:
    return Context(D, H, dtype, CPU)


def static(recipe: Recipe, batch: int, capacity: int, new: int = 1, dtype: torch.dtype = torch.float32) -> StaticStore:
    """A store full of large numbers, which must not matter."""
    steps = Steps(Size(batch, H, capacity, new), recipe.sinks, recipe.window, CPU)
    store = StaticStore(recipe, steps, context(dtype), context(dtype))
    for x in store.exact:
        x.fill_(3e4)
    if store.body is not None:
        store.body.pages.pool.fill_(0x77)
    return store


def fill(store: StaticStore, prompts: list[tuple[Tensor, Tensor, Tensor]], shape: Shape, sink: Tensor | None = None) -> list[Tensor]:
    """Read prompts as `generate` does, in order, each of one length and of one row or more."""
    out, lengths, row = [], [], 0
    for q, k, v in prompts:
        store.steps.filling = slice(row, row + len(q))
        out.append(store.attend(q, k, v, shape, sink))
        row += len(q)
        lengths += [q.shape[2]] * len(q)
    store.steps.filling = None
    store.steps.lengths.copy_(torch.tensor(lengths))
    store.steps.refresh()
    return out


def close(x: Tensor, y: Tensor, bound: float = 3e-6) -> None:
    assert x.isfinite().all() and float((x.float() - y.float()).norm() / y.float().norm()) < bound


RECIPES = {
    "polar4(window=5, sinks=4)": torch.float32,
    "k4v3(window=0, sinks=0)": torch.float32,
    "k4v2(window=16, sinks=2, scale=unbiased)": torch.float16,
    "fp8(window=1, sinks=4)": torch.float32,
    "bf16(window=5, sinks=1)": torch.float32,
    "exact(window=3, sinks=0)": torch.float16,
    "exact(window=300)": torch.float32,
}


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_the_flexible_store(recipe: str, new: int) -> None:
    """Prompts, and then step by step over a page border; the flexible store has every row alone."""
    kind, parsed = RECIPES[recipe], Recipe.parse(recipe)
    bound = 1e-3 if kind == torch.float16 else 3e-6
    long, count = PAGE - 1 + parsed.sinks + min(parsed.window, 16), 12
    sizes = [(2, long), (1, 7), (1, 1)]  # rows and tokens of the prompts
    batch = sum(b for b, _ in sizes)
    shape, sink = Shape(D**-0.5, 5.0 if new == 3 else None), draw(9, H * GROUPS) if new == 3 else None
    store = static(parsed, batch, long + count * new, new, kind)
    flexible = [LayerStore(parsed, 1, context(kind), context(kind)) for _ in range(batch)]
    prompts = [qkv(10 * i, *size, kind) for i, size in enumerate(sizes)]
    alone = [tuple(x[i : i + 1] for x in prompt) for prompt in prompts for i in range(len(prompt[0]))]
    out = [x[i : i + 1] for x in fill(store, prompts, shape, sink) for i in range(len(x))]
    for found, other, tokens in zip(out, flexible, alone, strict=True):
        close(found, other.attend(*tokens, shape, sink=sink), bound)
    for step in range(count):
        x = qkv(100 + 3 * step, batch, new, kind)
        found = store.attend(*x, shape, sink)
        assert found.dtype == kind
        for i, other in enumerate(flexible):
            close(found[i : i + 1], other.attend(*(t[i : i + 1] for t in x), shape, sink=sink), bound)
        store.steps.advance()
    if store.body is None:
        assert parsed.window == 300
        return
    assert int(store.steps.body[0]) > PAGE
    k, v, scales = read(store.body.pages)
    for i, other in enumerate(flexible):
        n = int(store.steps.body[i])
        assert n == other.body.longest
        for j, (side, numbers) in enumerate(zip(other.body.sides(), (k, v), strict=True)):
            for found, wanted in zip(from_page(side.codec, numbers[i : i + 1], scales[i : i + 1, ..., j]), side.codes, strict=True):
                assert torch.equal(found[:, :, :n].float(), wanted.float())


def test_a_store_can_be_filled_again() -> None:
    """What an earlier use left does not matter."""
    recipe, shape = Recipe.parse("polar4(window=5, sinks=2)"), Shape(0.2)
    used, new = static(recipe, 1, 200), static(recipe, 1, 200)
    fill(used, [qkv(50, 1, 150)], shape)
    for step in range(5):
        used.attend(*qkv(60 + step, 1, 1), shape)
        used.steps.advance()
    for store in (used, new):
        fill(store, [qkv(1, 1, 9)], shape)
    for step in range(8):
        x = qkv(80 + 3 * step, 1, 1)
        assert torch.equal(used.attend(*x, shape), new.attend(*x, shape))
        used.steps.advance()
        new.steps.advance()


@pytest.mark.parametrize("capacity", [3, 10, 12, 14])
def test_no_body_is_needed_where_sinks_and_window_hold_all(capacity: int) -> None:
    recipe, shape = Recipe.parse("polar4(window=10, sinks=4)"), Shape(D**-0.5)
    store, n = static(recipe, 1, capacity), capacity - 2
    assert store.body is None
    q, k, v = qkv(1, 1, capacity)
    fill(store, [(q[:, :, :n], k[:, :, :n], v[:, :, :n])], shape)
    k, v = (x.bfloat16().float().repeat_interleave(GROUPS, 1) for x in (k, v))
    for i in range(n, capacity):
        found = store.attend(*(x[:, :, i : i + 1] for x in (q, k[:, ::GROUPS], v[:, ::GROUPS])), shape)
        store.steps.advance()
        seen = [x[:, :, : i + 1] for x in (k, v)]
        close(found, torch.nn.functional.scaled_dot_product_attention(q[:, :, i : i + 1], *seen, scale=shape.scale))


def test_bytes_are_those_of_the_slots_and_the_pages() -> None:
    store = static(Recipe.parse("k4v2(window=20, sinks=4)"), batch=3, capacity=24 + PAGE + 1, new=2)
    slots, pages = 4 + 20 + 2, 2
    assert store.nbytes == 3 * (slots * H * 2 * D * 2 + pages * (H * Format(D, 4, 2).nbytes + 4))
    whole = static(Recipe.parse("exact(window=40)"), batch=2, capacity=40)
    assert whole.nbytes == 2 * 41 * H * 2 * D * 4


@pytest.mark.parametrize("recipe", ["int4", "polar5", "turboquant4"])
def test_what_has_no_pages_is_refused(recipe: str) -> None:
    with pytest.raises(RecipeError, match=r"kvstack\.Cache"):
        static(Recipe.parse(recipe), 1, 500)
