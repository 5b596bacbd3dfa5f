"""Checks of what users give: fields of a recipe, and the numbers that a model gives to be cached."""

from torch import Tensor

from kvstack.errors import BadInputError, RecipeError


def whole_number(name: str, value: object, low: int, high: int) -> None:
    """Raise RecipeError unless `value` is an int in `low..high`."""
    if type(value) is not int or not low <= value <= high:
        raise RecipeError(f"`{name}` cannot be {value!r}. Give a whole number from {low} to {high}.")


def choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise RecipeError unless `value` is one of `choices`."""
    if value not in choices:
        raise RecipeError(f"`{name}` cannot be {value!r}. Give one of {', '.join(choices)}.")


def finite(x: Tensor, remedy: str) -> None:
    """Raise BadInputError that ends with `remedy` unless every number of `x` is finite."""
    if not x.isfinite().all():
        raise BadInputError(f"NaN or Inf among the vectors to be cached, {tuple(x.shape)} in {x.dtype}. {remedy}")
