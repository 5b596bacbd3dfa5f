"""The store of a layer: what is where, what it costs, and that attention sees exactly what it should."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstack.cache import LayerStore, plan_bytes
from kvstack.codecs import Context
from kvstack.errors import BadInputError
from kvstack.kernels.reference import Shape
from kvstack.recipe import Recipe

torch.set_num_threads(1)
H, D = 2, 32
SHAPE = Shape(D**-0.5)
RECIPES = [
    "exact", "bf16", "fp8", "polar4", "polar3(window=5, sinks=2)", "k4v2(window=1)", "int4(sinks=3)", "turboquant3(window=4)",
    "turboquant_4bit_nc(window=2, sinks=1)", "kivi2(group=8)", "kivi4(group=8, window=6, sinks=2)",
]  # fmt: skip


def context(heads: int = H, size: int = D) -> Context:
    return Context(size, heads, torch.float32, torch.device("cpu"))


def store(recipe: str, batch: int = 1) -> LayerStore:
    return LayerStore(Recipe.parse(recipe), batch, context(), context())


def draw(seed: int, b: int, t: int, heads: int = H) -> Tensor:
    return torch.randn(b, heads, t, D, generator=torch.Generator().manual_seed(seed))


def qkv(seed: int, b: int, t: int) -> tuple[Tensor, Tensor, Tensor]:
    return draw(seed, b, t, 2 * H), draw(seed + 1, b, t), draw(seed + 2, b, t)


def part(qkv: tuple[Tensor, Tensor, Tensor], rows: Any, tokens: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x[rows][:, :, tokens] for x in qkv)
    return q, k, v


def close(x: Tensor, y: Tensor, tolerance: float = 2e-6) -> None:
    assert x.isfinite().all() and (x - y).norm() <= tolerance * y.norm()


def state(s: LayerStore) -> dict[str, Tensor]:
    return {f"{name}.{n}": t for name, tier in s.tiers.items() for n, t in tier.state().items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_strict_prefill_is_decoding_token_by_token(recipe: str) -> None:
    x = qkv(0, 1, 45)
    one, chunks = store(recipe), store(recipe)
    stepped = torch.cat([one.attend(*part(x, slice(None), slice(i, i + 1)), SHAPE) for i in range(45)], 2)
    at = [0, 1, 20, 37, 45]
    strict = torch.cat(
        [chunks.attend(*part(x, slice(None), slice(a, b)), SHAPE, prefill="strict") for a, b in itertools.pairwise(at)], 2
    )
    close(strict, stepped)
    assert all(torch.equal(a, b) for a, b in zip(state(one).values(), state(chunks).values(), strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("prefill", ["exact", "strict"])
def test_padding_is_neither_stored_nor_seen(recipe: str, prefill: Any) -> None:
    """Rows of a padded batch, left or right, are what each row is alone; the padding itself is poison."""
    x = qkv(3, 3, 30)
    lengths, side = [30, 11, 24], ["left", "left", "right"]
    valid = torch.stack(
        [torch.arange(30) >= 30 - n if s == "left" else torch.arange(30) < n for n, s in zip(lengths, side, strict=True)]
    )
    poisoned = tuple(t.masked_fill(~valid[:, None, :, None], math.nan) for t in x[1:])
    batch = store(recipe, 3)
    out = batch.attend(x[0], *poisoned, SHAPE, valid=valid, prefill=prefill)
    more = qkv(9, 3, 6)
    after = [batch.attend(*part(more, slice(None), slice(i, i + 1)), SHAPE, prefill=prefill) for i in range(6)]
    assert batch.lengths.tolist() == [n + 6 for n in lengths]
    for b in range(3):
        alone = store(recipe)
        row = slice(b, b + 1)
        close(out[row][:, :, valid[b]], alone.attend(*part(x, row, valid[b]), SHAPE, prefill=prefill))
        for i in range(6):
            close(after[i][row], alone.attend(*part(more, row, slice(i, i + 1)), SHAPE, prefill=prefill))
    assert not out[1][:, ~valid[1]].any() and not out[2][:, ~valid[2]].any()


@pytest.mark.parametrize("recipe", ["exact", "exact(window=4, sinks=2)"])
@pytest.mark.parametrize("prefill", ["exact", "strict"])
def test_lossless_is_plain_causal_attention(recipe: str, prefill: Any) -> None:
    q, k, v = qkv(5, 2, 33)
    s = store(recipe, 2)
    out = torch.cat(
        [s.attend(*part((q, k, v), slice(None), slice(a, b)), SHAPE, prefill=prefill) for a, b in [(0, 13), (13, 14), (14, 33)]], 2
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True, scale=SHAPE.scale
    )
    close(out, expected)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(RECIPES), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_tokens_are_where_the_recipe_says(recipe: str, chunks: list[int]) -> None:
    r, s, n = Recipe.parse(recipe), store(recipe, 2), 0
    for i, t in enumerate(chunks):
        s.attend(*qkv(i, 2, t), SHAPE)
        n += t
        block = s.body.block
        assert s.lengths.tolist() == [n, n]
        assert s.sinks.longest == min(n, r.sinks)
        body = max(0, n - r.sinks - r.window) // block * block
        assert s.body.longest == body and s.window.longest == n - s.sinks.longest - body


@pytest.mark.parametrize("recipe", RECIPES)
def test_measured_bytes_hold_what_the_formula_says(recipe: str) -> None:
    s = store(recipe)
    s.append(draw(0, 1, 1000), draw(1, 1, 1000))
    plan = plan_bytes(Recipe.parse(recipe), 1000, context(), context())
    lengths = sum(t.lengths.nbytes for t in s.tiers.values())
    # One big prompt is stored without slack.
    assert s.nbytes - lengths == plan
    for i in range(50):
        s.append(draw(i, 1, 1), draw(i, 1, 1))
    plan = plan_bytes(Recipe.parse(recipe), 1050, context(), context())
    assert plan <= s.nbytes - lengths <= 1.04 * plan + 40 * 2 * H * D * 4


def test_memory_is_what_torch_holds_and_is_given_back() -> None:
    s = store("polar4(window=16, sinks=4)")
    s.append(draw(0, 1, 500), draw(1, 1, 500))
    held = sum(t.untyped_storage().nbytes() for tier in s.tiers.values() for side in tier.buffers for t in side)
    assert s.nbytes == held + 3 * 8
    assert s.window.nbytes - 8 == 16 * 2 * H * D * 2, "the window keeps nothing of the prompt alive"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("crop", [1, 3, 9, 20, 40])
def test_crop_then_the_same_tokens_again(recipe: str, crop: int) -> None:
    """What stays after a crop is what was there; appending goes on from it."""
    x, again = qkv(1, 1, 40), qkv(50, 1, 7)
    s = store(recipe)
    s.append(*x[1:])
    body = s.body.longest
    s.crop(crop)
    assert s.lengths.tolist() == [40 - crop]
    assert s.body.longest <= body and s.body.longest % s.body.block == 0
    out = s.attend(*again, SHAPE)
    assert out.isfinite().all() and s.lengths.tolist() == [47 - crop]
    if recipe.startswith("exact"):
        fresh = store(recipe)
        fresh.append(x[1][:, :, : 40 - crop], x[2][:, :, : 40 - crop])
        close(out, fresh.attend(*again, SHAPE))


def test_a_cut_block_goes_back_to_the_window_as_it_was_stored() -> None:
    s = store("kivi4(group=8)")
    s.append(draw(0, 1, 16), draw(1, 1, 16))
    key, _ = s.body.sides()
    decoded = key.codec.decode(key.codes)
    s.crop(3)
    assert (s.body.longest, s.window.longest) == (8, 5)
    close(s.window.buffers[0][0][:, :, :5].float(), decoded[:, :, 8:13], 4e-3)  # the window has 16 bits


@pytest.mark.parametrize("recipe", ["kivi8(group=8)", "kivi8(group=8, window=3, sinks=2)", "polar5(window=4)"])
@pytest.mark.parametrize("crop", [1, 5, 8, 12, 19, 30])
def test_ragged_rows_are_cropped_like_each_row_alone(recipe: str, crop: int) -> None:
    x, more = qkv(0, 3, 40), qkv(70, 3, 4)
    valid = torch.arange(40) >= torch.tensor([[0], [7], [16]])
    s = store(recipe, 3)
    s.attend(*x, SHAPE, valid=valid)
    s.crop(crop)
    out = s.attend(*more, SHAPE)
    for b in range(3):
        alone = store(recipe)
        alone.attend(*part(x, slice(b, b + 1), valid[b]), SHAPE)
        alone.crop(crop)
        assert alone.lengths[0] == s.lengths[b] - 4
        close(out[b : b + 1], alone.attend(*part(more, slice(b, b + 1), slice(None)), SHAPE))


def test_rows_that_end_in_padding_are_not_cropped() -> None:
    s = store("polar4", 2)
    s.attend(*qkv(0, 2, 10), SHAPE, valid=torch.arange(10) < torch.tensor([[10], [7]]))
    with pytest.raises(BadInputError, match="Pad on the left"):
        s.crop(2)
    s.attend(*qkv(3, 2, 2), SHAPE)
    s.crop(1)
    assert s.lengths.tolist() == [11, 8]


def test_what_is_stored_outlives_the_mode_it_was_stored_in() -> None:
    s = store("polar4(window=3, sinks=1)")
    with torch.inference_mode():
        for i in range(6):
            s.attend(*qkv(i, 1, 3), SHAPE)
    q, k, v = (t.requires_grad_() for t in qkv(9, 1, 2))
    out = s.attend(q, k, v, SHAPE)
    assert out.requires_grad and not any(t.requires_grad for tier in s.tiers.values() for side in tier.buffers for t in side)


def test_a_state_holds_nothing_behind_the_rows() -> None:
    s = store("fp8(window=3)", 2)
    s.attend(*qkv(0, 2, 20), SHAPE, valid=torch.arange(20) >= torch.tensor([[0], [12]]))
    for tier in s.tiers.values():
        for side in tier.buffers:
            for t in side:
                t[1, :, int(tier.lengths[1]) :] = math.nan
    assert all(t.float().isfinite().all() for t in state(s).values())


@pytest.mark.parametrize("recipe", ["exact", "polar3(window=5, sinks=2)", "kivi2(group=8, window=3)"])
def test_rows_can_be_selected_and_repeated(recipe: str) -> None:
    x, more = qkv(1, 3, 20), qkv(7, 4, 2)
    valid = torch.arange(20) >= torch.tensor([[0], [4], [9]])
    s, rows = store(recipe, 3), torch.tensor([2, 0, 0, 1])
    s.attend(*x, SHAPE, valid=valid)
    s.select(rows)
    out = s.attend(*more, SHAPE)
    for i, b in enumerate(rows.tolist()):
        alone = store(recipe)
        alone.attend(*part(x, slice(b, b + 1), valid[b]), SHAPE)
        close(out[i : i + 1], alone.attend(*part(more, slice(i, i + 1), slice(None)), SHAPE))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_are_refused_and_change_nothing(recipe: str, bad: float) -> None:
    s = store(recipe)
    s.append(draw(0, 1, 10), draw(1, 1, 10))
    before = {n: t.clone() for n, t in state(s).items()}
    q, k, v = qkv(4, 1, 3)
    v[0, 1, 2, 3] = bad
    with pytest.raises(BadInputError, match="NaN or Inf"):
        s.attend(q, k, v, SHAPE)
    assert all(torch.equal(before[n], t) for n, t in state(s).items())


def test_sixteen_bit_models_keep_their_type_in_the_window() -> None:
    ctx = Context(D, H, torch.float16, torch.device("cpu"))
    s = LayerStore(Recipe.parse("polar4(window=8)"), 1, ctx, ctx)
    assert s.window.buffers[0][0].dtype == torch.float16
    assert store("polar4(window=8)").window.buffers[0][0].dtype == torch.bfloat16
    assert store("exact(window=8)").window.buffers[0][0].dtype == torch.float32
