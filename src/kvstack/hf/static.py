"""A transformers cache of fixed size, all of it on the device, for `kvstack.generate`.

Every layer is a `StaticStore`; the positions are shared (`Steps`). Unlike `Cache` it cannot be cropped, saved or reordered, takes
whole prompts first and then one token a row and step, and must be told when a step is over (`steps.advance`). Rows may have different
lengths.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from kvstack.cache.static import Size, StaticStore, Steps
from kvstack.codecs import Exact
from kvstack.codecs.base import Codec, Context, Side
from kvstack.errors import KVStackError, RecipeError, UnsupportedModelError
from kvstack.hf import models
from kvstack.hf.attention import NAME, Fresh, Slots
from kvstack.hf.selection import Known, known
from kvstack.kernels.codes import page_format
from kvstack.kernels.decode import choose
from kvstack.profile import Profile
from kvstack.recipe import Recipe


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Hands new keys and values over to the attention function with their store."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, recipe: Recipe, steps: Steps, profile: Profile | None, index: int, known: Known | None) -> None:
        super().__init__()
        self.recipe, self.steps, self.index = recipe, steps, index
        self.centres = (None, None) if profile is None else (profile.key_centre[index], profile.value_centre[index])
        self.known = known
        self.store: StaticStore | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve the store."""
        key, value = (
            Context(x.shape[-1], x.shape[1], x.dtype, x.device, centre)
            for x, centre in zip((key_states, value_states), self.centres, strict=True)
        )
        scorer = None if self.known is None else self.known.scorer(key, self.index)
        self.store, self.is_initialized = StaticStore(self.recipe, self.steps, key, value, scorer), True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See transformers; the attention function stores them."""
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        fresh = Fresh(key_states, value_states, self.store, "exact", self.index)
        return fresh, fresh

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See transformers: a marker, since the store needs no mask."""
        return Slots(query_length), 0

    def get_seq_length(self) -> int:
        """Nobody may need it: positions are given."""
        return 0

    def get_max_length(self) -> int:
        """See transformers."""
        return self.steps.size.capacity


class StaticCache(transformers.Cache):  # type: ignore[misc]
    """A cache for `model` of `batch` rows with room for `capacity` tokens each.

    Raises RecipeError for a recipe whose codes have no page format, UnsupportedModelError for models that it cannot serve.
    """

    def __init__(self, model: Any, recipe: Recipe, batch: int, capacity: int, profile: Profile | None = None) -> None:
        models.check(model)
        if profile is not None:
            profile.check(model)
        config = model.config.get_text_config(decoder=True)
        if getattr(config, "rebuilds_keys", False):
            raise UnsupportedModelError(
                f"kvstack.generate does not rebuild the keys of {config.attention}. "
                "Use kvstack.Cache with model.generate, or LRKV `nope`."
            )
        plain = DynamicCache(config=config).layers
        if any(layer.is_sliding for layer in plain):
            raise UnsupportedModelError(
                f"{config.model_type} has sliding layers, which cannot be decoded by graph. Use `kvstack.Cache`."
            )
        models.use(model, NAME)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        # Where no kernel reads pages of 16 bits, all tokens are window, unless some shall leave.
        exact = recipe.selection is None and isinstance(recipe.precision, Exact) and choose(model.device).name != "hopper"
        if not exact:
            _check_pages(model, recipe, profile)
        facts = known(model, recipe, profile)
        if facts is not None:
            _check_selection(facts, Context(models.head_dim(model), heads, model.dtype, model.device))
        self.steps = Steps(
            Size(batch, heads, capacity), 0 if exact else recipe.sinks, capacity if exact else recipe.window, model.device
        )
        self.recipe = recipe
        super().__init__(layers=[_Layer(recipe, self.steps, profile, i, facts) for i in range(len(plain))])

    def evict(self) -> None:
        """Take from every row what is above its budget: after every `interval` steps, between two of them."""
        stores = [layer.store for layer in self.layers]
        for store in stores:
            store.evict()
        self.steps.evict(stores[0].places)

    @property
    def nbytes(self) -> int:
        """Bytes that are reserved."""
        return sum(layer.store.nbytes for layer in self.layers if layer.store is not None)

    @property
    def path(self) -> str:
        """Which kernel reads the cache, and why; once there is something in it."""
        body = next((layer.store.body for layer in self.layers if layer.store is not None), None)
        found = choose(self.steps.lengths.device) if body is None else body.path
        return f"{found.name} kernel: {found.reason}"

    @property
    def bf16_bytes_per_token(self) -> int:
        """Bytes of one token of one row in bf16."""
        exact = (x for layer in self.layers if layer.store is not None for x in layer.store.exact)
        return sum(2 * x.shape[1] * x.shape[-1] for x in exact)


def obstacle(model: Any, recipe: Recipe, profile: Profile | None = None) -> str | None:
    """Why there can be no `StaticCache` of this recipe for the model; None when there can."""
    try:
        StaticCache(model, recipe, 1, 1, profile)
    except KVStackError as e:
        return str(e)
    return None


def _check_selection(facts: Known, key: Context) -> None:
    """Raise RecipeError for a selection that the store cannot follow."""
    selection = facts.selection
    if selection.heads != "separate" or selection.prompt != "compress":
        raise RecipeError("Decoding by graph takes heads=separate and prompt=compress only. For others use `kvstack.Cache`.")
    scorer = facts.scorer(key, 0)
    if scorer.queries or scorer.records:
        raise RecipeError("This scorer looks at more than keys and values, which decoding by graph does not keep. Use `kvstack.Cache`.")


def _check_pages(model: Any, recipe: Recipe, profile: Profile | None) -> None:
    """Let a recipe without a page format fail now and not in the middle of a forward."""
    size = models.head_dim(model)

    def codec(side: Side) -> Codec:
        centre = None if profile is None else getattr(profile, f"{side}_centre")[0]
        return recipe.precision.build(side, Context(size, 1, model.dtype, torch.device("cpu"), centre))

    page_format(size, codec("key"), codec("value"))
