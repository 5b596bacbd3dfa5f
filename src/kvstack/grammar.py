"""The grammar of recipe strings, and errors that point at the mistake.

    recipe = term { "+" term }      term = word [ "(" [ argument { "," argument } ] ")" ]      argument = [ name "=" ] value

White space is free. Words, names and values are made of ASCII letters, digits, "_", "-" and ".". A value is read by its looks: a
whole number, a switch (on, off, true, false) or a name; which of them a parameter takes is told by its type annotation.

A `Place` is where something was said: a `Token` in a string, or a `Key` of a mapping. It makes errors that point there.
This module knows no words, no parameters and no recipes.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, Protocol, get_args, get_origin

from kvstack.errors import RecipeError

SWITCHES = {"on": True, "off": False, "true": True, "false": False}
_TOKEN = re.compile(r"\s*([A-Za-z0-9_.\-]+|[()+,=])")
_INTEGER = re.compile(r"-?[0-9]{1,1000}")


class Place(Protocol):
    """Where a user said something."""

    def error(self, problem: str, remedy: str = "") -> RecipeError:
        """An error that says what is wrong, where, and what to do."""
        ...


@dataclass(frozen=True)
class Token:
    """`source[start:stop]`; empty at the end of the source."""

    source: str
    start: int
    stop: int

    @property
    def text(self) -> str:
        """What stands there."""
        return self.source[self.start : self.stop]

    def error(self, problem: str, remedy: str = "") -> RecipeError:
        """See `Place.error`: the source with carets under the token."""
        shown = "".join(c if c.isprintable() else " " for c in self.source)
        carets = " " * self.start + "^" * max(1, self.stop - self.start)
        return RecipeError(f"{problem}\n    {shown}\n    {carets}\n{remedy}".rstrip())


@dataclass(frozen=True)
class Key:
    """A key of a mapping, with those above it: `precision.k`."""

    path: str

    def error(self, problem: str, remedy: str = "") -> RecipeError:
        """See `Place.error`."""
        return RecipeError(f"{self.path}: {problem} {remedy}".rstrip())


@dataclass(frozen=True)
class Argument:
    """One argument of a term; a positional one has no name."""

    name: Token | None
    value: Token


@dataclass(frozen=True)
class Term:
    """A word and its arguments."""

    word: Token
    arguments: tuple[Argument, ...]


def parse_terms(source: str) -> list[Term]:
    """The terms of a recipe string.

    Raises RecipeError, with a caret under the first token that does not fit.
    """
    reader = _Reader(source)
    terms = [_term(reader)]
    while reader.accept("+"):
        terms.append(_term(reader))
    if reader.next.text:
        raise reader.next.error("There is something after the recipe.", "Expected `+` and another term, or the end.")
    return terms


class _Reader:
    """The tokens of a source, with one token of look-ahead in `next`."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.next = self._read(0)

    def _read(self, position: int) -> Token:
        rest = self.source[position:]
        start = position + len(rest) - len(rest.lstrip())
        if start == len(self.source):
            return Token(self.source, start, start)
        if match := _TOKEN.match(self.source, position):
            return Token(self.source, *match.span(1))
        bad = Token(self.source, start, start + 1)
        raise bad.error(f"A recipe has no character {bad.text!r}.", "It is made of letters, digits and _ - . ( ) , = +.")

    def take(self) -> Token:
        token = self.next
        self.next = self._read(token.stop)
        return token

    def accept(self, mark: str) -> bool:
        return self.next.text == mark and bool(self.take())

    def atom(self, what: str) -> Token:
        if self.next.text in ("", *"()+,="):
            raise self.next.error("Something is missing here.", f"Expected {what}.")
        return self.take()


def _term(reader: _Reader) -> Term:
    word = reader.atom("a word such as polar4 or exact")
    arguments: list[Argument] = []
    if reader.accept("(") and not reader.accept(")"):
        while True:
            arguments.append(_argument(reader))
            if reader.accept(")"):
                break
            if not reader.accept(","):
                raise reader.next.error(f"The arguments of `{word.text}` do not end.", "Expected `,` or `)` here.")
    return Term(word, tuple(arguments))


def _argument(reader: _Reader) -> Argument:
    first = reader.atom("an argument: a value or name=value")
    return Argument(first, reader.atom(f"a value of {first.text}")) if reader.accept("=") else Argument(None, first)


def literal(text: str) -> Any:
    """The value that `text` stands for: an int, a bool or the text itself."""
    return int(text) if _INTEGER.fullmatch(text) else SWITCHES.get(text, text)


def show(value: Any) -> str:
    """The text that `literal` reads as `value`."""
    return ("off", "on")[value] if isinstance(value, bool) else str(value)


def check(name: str, kind: Any, value: Any, place: Place) -> None:
    """Raise RecipeError at `place` unless `value` is of the annotated type `kind`: int, bool or a Literal."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if not any(type(c) is type(value) and c == value for c in choices):
            remedy = suggest(str(value), [show(c) for c in choices], "Expected one of")
            raise place.error(f"`{name}` cannot be {show(value)}.", remedy)
    elif type(value) is not kind:
        expected = {int: "a whole number", bool: "on or off"}[kind]
        raise place.error(f"`{name}` cannot be {show(value)}.", f"Expected {expected}.")


def suggest(given: str, choices: Iterable[str], lead: str) -> str:
    """`lead` with all choices, after the one nearest to what was given, if one is near."""
    known = list(choices)
    near = get_close_matches(given.lower(), known, n=1)
    everything = f"{lead} {', '.join(known)}." if known else "There is nothing to choose from."
    return f"Did you mean {near[0]}? {everything}" if near else everything
