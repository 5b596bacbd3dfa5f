"""Recipes: strings, mappings and YAML stand for the same object, and every mistake is pointed at."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstack import presets
from kvstack.codecs import Exact, Fp8, Kivi, MinMax, Polar, TurboQuant, TurboQuant4bitNC
from kvstack.codecs.base import Precision
from kvstack.errors import RecipeError
from kvstack.grammar import parse_terms, show
from kvstack.recipe import PRESETS, SHARED, WORDS, Recipe
from kvstack.scorers import Random, SnapKV, Tri


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    return st.booleans() if kind is bool else st.integers(-2, 300)


@st.composite
def members(draw: st.DrawFn, axis: str) -> Any:
    """A member of the axis with some fields set; what its dataclass refuses is left as it was."""
    build: Any = draw(st.sampled_from(sorted({w.build for w in WORDS.values() if w.axis == axis}, key=lambda c: c.__name__)))
    kinds, member = get_type_hints(build), build(draw(st.integers(1, 10_000))) if axis == "selection" else build()
    for f in draw(st.lists(st.sampled_from(fields(build)), unique=True)) if fields(build) else []:
        try:
            member = replace(member, **{f.name: draw(values_of(kinds[f.name]))})
        except ValueError:
            continue
    return member


@st.composite
def any_recipe(draw: st.DrawFn) -> Recipe:
    selection = draw(st.none() | members("selection"))
    room = selection.budget - 1 if selection else 10_000
    window = draw(st.integers(0, room))
    return Recipe(draw(st.just(Exact()) | members("precision")), window, draw(st.integers(0, room - window)), selection)


recipes = any_recipe()


@given(recipes)
def test_every_form_comes_back(recipe: Recipe) -> None:
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert str(Recipe.parse(str(recipe))) == str(recipe)


@given(recipes, st.data())
def test_white_space_and_order_are_free(recipe: Recipe, data: st.DataObject) -> None:
    terms = parse_terms(str(recipe))
    arguments: list[list[str]] = [[] for _ in terms]
    for i, term in enumerate(terms):
        for name, value in ((a.name.text if a.name else "budget", a.value.text) for a in term.arguments):
            arguments[data.draw(st.integers(0, len(terms) - 1)) if name in SHARED else i].append(f"{name}={value}")
    written = [f"{t.word.text}({','.join(data.draw(st.permutations(a)))})" for t, a in zip(terms, arguments, strict=True)]
    space = st.text(" \t\n", max_size=2)
    text = re.sub("[()+,=]", lambda m: data.draw(space) + m[0] + data.draw(space), "+".join(data.draw(st.permutations(written))))
    assert Recipe.parse(f" {text} ") == recipe


@given(recipes)
def test_the_string_says_no_default(recipe: Recipe) -> None:
    terms = parse_terms(str(recipe))
    assert len(terms) == 1 + (recipe.selection is not None and recipe.precision != Exact())
    for term in terms:
        for i, (name, value) in enumerate((a.name.text if a.name else "", a.value.text) for a in term.arguments):
            if name == "":
                assert recipe.selection and i == 0 and value == str(recipe.selection.budget)
                continue
            owners = [recipe] if name in SHARED else [recipe.selection, recipe.precision]
            defaults = [f.default for owner in owners if owner for f in fields(owner) if f.name == name]
            assert value not in map(show, defaults)
            assert name not in SHARED or term is terms[-1]


@pytest.mark.parametrize(
    ("text", "precision", "canonical"),
    [
        ("exact", Exact(), "exact"),
        ("bf16", Exact("bf16"), "bf16"),
        ("exact(fp16)", Exact("fp16"), "fp16"),
        ("fp8", Fp8(), "fp8"),
        ("polar", Polar(), "polar4"),
        ("polar3", Polar(k=3, v=3), "polar3"),
        ("polar(3, 3)", Polar(k=3, v=3), "polar3"),
        ("k4v2", Polar(k=4, v=2), "k4v2"),
        ("k4v4", Polar(), "polar4"),
        ("polar(v=2)", Polar(v=2), "k4v2"),
        ("polar4(plain, search=on)", Polar(scale="plain", search=True), "polar4(scale=plain, search=on)"),
        ("polar4(search=false, seed=7)", Polar(seed=7), "polar4(seed=7)"),
        ("int4", MinMax(), "int4"),
        ("kivi", Kivi(), "kivi2"),
        ("kivi2(64)", Kivi(group=64), "kivi2(group=64)"),
        ("turboquant3(orthogonal)", TurboQuant(bits=3, sketch="orthogonal"), "turboquant3(sketch=orthogonal)"),
        ("turboquant_4bit_nc", TurboQuant4bitNC(), "turboquant_4bit_nc"),
    ],
)
def test_words(text: str, precision: Precision, canonical: str) -> None:
    assert Recipe.parse(text) == Recipe(precision)
    assert str(Recipe(precision)) == canonical


def test_window_and_sinks_belong_to_the_recipe() -> None:
    recipe = Recipe(Polar(), window=128, sinks=4)
    assert Recipe.parse("polar4(window=128, sinks=4)") == recipe
    assert Recipe.parse(recipe) is recipe
    assert str(recipe) == "polar4(window=128, sinks=4)"


@pytest.mark.parametrize(
    ("text", "recipe", "canonical"),
    [
        ("tri(2048)", Recipe(selection=Tri(2048)), "tri(2048)"),
        ("tri(budget=2048)+exact", Recipe(selection=Tri(2048)), "tri(2048)"),
        ("tri(2048, sinks=4, window=16)", Recipe(Exact(), 16, 4, Tri(2048)), "tri(2048, window=16, sinks=4)"),
        (
            "tri(2048, 64, union)+bf16",
            Recipe(Exact("bf16"), selection=Tri(2048, 64, "union")),
            "tri(2048, interval=64, heads=union)+bf16",
        ),
        ("snapkv(512, queries=16)+k4v2", Recipe(Polar(4, 2), selection=SnapKV(512, queries=16)), "snapkv(512, queries=16)+k4v2"),
        ("random(64, seed=3)+polar4(seed=3)", Recipe(Polar(seed=3), 0, 0, Random(64, seed=3)), "random(64, seed=3)+polar4(seed=3)"),
        ("polar4+tri(2048)", Recipe(Polar(), selection=Tri(2048)), "tri(2048)+polar4"),
        ("tri(2048, window=128)+polar4(sinks=4)", Recipe(Polar(), 128, 4, Tri(2048)), "tri(2048)+polar4(window=128, sinks=4)"),
    ],
)
def test_selection_and_precision(text: str, recipe: Recipe, canonical: str) -> None:
    assert Recipe.parse(text) == recipe
    assert str(recipe) == canonical


def test_presets_are_functions_and_words() -> None:
    for name in PRESETS:
        assert getattr(presets, name)() == Recipe.parse(name) == Recipe.parse(PRESETS[name])
        assert Recipe.parse(name).window == 128 and Recipe.parse(name).sinks == 4
    assert presets.balanced() == Recipe(Polar(), 128, 4)
    assert Recipe.parse("balanced(window=7)") == Recipe(Polar(), 7, 4)


# The mistake, the text under the carets (its last occurrence; empty: the end), and what the message must contain.
MISTAKES = [
    ("", "", "Something is missing"),
    ("  ", "", "Something is missing"),
    ("poler4", "poler4", "Did you mean polar4?"),
    ("POLAR4", "POLAR4", "Did you mean polar4?"),
    ("k4w2", "k4w2", "Did you mean k4v2?"),
    ("polar04", "polar04", "Did you mean polar4?"),
    ("polar99", "polar99", "99"),
    ("zzz", "zzz", "balanced"),
    ("polar(k=99)", "99", "99"),
    ("polar4(k=3)", "k", "sets `k` itself"),
    ("bf16(fp16)", "fp16", "needs a name"),
    ("polar4(windw=128)", "windw", "Did you mean window?"),
    ("polar4(window=-1)", "-1", "0 or more"),
    ("polar4(window=x)", "x", "Expected a whole number"),
    ("polar4(window=on)", "on", "Expected a whole number"),
    ("polar4(scale=mached)", "mached", "Did you mean matched?"),
    ("polar4(search=1)", "1", "Expected on or off"),
    ("polar4(128)", "128", "matched"),
    ("polar4(scale=plain, exact)", "exact", "needs a name"),
    ("polar4(seed=1, seed=2)", "seed", "given twice"),
    ("polar4(window=128", "", "Expected `,` or `)`"),
    ("polar4(window=128,)", ")", "Something is missing"),
    ("polar4(window=)", ")", "a value of window"),
    ("polar4(window=1 sinks=2)", "sinks", "Expected `,` or `)`"),
    ("polar4)", ")", "after the recipe"),
    ("polar4 int4", "int4", "after the recipe"),
    ("polar4+", "", "Something is missing"),
    ("polar4 + int4", "int4", "second precision term"),
    ("polar4+balanced", "balanced", "Use it alone"),
    ("balanced(seed=1)", "seed", "Arguments are window, sinks"),
    ("po!ar", "!", "no character '!'"),
    ("fp8(3)", "3", "Names are window, sinks"),
    ("tri", "tri", "Give it, as in tri(2048)"),
    ("tri(window=16)+polar4", "tri", "needs `budget`"),
    ("polar4+trie(64)", "trie", "Did you mean tri?"),
    ("tri(64)+int4+tri(64)", "tri", "second selection term"),
    ("tri(64)+h2o(64)", "h2o", "second selection term"),
    ("snapvk(64)", "snapvk", "Did you mean snapkv?"),
    ("snapkv(64, kernel=4)", "4", "kernel"),
    ("tri(64)+balanced", "balanced", "Use it alone"),
    ("balanced+tri(64)", "balanced", "Use it alone"),
    ("tri(x)", "x", "Expected a whole number"),
    ("tri(0)", "0", "`budget` cannot be 0"),
    ("tri(interval=9, budget=0)", "0", "`budget` cannot be 0"),
    ("tri(64, interval=0)", "0", "`interval` cannot be 0"),
    ("tri(window=16, 64)", "64", "needs a name"),
    ("tri(64, hads=union)", "hads", "Did you mean heads?"),
    ("tri(64, heads=unio)", "unio", "Did you mean union?"),
    ("tri(64, k=4)+polar", "k", "no argument 'k'"),
    ("tri(64, window=8)+polar4(window=8)", "window", "given twice"),
    ("polar4(window=99)+tri(64)", "99", "larger budget"),
    ("tri(64, window=32, sinks=33)", "33", "33 sinks"),
]


@pytest.mark.parametrize(("text", "under", "message"), MISTAKES)
def test_a_mistake_is_pointed_at(text: str, under: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse(text)
    _, source, carets, *_ = str(error.value).split("\n")
    start, stop = carets.index("^"), len(carets)
    assert source[4:] == text and set(carets.strip()) == {"^"}
    assert source[start:stop] == under
    assert start - 4 == (text.rfind(under) if under else len(text))
    assert message in str(error.value)


@given(st.text(max_size=30) | st.lists(st.sampled_from([*WORDS, *"()+,=#14", "tri(9)", "window", "k", " "]), max_size=8).map("".join))
def test_any_text_is_a_recipe_or_a_clear_error(text: str) -> None:
    try:
        recipe = Recipe.parse(text)
    except RecipeError as e:
        assert "^" in str(e)
    else:
        assert Recipe.parse(str(recipe)) == recipe


def test_other_things_are_no_recipes() -> None:
    with pytest.raises(RecipeError, match="text or a Recipe"):
        Recipe.parse(None)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"use Recipe\.parse"):
        Recipe("polar4")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"selection is 'tri'.*use Recipe\.parse"):
        Recipe(selection="tri")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="leaves none to select"):
        Recipe(Polar(), 60, 4, Tri(64))
    assert Recipe(Polar(), 60, 3, Tri(64)).selection == Tri(64)
    with pytest.raises(RecipeError, match="0 or more"):
        Recipe(Polar(), window=-1)
    with pytest.raises(RecipeError, match="0 or more"):
        Recipe(Polar(), window=True)


def test_yaml_written_by_hand() -> None:
    assert Recipe.from_yaml("precision: k4v2\nwindow: 128\n") == Recipe(Polar(4, 2), 128)
    assert Recipe.from_yaml("precision: {name: polar, k: 4, v: 2, search: on}") == Recipe(Polar(4, 2, search=True))
    assert Recipe.from_yaml("polar4(window=3)") == Recipe(Polar(), 3)
    assert Recipe.from_yaml("selection: {interval: 64, name: tri, budget: 512}\nwindow: 16") == Recipe(Exact(), 16, 0, Tri(512, 64))
    assert Recipe.from_yaml("selection: null\nprecision: polar") == Recipe(Polar())


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("windo: 3", "windo: .*Did you mean window"),
        ("window: 1.5", r"window: .*cannot be 1\.5"),
        ("window: -1", "window: .*0 or more"),
        ("window: true", "window: .*whole number"),
        ("precision: poler4", r"precision\.name: .*Did you mean polar4"),
        ("precision: {name: polar, kk: 4}", r"precision\.kk: .*Did you mean k\?"),
        ("precision: {name: polar, k: 99}", r"precision\.k: .*99"),
        ("precision: {name: polar, k: [4]}", r"precision\.k: "),
        ("precision: {name: polar4, k: 4}", r"precision\.k: .*sets `k` itself"),
        ("precision: {name: polar, search: 1}", r"precision\.search: .*on or off"),
        ("precision: {k: 4}", "precision: .*`name`"),
        ("precision: 4", "precision: .*`name`"),
        ("precision: null", "precision: .*`name`"),
        ("precision: {name: tri, budget: 64}", r"precision\.name: `tri` is no precision, but a selection.*polar4"),
        ("selection: polar4", r"selection\.name: `polar4` is no selection, but a precision.*under `precision`.*tri"),
        ("selection: trie", r"selection\.name: .*Did you mean tri\? Words are tri[a-z, 0-9]*\.$"),
        ("selection: tri", r"selection\.name: .*needs `budget`.*budget: 2048"),
        ("selection: {name: tri, budget: 64, head: union}", r"selection\.head: .*Did you mean heads\?"),
        ("selection: {name: tri, interval: 9, budget: 0}", r"selection\.budget: .*cannot be 0"),
        ("selection: {name: tri, budget: on}", r"selection\.budget: .*whole number"),
        ("selection: 4", "selection: .*`name`"),
        ("{selection: {name: tri, budget: 64}, window: 64}", "window: .*larger budget"),
        ("3: 4", "3: .*no such key"),
        ("[]", "mapping with the keys precision, window, sinks"),
        ("", "mapping with the keys"),
        ("a: [", "not valid YAML"),
    ],
)
def test_yaml_errors_name_the_key(yaml: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(yaml)


def test_load_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe(Polar(), 128, 4).to_yaml())
    assert Recipe.load(path) == Recipe(Polar(), 128, 4)
    path.write_text("window: x")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: window: "):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "none.yaml")


def test_yaml_without_pyyaml_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(RecipeError, match="pip install pyyaml"):
        Recipe().to_yaml()


def test_every_word_builds_and_has_a_canonical_form() -> None:
    for name, word in WORDS.items():
        assert set(word.fixed) | {key for keys in word.numbers for key in keys} <= {f.name for f in fields(word.build)}
        text = name.replace("#", "4") + ("(64)" if word.axis == "selection" else "")
        assert getattr(Recipe.parse(text), word.axis).__class__ is word.build
        assert {f.name for f in fields(word.build)}.isdisjoint({"window", "sinks", "name"})
