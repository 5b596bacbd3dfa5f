"""A store with its body in pages does what a store with its body in plain buffers does."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kvstack.cache import LayerStore
from kvstack.cache.paged import PagedTier, has_pages
from kvstack.codecs import Context
from kvstack.errors import BadInputError, RecipeError
from kvstack.kernels.reference import Shape
from kvstack.recipe import Recipe

torch.set_num_threads(1)
H, G, D = 2, 2, 64
SHAPE = Shape(D**-0.5)
RECIPES = [
    "polar4(codebook=exact)",
    "polar4(window=5, sinks=2)",
    "k4v2(window=16)",
    "polar2(sinks=3, scale=unbiased)",
    "fp8(window=7, sinks=1)",
]


def stores(recipe: str, batch: int) -> tuple[LayerStore, LayerStore]:
    """One with a plain body, one with a paged one, which on a machine without kernels nobody would choose."""
    context = Context(D, H, torch.float32, torch.device("cpu"))
    plain, paged = (LayerStore(Recipe.parse(recipe), batch, context, context) for _ in range(2))
    paged.body = PagedTier(*plain.body.codecs, batch, H, torch.device("cpu"))
    return plain, paged


def draw(b: int, t: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, G * H, t, D), torch.randn(b, H, t, D), torch.randn(b, H, t, D)


def both(pair: tuple[LayerStore, LayerStore], t: int, **how: Any) -> None:
    x = draw(len(pair[0].lengths), t)
    want, got = (s.attend(*x, SHAPE, **how) for s in pair)
    assert got.isfinite().all() and (got - want).norm() <= 3e-6 * want.norm() + 1e-9
    same(pair)


def same(pair: tuple[LayerStore, LayerStore]) -> None:
    plain, paged = (s.body.state() for s in pair)
    assert plain.keys() == paged.keys()
    for name, t in plain.items():
        a, b = (x.view(torch.uint8) if x.dtype.itemsize == 1 else x for x in (t, paged[name]))
        assert torch.equal(a, b), name


@pytest.mark.parametrize("prefill", ["exact", "strict"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_attention_and_the_same_codes(recipe: str, prefill: str) -> None:
    torch.manual_seed(0)
    pair = stores(recipe, 2)
    for t in (140, 1, 1, 5, 8, 9, 1, 120, 1):  # over page borders; up to 8 the decode path takes it
        both(pair, t, prefill=prefill)


def test_softcap_and_sink() -> None:
    torch.manual_seed(0)
    pair = stores("polar4(window=3)", 1)
    x = draw(1, 30)
    sink = torch.randn(G * H)
    for q, k, v in (x, draw(1, 1), draw(1, 2)):
        want, got = (s.attend(q, k, v, Shape(D**-0.5, 5.0), sink=sink) for s in pair)
        assert (got - want).norm() <= 3e-6 * want.norm()


@pytest.mark.parametrize("recipe", RECIPES[:2])
def test_rows_of_different_lengths(recipe: str) -> None:
    torch.manual_seed(0)
    pair = stores(recipe, 3)
    valid = torch.arange(150) >= torch.tensor([[0], [70], [149]])
    both(pair, 150, valid=valid)
    for _ in range(3):
        both(pair, 1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_crop_and_select(recipe: str) -> None:
    torch.manual_seed(0)
    pair = stores(recipe, 2)
    both(pair, 300)
    for n, rows in ((3, [0, 1]), (150, [1, 0, 1]), (1, [2, 2])):
        for s in pair:
            s.crop(n)
            s.select(torch.tensor(rows))
        same(pair)
        both(pair, 2)
        both(pair, 1)


def test_rows_that_were_the_same_part_ways() -> None:
    torch.manual_seed(0)
    _, paged = stores("polar4", 1)
    paged.append(*draw(1, 200)[1:])
    paged.select(torch.tensor([0, 0]))
    paged.append(*draw(2, 1)[1:])
    k = paged.body.sides()[0].codes[0]
    assert torch.equal(k[0, :, :200], k[1, :, :200]) and not torch.equal(k[0, :, 200], k[1, :, 200])


def test_state_goes_from_either_kind_to_either() -> None:
    torch.manual_seed(0)
    pair = stores("polar4", 2)
    both(pair, 200, valid=torch.arange(200) >= torch.tensor([[0], [60]]))
    fresh = stores("polar4", 2)
    for source, target in zip(pair, reversed(fresh), strict=True):
        target.body.load_state(source.body.state())
    same((fresh[0], pair[1]))
    same((pair[0], fresh[1]))
    both((fresh[0], fresh[1]), 1)


def test_the_pool_is_counted_and_grows_little() -> None:
    torch.manual_seed(0)
    _, paged = stores("polar4", 1)
    paged.append(*draw(1, 128 * 40)[1:])
    assert isinstance(paged.body, PagedTier)
    page = H * paged.body.pages.format.nbytes
    assert 40 * page <= paged.body.nbytes <= 40 * page + 1000
    paged.append(*draw(1, 1)[1:])
    assert paged.body.nbytes <= 42 * page + 1000


def test_numbers_that_are_not_finite_change_nothing() -> None:
    pair = stores("polar4", 1)
    both(pair, 20)
    for store in pair:
        q, k, v = draw(1, 1)
        k[0, 0, 0, 3] = torch.nan
        with pytest.raises(BadInputError):
            store.attend(q, k, v, SHAPE)
    assert torch.equal(*(s.lengths for s in pair))
    both(pair, 1)


def test_who_has_pages() -> None:
    cpu = torch.device("cpu")
    context = Context(D, H, torch.float32, cpu)
    key, value = (Recipe.parse("polar4").precision.build(side, context) for side in ("key", "value"))
    assert not has_pages(key, value, D, cpu)
    int4 = Recipe.parse("int4").precision.build("key", context)
    with pytest.raises(RecipeError, match="Pages hold"):
        PagedTier(int4, int4, 1, H, cpu)
