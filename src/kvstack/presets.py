"""Recipes with a name, as functions. The same names are words of the recipe grammar: `--recipe balanced`.

What they are is written once, in `recipe.PRESETS`. A preset is a starting point, not a promise: measure it on your model.
"""

from kvstack.recipe import Recipe


def balanced() -> Recipe:
    """Four bits for keys and values; the recent window and the first tokens exact."""
    return Recipe.parse("balanced")


def max_quality() -> Recipe:
    """Five bits with a searched scale: the smallest error that still saves about three times the memory."""
    return Recipe.parse("max_quality")


def max_context() -> Recipe:
    """The same with two bits for values, to which attention is less sensitive: the longest context in the same memory."""
    return Recipe.parse("max_context")
