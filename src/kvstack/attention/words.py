"""Attention as a word with arguments, as recipes are written: `lrkv(rank=24, variant=nope)`, `gqa(4, qk_norm=on)`,
`mla(480, 32)`.

The arguments of each word, in their order, are fields of `DecoderConfig`. A word of the command line and the name of an arm in results.
"""

from typing import Any

from kvstack.attention.config import DecoderConfig
from kvstack.grammar import literal, parse_terms, show, suggest

# Word: its arguments, and the fields that they set.
WORDS: dict[str, dict[str, str]] = {
    "mha": {"qk_norm": "qk_norm"},
    "gqa": {"kv_heads": "num_key_value_heads", "qk_norm": "qk_norm"},
    "mqa": {"qk_norm": "qk_norm"},
    "mla": {"latent": "latent_dim", "rope": "rope_dim"},
    "lrkv": {"rank": "rank", "variant": "variant", "qk_norm": "qk_norm"},
    "csa": {
        "pool": "pool", "entries": "entries", "window": "window", "rope": "rope_dim",
        "index_heads": "index_heads", "index_dim": "index_dim",
    },
    "hca": {"pool": "pool", "window": "window", "rope": "rope_dim"},
}  # fmt: skip


def read(text: str) -> dict[str, Any]:
    """Fields of DecoderConfig for `text`. Raises RecipeError, pointing at the mistake."""
    term, *more = parse_terms(text)
    if more:
        raise more[0].word.error("Attention is one word.", "Leave out what follows the `+`.")
    if term.word.text not in WORDS:
        raise term.word.error(f"There is no attention `{term.word.text}`.", suggest(term.word.text, WORDS, "There are"))
    known = WORDS[term.word.text]
    fields: dict[str, Any] = {"attention": term.word.text}
    for place, argument in enumerate(term.arguments):
        if argument.name is None and place >= len(known):
            raise argument.value.error(f"`{term.word.text}` takes {len(known)} arguments.", "Leave this one out.")
        name = list(known)[place] if argument.name is None else argument.name.text
        if name not in known:
            assert argument.name is not None
            raise argument.name.error(f"`{term.word.text}` has no argument `{name}`.", suggest(name, known, "It has"))
        value = literal(argument.value.text)
        kind = DecoderConfig.__annotations__.get(known[name], int)
        if type(value) is not kind:
            expected = {str: "a name", bool: "on or off", int: "a whole number"}[kind]
            raise argument.value.error(f"`{name}` cannot be {show(value)}.", f"Expected {expected}.")
        fields[known[name]] = value
    return fields


def name(fields: dict[str, Any]) -> str:
    """The text that `read` reads as `fields`."""
    arguments = (f"{word}={show(fields[field])}" for word, field in WORDS[fields["attention"]].items() if field in fields)
    inside = ", ".join(arguments)
    return f"{fields['attention']}({inside})" if inside else str(fields["attention"])
