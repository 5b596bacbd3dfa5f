"""kvstack: a KV cache that is several times smaller, in measured bytes, and whose codes attention reads.

cache = kvstack.Cache(model, "polar4(window=128, sinks=4)")     # any transformers decoder with RoPE
model.generate(**inputs, past_key_values=cache)
"""

from typing import TYPE_CHECKING, Any

from kvstack.errors import ArtefactError, BadInputError, KVStackError, RecipeError, UnsupportedModelError

if TYPE_CHECKING:
    from kvstack.hf import Cache
    from kvstack.hf.generate import generate
    from kvstack.profile import Profile
    from kvstack.recipe import Recipe

__all__ = [
    "ArtefactError",
    "BadInputError",
    "Cache",
    "KVStackError",
    "Profile",
    "Recipe",
    "RecipeError",
    "UnsupportedModelError",
    "generate",
]

# Imported on first use, so that `import kvstack` and `kvstack --help` do not wait for torch and transformers.
_LAZY = {"Cache": "kvstack.hf", "generate": "kvstack.hf.generate", "Profile": "kvstack.profile", "Recipe": "kvstack.recipe"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvstack' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
