"""Errors that a user can cause and can fix.

Every message says what is wrong and what to do next. Broken invariants of our own are `assert`s, never these.
All of them are `ValueError`s, so that code which only knows Python can still catch them.
"""


class KVStackError(ValueError):
    """Base of every error that kvstack raises for a user."""


class RecipeError(KVStackError):
    """A recipe cannot be parsed, or asks for something that does not exist or cannot be combined."""


class UnsupportedModelError(KVStackError):
    """The model's attention cannot be cached by kvstack (MLA, linear attention, no RoPE, ...)."""


class ArtefactError(KVStackError):
    """A saved file is missing, damaged, of another format, or belongs to another model."""


class BadInputError(KVStackError):
    """Tensors or prompts that cannot be used: NaN or Inf, empty, too long."""
