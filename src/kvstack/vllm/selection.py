"""Eviction in vLLM: how many tokens of a request are there, in which of its pages, and how the scheduler gets pages back.

With a budget of K tokens and an interval I, both whole pages, the first K of a request's tokens to be evicted are so when K + I have
come, and again after every further I. Counted in tokens n that have come,

    gone(n) = I * max(0, floor((n - K) / I))        held(n) = n - gone(n), at most K + I - 1

so everybody who knows n knows the layout, and nothing needs to be told. An eviction leaves the best K tokens in the first K / 128 pages
of the request; the pages of the tokens that came after it stay where they are, behind a gap:

    [ K / 128 pages | gone / 128 pages that are free | pages of the newest held - K tokens ]

The scheduler's side is a manager of its own for this kind of cache (`Manager`), which frees the gap when the step that made it has been
processed; vLLM has that for sliding windows, and its registry of cache specs takes ours. The worker's side is `steps`, which skips the
gap, and evicts what a step has made due at the beginning of the next, before that writes anything into pages that are free by then.

Contents of pages change after they are full, so they cannot be shared: no prefix caching, no transfer of pages, and drafts that may be
rejected would be counted, so no speculative decoding either (`choice` refuses).
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from kvstack.cache.eviction import evict
from kvstack.errors import RecipeError
from kvstack.kernels.pages import PAGE, Pages
from kvstack.profile import Profile
from kvstack.rope import Rope, rope_of
from kvstack.scorers.base import Layer, QueryStats, Scorer, Selection
from kvstack.vllm.profiles import own_heads, profile_of
from kvstack.vllm.settings import Settings

SCORES = 2**26  # that are worked out at once


@dataclass(frozen=True)
class Plan:
    """budget, interval: tokens, whole pages."""

    budget: int
    interval: int

    def gone(self, came: Any) -> Any:
        """How many of the `came` tokens, a number or `[B]`, are evicted."""
        done = (came - self.budget) // self.interval * self.interval
        return done.clamp(min=0) if isinstance(done, Tensor) else max(0, done)

    def table(self, table: Tensor, gone: Tensor, columns: int) -> Tensor:
        """The pages that rows have, `[B, columns]`, of their `table [B, pages]`, where `gone [B]` tokens are."""
        column = torch.arange(columns, device=table.device)
        place = torch.where(column < self.budget // PAGE, column, column + gone[:, None] // PAGE)
        return table.gather(1, place.clamp_(max=table.shape[1] - 1).long())


class Manager(FullAttentionManager):  # type: ignore[misc]
    """The scheduler's side of requests whose tokens are evicted."""

    def __init__(self, kv_cache_spec: "SelectionSpec", **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.plan = Plan(kv_cache_spec.budget, kv_cache_spec.interval)
        self.max_admission_blocks_per_request = kv_cache_spec.most_pages

    def remove_skipped_blocks(self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None) -> None:
        """See vLLM: free the pages that no token is in any more."""
        first = self.plan.budget // PAGE
        self._remove_blocks_in_range(request_id, first, first + self.plan.gone(processed_computed_tokens) // PAGE)


@register_kv_cache_spec(manager_class=Manager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class SelectionSpec(FullAttentionSpec):  # type: ignore[misc]
    """A cache of which tokens are evicted. budget, interval: see `Plan`. in_flight: tokens that can be under way at once."""

    budget: int
    interval: int
    in_flight: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, plan: Plan, in_flight: int) -> "SelectionSpec":
        """`spec` with evictions."""
        made: SelectionSpec = replace_as(spec, cls, budget=plan.budget, interval=plan.interval, in_flight=in_flight)
        return made

    @property
    def most_pages(self) -> int:
        """Pages that a request can hold at once."""
        return -(-(self.budget + self.interval + self.in_flight) // PAGE) + 1

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """See vLLM: bytes that the longest request can take."""
        pages = -(-vllm_config.model_config.max_model_len // PAGE)
        return int(min(pages, self.most_pages) * self.page_size_bytes)

    @classmethod
    def merge(cls, specs: Sequence["SelectionSpec"]) -> "SelectionSpec":
        """See vLLM: the spec of a group of layers."""
        assert all(spec == specs[0] for spec in specs), "layers of a group keep as many tokens"
        return specs[0]


@dataclass(frozen=True)
class Due:
    """Rows that have tokens to give away. table: `[B, pages]`. lengths: `[B]` int32, tokens among which to choose, in whole pages.
    came, newer: `[B]`, all tokens of the rows and those after these."""

    table: Tensor
    lengths: Tensor
    came: Tensor
    newer: Tensor

    @staticmethod
    def nothing(pages: int, device: torch.device) -> "Due":
        """A row without tokens."""
        none = torch.zeros(1, dtype=torch.int32, device=device)
        return Due(none[:, None].repeat(1, pages), none, none, none)

    def split(self, rows: int) -> "Iterator[Due]":
        """Some rows at a time."""
        parts = (x.split(rows) for x in (self.table, self.lengths, self.came, self.newer))
        return (Due(*part) for part in zip(*parts, strict=True))


class Evictor:
    """Evicts tokens of all `layers` at once, whose pages lie one layer behind the other. settings: the selection and the profile."""

    def __init__(self, layers: Sequence[Any], settings: Settings, config: Any) -> None:
        self.layers = sorted(layers, key=lambda layer: layer.kv_cache.data_ptr())
        first, self.count = self.layers[0], len(layers)
        pool = first.kv_cache.view(torch.uint8).flatten(2)
        for i, layer in enumerate(self.layers):
            assert layer.kv_cache.data_ptr() == pool.data_ptr() + i * pool.nbytes, "pages of layers lie apart"
        self.blocks = len(pool)
        self.pool = pool.as_strided((self.count * self.blocks, *pool.shape[1:]), pool.stride(), pool.storage_offset())
        self.body, self.scale = first.impl.body, first.impl.scale
        assert settings.recipe.selection is not None
        self.scorer = self._scorer(settings.recipe.selection, profile_of(settings, config.model_config), config, first.impl)

    def _scorer(self, selection: Selection, profile: Profile | None, config: Any, impl: Any) -> Scorer:
        """The scorer of all heads of all layers. Raises RecipeError for one that looks at what a server does not keep."""
        heads, query_heads = self.count * impl.num_kv_heads, impl.num_heads
        device, stats = self.pool.device, None
        if profile is not None:
            held = [profile.layer(extract_layer_index(layer.layer_name), device) for layer in self.layers]
            stats = QueryStats(*(torch.cat([own_heads(getattr(s, name), query_heads) for s in held]) for name in ("mean", "norm")))
        turns = rope(config.model_config.hf_config, impl.head_size)
        turns = Rope(*(x.to(device) for x in (turns.pairs, turns.frequency, turns.scale)))
        made = selection.build(Layer(impl.head_size, heads, query_heads // impl.num_kv_heads, turns, device, stats=stats))
        if made.queries or made.records or made.observes:
            raise RecipeError(
                "This scorer looks at more than keys and values, which a server does not keep. Use `tri`, or one of keys."
            )
        return made

    def evict(self, due: Due, places: int) -> None:
        """Leave the rows that are due their best `places` tokens, in the first of their pages."""
        pages, groups = due.table.shape[1], self.layers[0].impl.num_heads
        shift = torch.arange(self.count, dtype=torch.int32, device=due.table.device) * self.blocks
        for some in due.split(max(1, SCORES // (self.count * groups * pages * PAGE))):
            table = (some.table + shift[:, None, None]).flatten(0, 1)
            body = self.body.over(Pages(self.body.pages.format, self.pool, table, some.lengths.repeat(self.count)), self.body.cum)
            evict(body, self.scorer, places, some.came, some.newer, self.scale, self.count)


def rope(config: Any, head_dim: int) -> Rope:
    """The RoPE of models with this transformers `config`, found on one thin layer of random weights."""
    from transformers import AutoModelForCausalLM

    thin = copy.deepcopy(config.get_text_config(decoder=True))
    thin.update(dict(num_hidden_layers=1, vocab_size=8, intermediate_size=8, hidden_size=8, head_dim=head_dim))
    thin.update({name: 0 for name in ("pad_token_id", "bos_token_id", "eos_token_id") if getattr(thin, name, None) is not None})
    if getattr(thin, "layer_types", None):
        thin.layer_types = ["full_attention"]
    return rope_of(AutoModelForCausalLM.from_config(thin))
