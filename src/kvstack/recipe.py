"""A recipe: the whole stack as frozen data, as a string, as a mapping and as YAML.

    Recipe(Polar(k=4, v=4), window=128, sinks=4)                       the object
    "polar4(window=128, sinks=4)"                                      the string
    {"precision": {"name": "polar4"}, "window": 128, "sinks": 4}       the mapping, and YAML of it

What words there are is one table, `WORDS`; their arguments, with types and defaults, are the fields of the dataclass it builds.
A new member of an axis is a dataclass and a row. The grammar itself is in `grammar.py`; presets as functions are in `presets.py`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from kvstack.codecs import Exact, Fp8, Kivi, MinMax, Polar, TurboQuant, TurboQuant4bitNC
from kvstack.codecs.base import Precision
from kvstack.errors import RecipeError
from kvstack.grammar import Key, Place, Term, check, literal, parse_terms, show, suggest

Json = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Word:
    """What a word builds. fixed: fields that the word sets. numbers: the fields that each `#` of the word sets."""

    build: type[Precision]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    numbers: tuple[tuple[str, ...], ...] = ()
    axis: str = "precision"


# `#` stands for a number. Of the words that can say the same thing, the first is the canonical one.
WORDS: dict[str, Word] = {
    "bf16": Word(Exact, {"dtype": "bf16"}),
    "fp16": Word(Exact, {"dtype": "fp16"}),
    "exact": Word(Exact),
    "fp8": Word(Fp8),
    "polar#": Word(Polar, numbers=(("k", "v"),)),
    "k#v#": Word(Polar, numbers=(("k",), ("v",))),
    "polar": Word(Polar),
    "int#": Word(MinMax, numbers=(("bits",),)),
    "int": Word(MinMax),
    "kivi#": Word(Kivi, numbers=(("bits",),)),
    "kivi": Word(Kivi),
    "turboquant#": Word(TurboQuant, numbers=(("bits",),)),
    "turboquant": Word(TurboQuant),
    "turboquant_4bit_nc": Word(TurboQuant4bitNC),
}

# Whole recipes with a name. They stand alone and take `window` and `sinks`.
PRESETS: dict[str, str] = {
    "balanced": "polar4(window=128, sinks=4)",
    "max_quality": "polar5(search=on, window=128, sinks=4)",
    "max_context": "k4v2(window=128, sinks=4)",
}

# Fields of the recipe itself that are given as arguments of a term of the axis.
SHARED: dict[str, tuple[str, ...]] = {"precision": ("window", "sinks")}


@dataclass(frozen=True)
class Recipe:
    """What is stored of every token.

    precision: how body tokens become bytes. window: the newest tokens, kept exact. sinks: the first tokens, kept exact.
    Raises RecipeError when a number is negative or the precision is none.
    """

    precision: Precision = Exact()  # noqa: RUF009 (frozen)
    window: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.precision, Precision):
            raise RecipeError(f"precision is {self.precision!r}. Give a codec such as Polar(), or use Recipe.parse.")
        for name in ("window", "sinks"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**31:
                raise RecipeError(f"`{name}` cannot be {value!r}. Give a number of tokens, 0 or more and below 2^31.")

    @classmethod
    def parse(cls, text: "str | Recipe") -> "Recipe":
        """The recipe that a string such as `polar4(window=128, sinks=4)` stands for; a recipe is returned as it is.

        Raises RecipeError with the position of the mistake and the nearest valid word.
        """
        if isinstance(text, Recipe):
            return text
        if not isinstance(text, str):
            raise RecipeError(f"A recipe is text or a Recipe, not {text!r}.")
        terms = parse_terms(text)
        parts: dict[str, _Given] = {}
        for term in terms:
            if term.word.text in PRESETS:
                if len(terms) > 1:
                    raise term.word.error(f"`{term.word.text}` is a whole recipe.", "Use it alone, or write out its terms.")
                preset = cls.parse(PRESETS[term.word.text])
                return _build(partial(replace, preset), term.word, _arguments(term, {}, SHARED["precision"]))
            word, fixed = _look_up(term.word.text, term.word)
            if word.axis in parts:
                raise term.word.error(f"This is a second {word.axis} term.", f"Give one {word.axis} term only.")
            given = _arguments(term, _open(word, fixed), SHARED[word.axis], fixed)
            parts |= {name: given.pop(name) for name in SHARED[word.axis] if name in given}
            parts[word.axis] = _Given(_build(word.build, term.word, {**fixed, **given}), term.word)
        return _build(cls, terms[0].word, parts)

    def __str__(self) -> str:
        """The canonical and shortest string that parses to this recipe."""
        word, left = _name(self.precision)
        left |= {name: getattr(self, name) for name in SHARED["precision"] if getattr(self, name)}
        return word + (f"({', '.join(f'{name}={show(value)}' for name, value in left.items())})" if left else "")

    def to_dict(self) -> Json:
        """The recipe as plain data, every field written out."""
        name = next(n for n, w in WORDS.items() if w == Word(type(self.precision)))
        return {"precision": {"name": name, **_values(self.precision)}, "window": self.window, "sinks": self.sinks}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """The recipe of a mapping as `to_dict` gives it; fields may be left out and a precision may be just a word.

        Raises RecipeError that names the key.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"A recipe is a mapping with the keys {', '.join(_kinds(cls))}, not {data!r}.")
        kinds = _kinds(cls)
        parts: dict[str, _Given] = {}
        for key, value in data.items():
            place = Key(str(key))
            if key not in kinds:
                raise place.error("A recipe has no such key.", suggest(str(key), kinds, "Keys are"))
            if key not in SHARED:
                check(key, kinds[key], value, place)
            parts[key] = _Given(_member(value, place) if key in SHARED else value, place)
        return _build(cls, Key("recipe"), parts)

    def to_yaml(self) -> str:
        """The recipe as YAML. Raises RecipeError when PyYAML is not installed."""
        return str(_yaml().safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_yaml(cls, text: str) -> "Recipe":
        """The recipe of a YAML mapping (see `from_dict`) or of a YAML string (see `parse`).

        Raises RecipeError that names the key, or when PyYAML is not installed.
        """
        yaml = _yaml()
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise RecipeError(f"The recipe is not valid YAML: {e}") from e
        return cls.parse(data) if isinstance(data, str) else cls.from_dict(data)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Recipe":
        """The recipe in a YAML file. Raises RecipeError that names the file and the key."""
        try:
            return cls.from_yaml(Path(path).read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            raise RecipeError(f"{path} cannot be read: {e}. Give a YAML file with a recipe.") from e
        except RecipeError as e:
            raise RecipeError(f"{path}: {e}") from e


class _Given(NamedTuple):
    """A value and where it was given."""

    value: Any
    place: Place


def _kinds(cls: Any) -> dict[str, Any]:
    """Names and annotated types of the fields of a dataclass."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _values(member: Any) -> Json:
    return {f.name: getattr(member, f.name) for f in fields(member)}


def _pattern(word: str) -> str:
    return re.escape(word).replace(r"\#", "(0|[1-9][0-9]{0,8})")


def _fill(word: str, numbers: Iterable[str]) -> str:
    for number in numbers:
        word = word.replace("#", number, 1)
    return word


def _look_up(text: str, place: Place) -> tuple[Word, dict[str, _Given]]:
    """The row of a word, and the fields that the word sets."""
    for name, word in WORDS.items():
        if match := re.fullmatch(_pattern(name), text):
            fixed = {key: _Given(value, place) for key, value in word.fixed.items()}
            kinds = _kinds(word.build)
            for keys, digits in zip(word.numbers, match.groups(), strict=True):
                for key in keys:
                    check(key, kinds[key], int(digits), place)
                    fixed[key] = _Given(int(digits), place)
            return word, fixed
    numbers = re.findall("[1-9]", text)
    known = [_fill(name, [*numbers, "4", "4"]) for name in (*WORDS, *PRESETS)]
    raise place.error(f"There is no word {text!r}.", suggest(text, known, "Words are"))


def _open(word: Word, fixed: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kind for name, kind in _kinds(word.build).items() if name not in fixed}


def _arguments(term: Term, kinds: Mapping[str, Any], shared: tuple[str, ...], fixed: Collection[str] = ()) -> dict[str, _Given]:
    """The arguments of a term by name: positional ones take the names of `kinds` in order, `shared` ones are always named."""
    known = {**kinds, **{name: _kinds(Recipe)[name] for name in shared}}
    given: dict[str, _Given] = {}
    for i, (name, value) in enumerate((a.name, a.value) for a in term.arguments):
        if name is None and (i >= len(kinds) or any(a.name for a in term.arguments[:i])):
            raise value.error("This argument needs a name.", f"Write name=value. {suggest('', known, 'Names are')}")
        key = name.text if name else list(kinds)[i]
        if key not in known:
            raise _unknown(key, term.word.text, known, fixed, name or value)
        if key in given:
            raise (name or value).error(f"`{key}` is given twice.", "Give it once.")
        given[key] = _Given(literal(value.text), value)
        check(key, known[key], given[key].value, value)
    return given


def _unknown(key: str, word: str, known: Iterable[str], fixed: Collection[str], place: Place) -> RecipeError:
    if key in fixed:
        return place.error(f"`{word}` sets `{key}` itself.", "Leave it out, or use a word that does not.")
    return place.error(f"`{word}` has no argument {key!r}.", suggest(key, known, "Arguments are"))


def _build(make: Callable[..., T], place: Place, given: Mapping[str, _Given]) -> T:
    """`make(**values)`; an error points at the value that is wrong by itself, or else at `place`."""
    try:
        return make(**{name: g.value for name, g in given.items()})
    except ValueError as error:
        for name, g in given.items():
            try:
                make(**{name: g.value})
            except ValueError as alone:
                raise g.place.error(str(alone)) from error
        raise place.error(str(error)) from error


def _member(value: Any, place: Key) -> Precision:
    """The member of an axis that a word, or a mapping with a `name` and fields, stands for."""
    data = {"name": value} if isinstance(value, str) else value
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise place.error("This is no member of the axis.", "Give a word such as polar4, or a mapping with a `name`.")
    at = Key(f"{place.path}.name")
    word, given = _look_up(data["name"], at)
    kinds = _open(word, given)
    for key, item in data.items():
        if key == "name":
            continue
        where = Key(f"{place.path}.{key}")
        if key not in kinds:
            raise _unknown(str(key), data["name"], kinds, given, where)
        check(key, kinds[key], item, where)
        given[key] = _Given(item, where)
    return _build(word.build, at, given)


def _name(member: Precision) -> tuple[str, Json]:
    """The canonical word of a member, and the fields that it leaves to be said because they are not the defaults."""
    values = _values(member)
    rows = ((name, word) for name, word in WORDS.items() if word.build is type(member))
    for name, word in rows:
        same = all(len({values[key] for key in keys}) == 1 for keys in word.numbers)
        if same and all(values[key] == value for key, value in word.fixed.items()):
            said = {*word.fixed, *(key for keys in word.numbers for key in keys)}
            name = _fill(name, [str(values[keys[0]]) for keys in word.numbers])
            return name, {f.name: values[f.name] for f in fields(member) if f.name not in said and values[f.name] != f.default}
    raise AssertionError(f"{type(member).__name__} has no word")


def _yaml() -> Any:
    try:
        import yaml
    except ModuleNotFoundError as e:
        raise RecipeError("YAML recipes need PyYAML. Install it with `pip install pyyaml`, or use a recipe string.") from e
    return yaml
