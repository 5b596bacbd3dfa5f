"""What a selection must know of a model, found and checked once, and the scorers of its layers made of it."""

from dataclasses import dataclass
from typing import Any

from kvstack.codecs.base import Context
from kvstack.errors import RecipeError, UnsupportedModelError
from kvstack.profile import Profile
from kvstack.recipe import Recipe
from kvstack.rope import Rope, rope_of
from kvstack.scorers.base import Future, Layer, Scorer, Selection

# What a profile holds when it has what a selection needs, and the option of `kvstack calibrate` that makes it.
_HELD = {
    "stats": ("query_norm", ""),
    "covariance": ("query_covariance", " --covariance"),
    "forecast": ("forecast_hidden", " --forecast"),
}


@dataclass(frozen=True)
class Known:
    """selection: of the recipe. rope: the model's; None for scorers that never look at it. query_heads: of every layer."""

    selection: Selection
    profile: Profile | None
    rope: Rope | None
    query_heads: int

    def scorer(self, key: Context, index: int, future: Future | None = None) -> Scorer:
        """The scorer of layer `index`, whose keys are those of `key`. future: in evaluations only. Raises RecipeError without one for
        a scorer that needs it."""
        if "future" in self.selection.needs and future is None:
            raise RecipeError("The oracle knows the future in evaluations only. Use another scorer.")
        profile, device = self.profile, key.device
        layer = Layer(
            head_dim=key.head_dim,
            heads=key.num_heads,
            groups=self.query_heads // key.num_heads,
            rope=self.rope or Rope.half(key.head_dim, device=device),
            device=device,
            index=index,
            stats=None if profile is None else profile.layer(index, device),
            future=future,
            forecast=None if profile is None else profile.forecast(index, device),
        )
        return self.selection.build(layer)


def known(model: Any, recipe: Recipe, profile: Profile | None) -> Known | None:
    """What the recipe's selection must know; None when it has none.

    Raises RecipeError when the profile lacks something of it, UnsupportedModelError when the model's RoPE cannot be followed
    and when it has no keys to judge.
    """
    selection = recipe.selection
    if selection is None:
        return None
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "rebuilds_keys", False):
        raise UnsupportedModelError(
            f"This {config.attention} attention rebuilds keys by their place, and a selection leaves gaps. "
            "Use no selection, or LRKV `nope`."
        )
    calibrated = [name for name in selection.needs if name in _HELD]
    for name in calibrated:
        tensor, option = _HELD[name]
        if profile is None or getattr(profile, tensor) is None:
            raise RecipeError(
                f"This selection needs {name} of the model. Make a profile with `kvstack calibrate MODEL{option} -o DIR`, and give it "
                "as `profile`."
            )
    return Known(selection, profile, rope_of(model) if calibrated else None, config.num_attention_heads)
