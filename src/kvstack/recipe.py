"""A recipe: the whole stack as frozen data, as a string, as a mapping and as YAML.

    Recipe(Polar(k=4, v=4), window=128, sinks=4, selection=Tri(2048))                                             the object
    "tri(2048)+polar4(window=128, sinks=4)"                                                                       the string
    {"selection": {"name": "tri", "budget": 2048}, "precision": {"name": "polar4"}, "window": 128, "sinks": 4}    the mapping, and YAML

A term of the string is a member of an axis: one of every axis at most, in any order. What words there are is one table, `WORDS`; the
arguments of a word, with types and defaults, are the fields of the dataclass it builds. A new member of an axis is a dataclass and a
row. The grammar itself is in `grammar.py`; presets as functions are in `presets.py`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from kvstack.codecs import Exact, Fp8, Kivi, MinMax, Polar, TurboQuant, TurboQuant4bitNC
from kvstack.codecs.base import Precision
from kvstack.errors import RecipeError
from kvstack.grammar import Key, Place, Term, check, literal, parse_terms, show, suggest
from kvstack.scorers import H2O, RKV, Expected, Forecast, KeyDiff, KNorm, Oracle, Random, SnapKV, Streaming, Tri
from kvstack.scorers.base import Selection

Json = dict[str, Any]
Member = Selection | Precision
T = TypeVar("T")

# The axes in the order in which their terms are written; each is a field of the recipe.
AXES: dict[str, type] = {"selection": Selection, "precision": Precision}

# Fields of the recipe itself, which are given as arguments of any one of its terms.
SHARED = ("window", "sinks")


@dataclass(frozen=True)
class Word:
    """What a word builds. fixed: fields that the word sets. numbers: the fields that each `#` of the word sets."""

    build: type[Member]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    numbers: tuple[tuple[str, ...], ...] = ()

    @property
    def axis(self) -> str:
        """The axis that it builds a member of."""
        return next(axis for axis, base in AXES.items() if issubclass(self.build, base))


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
    "tri": Word(Tri),
    "forecast": Word(Forecast),
    "streaming": Word(Streaming),
    "knorm": Word(KNorm),
    "keydiff": Word(KeyDiff),
    "snapkv": Word(SnapKV),
    "h2o": Word(H2O),
    "rkv": Word(RKV),
    "expected": Word(Expected),
    "random": Word(Random),
    "oracle": Word(Oracle),
}

# Whole recipes with a name. They stand alone and take `window` and `sinks`.
PRESETS: dict[str, str] = {
    "balanced": "polar4(window=128, sinks=4)",
    "max_quality": "polar5(search=on, window=128, sinks=4)",
    "max_context": "k4v2(window=128, sinks=4)",
}


@dataclass(frozen=True)
class Recipe:
    """Which tokens stay, and what is stored of each.

    precision: how body tokens become bytes. window: the newest tokens, kept exact. sinks: the first tokens, kept exact. selection: how
    many tokens stay, window and sinks among them, and which; None keeps all.
    Raises RecipeError when a number is negative, window and sinks fill the budget, or a member is none of its axis.
    """

    precision: Precision = Exact()  # noqa: RUF009 (frozen)
    window: int = 0
    sinks: int = 0
    selection: Selection | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.precision, Precision):
            raise RecipeError(f"precision is {self.precision!r}. Give a codec such as Polar(), or use Recipe.parse.")
        if not isinstance(self.selection, Selection | None):
            raise RecipeError(f"selection is {self.selection!r}. Give one such as Tri(2048), or use Recipe.parse.")
        for name in SHARED:
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**31:
                raise RecipeError(f"`{name}` cannot be {value!r}. Give a number of tokens, 0 or more and below 2^31.")
        if self.selection and self.window + self.sinks >= self.selection.budget:
            raise RecipeError(
                f"A budget of {self.selection.budget} leaves none to select beside a window of {self.window} and {self.sinks} sinks. "
                "Give a larger budget, a smaller window or fewer sinks."
            )

    @classmethod
    def parse(cls, text: "str | Recipe") -> "Recipe":
        """The recipe that a string such as `tri(2048)+polar4(window=128, sinks=4)` stands for; a recipe is returned as it is.

        Raises RecipeError with the position of the mistake and the nearest valid word.
        """
        if isinstance(text, Recipe):
            return text
        if not isinstance(text, str):
            raise RecipeError(f"A recipe is text or a Recipe, not {text!r}.")
        terms = parse_terms(text)
        members: dict[str, _Given] = {}
        shared: dict[str, _Given] = {}
        for term in terms:
            name = term.word.text
            if name in PRESETS:
                if len(terms) > 1:
                    raise term.word.error(f"`{name}` is a whole recipe.", "Use it alone, or write out its terms.")
                preset = {key: _Given(value, term.word) for key, value in _values(cls.parse(PRESETS[name])).items()}
                return _build(cls, preset | _arguments(term, {}))
            word, fixed = _look_up(name, term.word, [*WORDS, *PRESETS])
            if word.axis in members:
                raise term.word.error(f"This is a second {word.axis} term.", f"Give one {word.axis} term only.")
            given = fixed | _arguments(term, _open(word, fixed), fixed, shared)
            shared |= {key: given.pop(key) for key in SHARED if key in given}
            members[word.axis] = _Given(_member(word, name, given, term.word), term.word)
        return _build(cls, members | shared)

    def __str__(self) -> str:
        """The canonical and shortest string that parses to this recipe."""
        members = [getattr(self, axis) for axis in AXES if getattr(self, axis) != getattr(Recipe, axis)] or [self.precision]
        terms = [_say(member) for member in members]
        terms[-1][1].extend(f"{name}={getattr(self, name)}" for name in SHARED if getattr(self, name))
        return "+".join(word + (f"({', '.join(arguments)})" if arguments else "") for word, arguments in terms)

    def to_dict(self) -> Json:
        """The recipe as plain data, every field written out."""
        return {axis: _to_dict(getattr(self, axis)) for axis in AXES} | {name: getattr(self, name) for name in SHARED}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """The recipe of a mapping as `to_dict` gives it; fields with defaults may be left out, and a member may be just a word.

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
            if key in SHARED:
                check(key, kinds[key], value, place)
            elif (key, value) != ("selection", None):
                value = _from_dict(value, key)
            parts[key] = _Given(value, place)
        return _build(cls, parts)

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


def _examples(words: Iterable[str], numbers: Iterable[str] = ()) -> list[str]:
    """The words with these numbers, and then 4, in their places for numbers."""
    return [_fill(word, [*numbers, "4", "4"]) for word in words]


def _look_up(text: str, place: Place, choices: Iterable[str]) -> tuple[Word, dict[str, _Given]]:
    """The row of a word, and the fields that the word sets. Without such a row, the error offers the `choices`."""
    for name, word in WORDS.items():
        if match := re.fullmatch(_pattern(name), text):
            fixed = {key: _Given(value, place) for key, value in word.fixed.items()}
            kinds = _kinds(word.build)
            for keys, digits in zip(word.numbers, match.groups(), strict=True):
                for key in keys:
                    check(key, kinds[key], int(digits), place)
                    fixed[key] = _Given(int(digits), place)
            return word, fixed
    known = _examples(choices, re.findall("[1-9]", text))
    raise place.error(f"There is no word {text!r}.", suggest(text, known, "Words are"))


def _open(word: Word, fixed: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kind for name, kind in _kinds(word.build).items() if name not in fixed}


def _arguments(term: Term, kinds: Mapping[str, Any], fixed: Collection[str] = (), said: Collection[str] = ()) -> dict[str, _Given]:
    """The arguments of a term by name: positional ones take the names of `kinds` in order, shared ones are always named.

    fixed: what the word sets. said: the shared ones of the terms before.
    """
    known = {**kinds, **{name: _kinds(Recipe)[name] for name in SHARED}}
    given: dict[str, _Given] = {}
    for i, (name, value) in enumerate((a.name, a.value) for a in term.arguments):
        if name is None and (i >= len(kinds) or any(a.name for a in term.arguments[:i])):
            raise value.error("This argument needs a name.", f"Write name=value. {suggest('', known, 'Names are')}")
        key = name.text if name else list(kinds)[i]
        if key not in known:
            raise _unknown(key, term.word.text, known, fixed, name or value)
        if key in given or key in said:
            raise (name or value).error(f"`{key}` is given twice.", "Give it once.")
        given[key] = _Given(literal(value.text), value)
        check(key, known[key], given[key].value, value)
    return given


def _unknown(key: str, word: str, known: Iterable[str], fixed: Collection[str], place: Place) -> RecipeError:
    if key in fixed:
        return place.error(f"`{word}` sets `{key}` itself.", "Leave it out, or use a word that does not.")
    return place.error(f"`{word}` has no argument {key!r}.", suggest(key, known, "Arguments are"))


def _build(make: Callable[..., T], given: Mapping[str, _Given]) -> T:
    """`make(**values)`; an error points at the first value that is wrong beside those before it."""
    values = {name: g.value for name, g in given.items()}
    try:
        return make(**values)
    except ValueError:
        before: Json = {}
        for name, g in given.items():
            before[name] = g.value
            try:
                make(**before)
            except ValueError as error:
                raise g.place.error(str(error)) from error
        raise


def _member(word: Word, text: str, given: Mapping[str, _Given], place: Place) -> Member:
    """The member that a row builds with these fields; `text` is the word as it was given, at `place`."""
    make: Callable[..., Member] = word.build
    for f in fields(word.build):
        if f.default is MISSING and f.name not in given:
            raise place.error(f"`{text}` needs `{f.name}`.", f"Give it, as in {text}(2048) or, in a mapping, {f.name}: 2048.")
    return _build(make, {f.name: given[f.name] for f in fields(word.build) if f.name in given})


def _to_dict(member: Member | None) -> Json | None:
    if member is None:
        return None
    return {"name": next(name for name, word in WORDS.items() if word == Word(type(member))), **_values(member)}


def _from_dict(value: Any, axis: str) -> Member:
    """The member of an axis that a word, or a mapping with a `name` and fields, stands for."""
    data = {"name": value} if isinstance(value, str) else value
    words = [name for name, word in WORDS.items() if word.axis == axis]
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise Key(axis).error(f"This is no {axis}.", "Give a word, or a mapping with a word as `name` and its fields.")
    name, at = data["name"], Key(f"{axis}.name")
    word, given = _look_up(name, at, words)
    if word.axis != axis:
        raise at.error(
            f"`{name}` is no {axis}, but a {word.axis}.",
            f"Put it under `{word.axis}`. {suggest('', _examples(words), 'Words here are')}",
        )
    kinds = _open(word, given)
    for key, item in data.items():
        if key == "name":
            continue
        where = Key(f"{axis}.{key}")
        if key not in kinds:
            raise _unknown(str(key), name, kinds, given, where)
        check(key, kinds[key], item, where)
        given[key] = _Given(item, where)
    return _member(word, name, given, at)


def _say(member: Member) -> tuple[str, list[str]]:
    """The canonical word of a member, and the arguments that it leaves to be said because they are not the defaults."""
    values = _values(member)
    rows = ((name, word) for name, word in WORDS.items() if word.build is type(member))
    for name, word in rows:
        same = all(len({values[key] for key in keys}) == 1 for keys in word.numbers)
        if same and all(values[key] == value for key, value in word.fixed.items()):
            said = {*word.fixed, *(key for keys in word.numbers for key in keys)}
            left = [f for f in fields(member) if f.name not in said and values[f.name] != f.default]
            arguments = [("" if f.default is MISSING else f"{f.name}=") + show(values[f.name]) for f in left]
            return _fill(name, [str(values[keys[0]]) for keys in word.numbers]), arguments
    raise AssertionError(f"{type(member).__name__} has no word")


def _yaml() -> Any:
    try:
        import yaml
    except ModuleNotFoundError as e:
        raise RecipeError("YAML recipes need PyYAML. Install it with `pip install pyyaml`, or use a recipe string.") from e
    return yaml
