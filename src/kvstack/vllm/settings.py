"""What a server was asked to do with its cache: a recipe, other precisions for some layers, and a profile.

It is taken from the first of these that there is:

    1. the environment variable KVSTACK_RECIPE: a recipe, JSON such as that of 3, or the path of a file with it
    2. `--additional-config '{"kvstack": {...}}'`, the same mapping, or just a recipe
    3. `kvstack.json` in the folder of the model: {"recipe": "polar4", "layers": {"0": "fp8"}, "profile": "profile.safetensors"}

This module knows nothing of vLLM. What pages cannot do is refused here, so that nothing falls back in silence.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvstack.codecs.base import Context, Precision
from kvstack.errors import RecipeError
from kvstack.kernels.codes import page_format
from kvstack.kernels.pages import PAGE, Format
from kvstack.recipe import Recipe

VARIABLE, KEY, FILE = "KVSTACK_RECIPE", "kvstack", "kvstack.json"
_KEYS = ("recipe", "layers", "profile")


@dataclass(frozen=True)
class Settings:
    """recipe: of all layers. layers: precisions of single layers, by index. profile: path of a profile, or None. source: who said so.

    Raises RecipeError for what pages of a server cannot hold.
    """

    recipe: Recipe
    layers: Mapping[int, Precision] = field(default_factory=dict)
    profile: str | None = None
    source: str = "arguments"

    def __post_init__(self) -> None:
        if self.recipe.window or self.recipe.sinks:
            raise RecipeError(
                f"`{self.recipe}` keeps a window or sinks exact, and a page of vLLM has one format for all of its tokens. Use "
                f"`{Recipe(self.recipe.precision, selection=self.recipe.selection)}`, which a server can share between requests."
            )
        selection = self.recipe.selection
        if selection is None:
            return
        if selection.heads != "separate" or selection.prompt != "compress":
            raise RecipeError(f"`{self.recipe}`: a server evicts with heads=separate and prompt=compress only.")
        if selection.budget % PAGE or selection.interval % PAGE:
            raise RecipeError(
                f"`{self.recipe}`: pages hold {PAGE} tokens, and a server frees whole ones. Give a budget and an interval that are "
                f"multiples of {PAGE}, such as {max(PAGE, selection.budget // PAGE * PAGE)}."
            )
        if any(getattr(p, "centre", False) for p in (self.recipe.precision, *self.layers.values())):
            raise RecipeError(f"`{self.recipe}`: evictions judge all layers with one codec, and centres differ. Leave out `centre`.")
        if lacking := [need for need in selection.needs if need != "stats"]:
            raise RecipeError(f"`{self.recipe}` needs {', '.join(lacking)}, which a server has not. Use `tri`.")
        if selection.needs and self.profile is None:
            raise RecipeError(
                f"`{self.recipe}` needs a profile of the model. Make one with `kvstack calibrate MODEL -o DIR`, and give it as "
                '{"recipe": ..., "profile": "DIR/profile.safetensors"}.'
            )

    def precision(self, layer: int) -> Precision:
        """The precision of a layer."""
        return self.layers.get(layer, self.recipe.precision)


def read(additional: Any, model: str) -> Settings | None:
    """The settings for the model folder or hub name `model` with vLLM's `additional_config`; None when nobody asked for any.

    Raises RecipeError that names the source.
    """
    if text := os.environ.get(VARIABLE):
        path = Path(text)
        return _from_file(path) if path.suffix == ".json" else _parse(_json(text) if text.startswith("{") else text, VARIABLE, Path())
    if isinstance(additional, Mapping) and KEY in additional:
        return _parse(additional[KEY], "--additional-config", Path())
    path = Path(model) / FILE
    return _from_file(path) if path.is_file() else None


@cache
def layout(precision: Precision, head_dim: int, dtype: torch.dtype) -> Format:
    """The page of a precision. Raises RecipeError when it has none."""
    ctx = Context(head_dim, 1, dtype, torch.device("cpu"), torch.zeros(1, head_dim))
    return page_format(head_dim, precision.build("key", ctx), precision.build("value", ctx))


def _from_file(path: Path) -> Settings:
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as e:
        raise RecipeError(f'{path} cannot be read: {e}. Write {{"recipe": "polar4"}} into it, or remove it.') from e
    return _parse(_json(text, str(path)), str(path), path.parent)


def _json(text: str, source: str = VARIABLE) -> Any:
    try:
        return json.loads(text)
    except ValueError as e:
        raise RecipeError(f'{source} is no JSON: {e}. Write something like {{"recipe": "polar4"}}.') from e


def _parse(data: Any, source: str, folder: Path) -> Settings:
    data = {"recipe": data} if isinstance(data, str) else data
    try:
        if not isinstance(data, Mapping) or "recipe" not in data or set(data) - set(_KEYS):
            raise RecipeError(f"This is no mapping with a `recipe` and perhaps {', '.join(_KEYS[1:])}: {data!r}.")
        layers = data.get("layers", {})
        if not isinstance(layers, Mapping) or not all(str(i).isdecimal() for i in layers):
            raise RecipeError(f'`layers` is a mapping from numbers of layers to words such as {{"0": "fp8"}}, not {layers!r}.')
        recipe = data["recipe"]
        profile = data.get("profile")
        return Settings(
            Recipe.parse(recipe) if isinstance(recipe, str) else Recipe.from_dict(recipe),
            {int(i): Recipe.parse(word).precision for i, word in layers.items()},
            None if profile is None else str(folder / profile),
            source,
        )
    except RecipeError as e:
        raise RecipeError(f"{source}: {e}") from e
