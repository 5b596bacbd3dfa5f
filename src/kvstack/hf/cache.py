"""`kvstack.Cache`: a transformers cache whose full-attention layers hold compressed tokens that attention reads as they are.

    cache = kvstack.Cache(model, "polar4(window=128, sinks=4)")
    model.generate(**inputs, past_key_values=cache)
    cache.nbytes, cache.ratio, print(cache.report())

Making one sets the model's attention implementation to "kvstack" (`model.set_attn_implementation`), which is SDPA for any other cache.
A cache belongs to one model and one batch, and is for inference; `reset` empties it, also after an error in the middle of a forward.
On disk it is an artefact (`artefact.py`): recipe, fingerprint of the model, and the tensors of every tier. Offloading and compiled
generation are not supported.
"""

import hashlib
import warnings
import weakref
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from kvstack import artefact
from kvstack.cache.selection import Council, council
from kvstack.cache.store import LayerStore, Prefill, build_codecs, under
from kvstack.codecs.base import Context
from kvstack.errors import ArtefactError, BadInputError, UnsupportedModelError
from kvstack.fingerprint import fingerprint
from kvstack.hf import models
from kvstack.hf.attention import NAME, Fresh, Slots
from kvstack.hf.report import Report, TierReport
from kvstack.hf.selection import Known, known
from kvstack.profile import Profile
from kvstack.recipe import Recipe
from kvstack.scorers.base import Future

FORMAT, VERSION = "kvstack.cache", 2


class CompressedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One full-attention layer. slots: tokens that transformers has seen, padding included; `store` holds the real ones."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        recipe: Recipe,
        profile: Profile | None,
        prefill: Prefill,
        config: Any,
        index: int,
        known: Known | None,
        council: Council | None,
    ) -> None:
        super().__init__()
        # No reference to the cache: a cycle would keep the memory until the garbage collector comes. Weak ones to the model's things:
        # a copied cache (`copy.deepcopy`, for a prompt that is used again) must not copy the model.
        self.recipe, self.prefill, self.config, self.index = recipe, prefill, weakref.ref(config), index
        self.centres = (None, None) if profile is None else (profile.key_centre[index], profile.value_centre[index])
        self.known, self.council = known, council
        self.future: Future | None = None  # set by evaluations, for scorers that ask for it
        self.slots = 0
        self.store: LayerStore | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make an empty store for the shape of these keys and values."""
        key, value = (
            Context(x.shape[-1], x.shape[1], x.dtype, x.device, centre)
            for x, centre in zip((key_states, value_states), self.centres, strict=True)
        )
        scorer = None if self.known is None else self.known.scorer(key, self.index, self.future)
        self.store = LayerStore(self.recipe, key_states.shape[0], key, value, scorer, self.council)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take new keys and values `[B, H, T, D]`; the attention function stores them."""
        config = self.config()
        if config is None or config._attn_implementation != NAME:
            found = config and config._attn_implementation
            raise UnsupportedModelError(
                f"The model's attention is {found!r}, which cannot read a kvstack cache. Call model.set_attn_implementation({NAME!r})."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        if key_states.shape[0] != len(self.store.lengths):
            raise BadInputError(
                f"The cache holds a batch of {len(self.store.lengths)} and is given one of {key_states.shape[0]}. "
                "Use a new cache for another batch."
            )
        self.slots += key_states.shape[2]
        fresh = Fresh(key_states, value_states, self.store, self.prefill, self.index)
        return fresh, fresh

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See transformers. This is where it first tells how many tokens come."""
        if not query_length:
            raise BadInputError("The prompt is empty. Give at least one token.")
        return Slots(self.slots + query_length), 0

    def get_seq_length(self) -> int:
        """See transformers: slots, so padding counts."""
        return self.slots

    def get_max_length(self) -> int:
        """See transformers: no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self.store, self.slots, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens (transformers' convention; a positive number is the length to keep)."""
        n = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.slots - tokens_to_remove)
        n = min(n, self.slots)
        if n and self.store is not None:
            self.store.crop(n)
            self.slots -= n

    def _select(self, rows: Tensor) -> None:
        if self.store is not None:
            self.store.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See transformers."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See transformers."""
        if self.store is not None:
            self._select(torch.arange(len(self.store.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """See transformers."""
        if self.store is not None:
            self._select(torch.arange(len(self.store.lengths))[indices.cpu()])


class Cache(transformers.Cache):  # type: ignore[misc]
    """A compressed cache for `model`; give it to `generate` or `forward` as `past_key_values`.

    recipe: a string, a `Recipe` or a preset. profile: calibrated centres, for recipes that ask for them. prefill: see `cache.store`.
    Raises RecipeError for a recipe that does not parse or does not fit the model, UnsupportedModelError for a model whose cache is not
    keys and values, ArtefactError for the profile of another model.
    """

    layers: list[Any]

    def __init__(
        self, model: Any, recipe: str | Recipe = "balanced", *, profile: Profile | None = None, prefill: Prefill = "exact"
    ) -> None:
        if prefill not in ("exact", "strict"):
            raise BadInputError(f"`prefill` cannot be {prefill!r}. Give 'exact' or 'strict'.")
        models.check(model)
        self.recipe, self.profile, self.prefill = Recipe.parse(recipe), profile, prefill
        if profile is not None:
            profile.check(model)
        self._build_once(model)
        facts = known(model, self.recipe, profile)
        models.use(model, NAME)
        self._model = weakref.ref(model)
        config = model.config.get_text_config(decoder=True)
        plain = DynamicCache(config=config).layers
        selection = self.recipe.selection
        self._council = None if selection is None else council(selection, sum(not layer.is_sliding for layer in plain))
        layers = [
            layer if layer.is_sliding else CompressedLayer(self.recipe, profile, prefill, config, i, facts, self._council)
            for i, layer in enumerate(plain)
        ]
        super().__init__(layers=layers)
        if all(layer.is_sliding for layer in layers):
            warnings.warn(
                f"All layers of this {config.model_type} have sliding windows, which stay exact: no memory is saved.", stacklevel=2
            )

    @property
    def model(self) -> Any:
        """The model, as long as somebody else holds it. Raises UnsupportedModelError when it is gone."""
        model = self._model()
        if model is None:
            raise UnsupportedModelError("The model of this cache is gone. Keep it as long as its caches.")
        return model

    def _build_once(self, model: Any) -> None:
        """Let a recipe that does not fit the model fail now and not in the middle of a forward."""
        size, cpu, profile = models.head_dim(model), torch.device("cpu"), self.profile
        centres = (None, None) if profile is None else (profile.key_centre[0], profile.value_centre[0])
        build_codecs(self.recipe, *(Context(size, 1, torch.float32, cpu, centre) for centre in centres))

    def reset(self) -> None:
        """Forget everything and give the memory back; transformers' own layers would keep zeros."""
        self.layers = [type(layer)(layer.sliding_window) if layer.is_sliding else layer for layer in self.layers]
        for layer in self.layers:
            layer.reset()
        if self._council is not None:
            self._council.waiting.clear()

    @property
    def _compressed(self) -> list[CompressedLayer]:
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer) and layer.store is not None]

    @property
    def _shared_nbytes(self) -> int:
        """Bytes of what codecs hold (transforms, centres, codebooks), each counted once however many layers share it."""
        codecs = [c for layer in self._compressed if layer.store for tier in layer.store.tiers.values() for c in tier.codecs]
        return sum({t.data_ptr(): t.nbytes for c in codecs for t in c.state}.values())

    @property
    def nbytes(self) -> int:
        """Measured bytes of everything that the cache holds: tiers with slack and lengths, codec state, sliding layers."""
        sliding = sum(_held(layer) for layer in self.layers if not isinstance(layer, CompressedLayer))
        return sliding + self._shared_nbytes + sum(layer.store.nbytes for layer in self._compressed if layer.store)

    @property
    def bf16_nbytes(self) -> int:
        """Bytes that the tokens which came take in bf16, evicted ones too, without padding and slack; sliding layers hold no more than
        their window."""
        total = 0
        for layer in self.layers:
            if not isinstance(layer, CompressedLayer):
                total += 0 if not layer.is_initialized else 2 * (layer.keys.numel() + layer.values.numel())
            elif layer.store is not None:
                key, value = layer.store.window.codecs
                heads = layer.store.window.buffers[0][0].shape[1]
                heads *= layer.store.split
                total += 2 * int(layer.store.lengths.sum()) * heads * (key.fields[0].shape[0] + value.fields[0].shape[0])
        return total

    @property
    def ratio(self) -> float:
        """bf16 bytes over measured bytes of the same tokens; 1 for an empty cache."""
        return self.bf16_nbytes / self.nbytes if self.bf16_nbytes else 1.0

    def report(self) -> Report:
        """What is held where; print it for a table."""
        tiers: dict[str, tuple[int, int]] = {}
        for layer in self.layers:
            held = (
                {"sliding": (layer.keys.shape[2] * layer.keys.shape[0] if layer.is_initialized else 0, _held(layer))}
                if not isinstance(layer, CompressedLayer)
                else {} if layer.store is None else _held_by(layer.store)
            )  # fmt: skip
            for name, (tokens, nbytes) in held.items():
                before = tiers.get(name, (0, 0))
                tiers[name] = (max(before[0], tokens), before[1] + nbytes)
        rows = [TierReport(name, *held) for name, held in tiers.items()] + [TierReport("codec state", 0, self._shared_nbytes)]
        return Report(str(self.recipe), tuple(rows), self.nbytes, self.bf16_nbytes)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the compressed cache to one file. Raises ArtefactError when that cannot be done; an old file then stays."""
        tensors: dict[str, Tensor] = {}
        slots = []
        for i, layer in enumerate(self.layers):
            slots.append(layer.get_seq_length())
            if isinstance(layer, CompressedLayer):
                tensors |= {} if layer.store is None else {f"{i}.{name}": t for name, t in layer.store.state().items()}
            elif layer.is_initialized:
                tensors |= {f"{i}.keys": layer.keys, f"{i}.values": layer.values}
        about = {"recipe": str(self.recipe), "prefill": self.prefill, "fingerprint": fingerprint(self.model), "slots": slots}
        about["centres"] = self._centres()
        artefact.write(path, tensors, FORMAT, VERSION, about)

    @classmethod
    def load(cls, path: str | PathLike[str], model: Any, *, profile: Profile | None = None) -> "Cache":
        """The cache in a file, for the model that filled it.

        Raises ArtefactError when the file is missing, damaged, of another version or of another model.
        """
        tensors, about = artefact.read(path, FORMAT, VERSION)
        if about["fingerprint"] != fingerprint(model):
            raise ArtefactError(
                f"{path} belongs to the model with fingerprint {about['fingerprint']}, and yours is {fingerprint(model)}. "
                "Load it with the model that wrote it."
            )
        cache = cls(model, about["recipe"], profile=profile, prefill=about["prefill"])
        try:
            cache._fill(tensors, about["slots"])
        except (KeyError, ValueError) as e:
            raise ArtefactError(f"{path} does not fit this model and recipe: {e}. Write it again.") from e
        if cache._centres() != about["centres"]:
            raise ArtefactError(f"{path} was written with another profile. Give the profile that it was written with.")
        return cache

    def _centres(self) -> str:
        """Name of the centres that the codes are relative to."""
        digest = hashlib.sha256()
        for layer in self._compressed:
            for codec in layer.store.body.codecs if layer.store else ():
                if codec.centre is not None:
                    digest.update(codec.centre.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _fill(self, tensors: Mapping[str, Tensor], slots: list[int]) -> None:
        model = self.model
        for i, (layer, n) in enumerate(zip(self.layers, slots, strict=True)):
            if not n:
                continue
            if isinstance(layer, CompressedLayer):
                state = under(tensors, f"{i}.")
                # The window has the type of the keys that filled it, or 16 bits, and a store for either is the same.
                rows, window = len(state["lengths"]), (state["window.key.x"], state["window.value.x"])
                key, value = (t.new_empty(rows, t.shape[0] * t.shape[1] // rows, 0, t.shape[-1], device=model.device) for t in window)
                layer.lazy_initialization(key, value)
                assert layer.store is not None
                layer.store.load_state(state)
                layer.slots = n
            else:
                key, value = (tensors[f"{i}.{side}"].to(model.device) for side in ("keys", "values"))
                layer.lazy_initialization(key, value)
                layer.keys, layer.values, layer.cumulative_length = key, value, n


def _held_by(store: LayerStore) -> dict[str, tuple[int, int]]:
    """Tokens (of a KV head, in the mean) and bytes of every tier of a store."""
    held = {name: (int(t.lengths.sum()) // store.split, t.nbytes) for name, t in store.tiers.items()}
    return held if store.chooser is None else held | {"selection": (0, store.chooser.nbytes)}


def _held(layer: DynamicSlidingWindowLayer) -> int:
    """Bytes that the keys and values of a sliding layer keep alive, those behind a view included."""
    if not layer.is_initialized:
        return 0
    return int(layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes())
