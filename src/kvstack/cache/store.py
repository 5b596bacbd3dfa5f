"""The store of one layer: sinks, window and body, and attention over the three.

    sinks   the first `recipe.sinks` tokens of every row, 16 bits
    window  the newest `recipe.window` tokens, 16 bits; with a block codec up to a block more, until a whole block can leave
    body    everything between, under the recipe's codec; with a selection, what of it the scorer has kept

A token enters the window. When it leaves, it becomes a sink or is encoded into the body, once and for good. With a window of 0 tokens
it leaves at once. Keys are stored as attention uses them, after RoPE, so the order inside a tier means nothing to attention; tokens
keep the order in which they came.

A token's *rank* is its place among the real tokens of its row. A query always sees its own token exact, and of the tokens before it:

    exact prefill    the chunk that it came in exact, everything before that as stored: best quality, fastest
    strict prefill   what decoding token by token would have shown it: the same quality whatever the chunks are

Tokens are evicted (`cache.selection`) at the end of a call. Where KV heads keep different numbers of tokens (heads=pooled), a head of a
row is a row of its own in the tiers. The store knows nothing of models, positions or engines.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvstack.allocators import indices
from kvstack.cache.paged import PagedTier, has_pages
from kvstack.cache.selection import STEPS, Chooser, Council
from kvstack.cache.tier import Tier, plainly
from kvstack.codecs import Exact
from kvstack.codecs.base import Codec, Context
from kvstack.codecs.exact import ExactCodec
from kvstack.errors import BadInputError, RecipeError, UnsupportedModelError
from kvstack.kernels.decode import Exact as ExactTokens
from kvstack.kernels.decode import decode
from kvstack.kernels.past import attend_past
from kvstack.kernels.reference import QUERIES, Partial, Places, Shape, Side, attend, attend_first, attention_weights, merge
from kvstack.recipe import Recipe
from kvstack.scorers.base import Scorer

Prefill = Literal["exact", "strict"]


class LayerStore:
    """Tokens of one layer, for `batch` rows. The tiers are public: `sinks`, `window`, `body`.

    scorer, council: for recipes with a selection. Raises RecipeError for codecs out of which no single token can be taken.
    """

    def __init__(
        self, recipe: Recipe, batch: int, key: Context, value: Context, scorer: Scorer | None = None, council: Council | None = None
    ) -> None:
        self.recipe = recipe
        pooled = recipe.selection is not None and recipe.selection.heads == "pooled"
        self.split = key.num_heads if pooled else 1
        rows, heads = batch * self.split, key.num_heads // self.split
        codecs = build_codecs(recipe, key, value)
        exact = ExactCodec(key.head_dim, exact_dtype(recipe, key)), ExactCodec(value.head_dim, exact_dtype(recipe, value))

        def tier(pair: tuple[Codec, Codec]) -> Tier:
            return Tier(*pair, rows, heads, key.device)

        self.sinks, self.window = tier(exact), tier(exact)
        paged = has_pages(*codecs, key.head_dim, key.device, ragged=pooled)
        self.body = PagedTier(*codecs, rows, heads, key.device) if paged else tier(codecs)
        self.padding = torch.zeros(batch, dtype=torch.bool)  # rows that end in padding
        self.lengths = torch.zeros(batch, dtype=torch.long)  # real tokens of each row that came, on the CPU
        self.chooser: Chooser | None = None
        if recipe.selection is not None:
            assert scorer is not None and council is not None, "a selection needs its scorer"
            self.chooser = Chooser(recipe.selection, scorer, council, rows, heads, self.split, key.device)

    @property
    def tiers(self) -> dict[str, Tier]:
        """The tiers by name."""
        return {"sinks": self.sinks, "window": self.window, "body": self.body}

    @property
    def nbytes(self) -> int:
        """Measured bytes of the tiers and of what a scorer keeps: live storage, slack and lengths. What codecs share between layers is
        not in it."""
        return sum(t.nbytes for t in self.tiers.values()) + (0 if self.chooser is None else self.chooser.nbytes)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store `k, v [B, H, T, D]` without attention. Raises RecipeError for recipes with a selection, which looks at queries."""
        if self.chooser is not None:
            raise RecipeError(
                "Tokens without queries are given, and a selection looks at these. Leave the selection out of the recipe."
            )
        counts = torch.full_like(self.lengths, k.shape[2])
        self.window.append(self._parted(k), self._parted(v), self._of_rows(counts))
        self.lengths = self.lengths + counts
        self._move_old()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shape: Shape,
        *,
        valid: Tensor | None = None,
        prefill: Prefill = "exact",
        sink: Tensor | None = None,
    ) -> Tensor:
        """Store `k, v [B, H, T, D]` and return the attention `[B, Hq, T, D]` float32 of `q` over them and all that was stored before.

        valid: `[B, T]` bool, false for padding, which is neither stored nor seen; its own output is zero.
        sink: see `merge`. Raises BadInputError when keys or values are not finite, when a strict chunk is longer than the interval
        between evictions, and when a prompt that must stay does not fit the budget.
        """
        t, before = q.shape[2], self.lengths
        counts, ranks = torch.full_like(before, t), before[:, None] + torch.arange(t)
        self.padding = torch.zeros_like(self.padding) if valid is None else ~valid[:, -1].cpu()
        new_q = q
        if valid is not None:
            counts, ranks = valid.cpu().sum(1), before[:, None] + valid.cpu().cumsum(1) - 1
            k, v, new_q = (_left_aligned(x, valid) for x in (k, v, q))
        chooser = self.chooser
        assert chooser is None or shape.logits is None, "evictions leave gaps, and places must be known"
        if chooser is not None:
            _check_call(chooser, t, prefill, sink)
            chooser.check(counts, t, self.recipe.window)
        rows = self._of_rows
        seen = _Seen(
            rows(before),
            rows(ranks),
            self.window.lengths,
            self.body.lengths,
            self.sinks.lengths,
            None if valid is None else rows(valid),
        )
        self.window.append(self._parted(k), self._parted(v), rows(counts))
        self.lengths = before + counts
        queries = self._parted(q)
        if chooser is not None:
            chooser.come(new_q, k, v, before[:, None] + torch.arange(t), counts)
            if chooser.scorer.observes:
                self._observe(queries, seen, shape, sink)
        window = self.window.sides()
        if prefill == "strict":
            self._move_old()
        out = self._attend(queries, window, seen, shape, prefill, sink).reshape(q.shape[:3] + v.shape[-1:])
        if valid is not None:
            out = out.masked_fill(~valid.to(q.device)[:, None, :, None], 0)
        if prefill == "exact":
            self._move_old()
        if chooser is not None and bool((due := chooser.due()).any()):
            chooser.propose(due, self.sinks, self.window, self.body, self.lengths, shape.scale, self._keep)
        return out

    def _attend(
        self, q: Tensor, window: tuple[Side, Side], seen: "_Seen", shape: Shape, prefill: Prefill, sink: Tensor | None
    ) -> Tensor:
        """Attention `[rows, Hq / split, T, D]` over the tiers, of queries that came when there was what `seen` says."""
        n = window[0].codes[0].shape[2]
        token, rank = seen.tokens(n)[:, None], seen.ranks[:, :, None]  # ranks of each token of `window` and of each query
        fresh = seen.valid is None and not seen.before.any()
        own = shape.logits is not None  # the kernels know keys alone
        if prefill == "exact" and fresh and shape.softcap is None and sink is None and not own:
            return attend_first(q, *window, shape)
        if isinstance(self.body, PagedTier) and not own and (q.shape[2] == 1 or (q.shape[2] <= STEPS and prefill == "exact")):
            visible, body_length = self._visible(token, rank, seen, prefill)
            below = torch.arange(self.sinks.longest) < seen.sinks[:, None, None]
            visible = torch.cat([below.expand(-1, q.shape[2], -1), visible], 2)
            near = [torch.cat([a.codes[0], b.codes[0]], 2) for a, b in zip(self.sinks.sides(), window, strict=True)]
            body = self.body.body(body_length.amax((1, 2))) if self.body.longest else None  # all queries see the same of it
            return decode(q, body, ExactTokens(near[0], near[1], visible.to(q.device)), shape, sink)
        parts, start, past = [], 0, None
        if isinstance(self.body, PagedTier) and not own and self.body.longest and prefill == "exact":
            past = attend_past(q, self.body.body(seen.body), shape)
        sinks, stored = self.sinks.sides(), self.body.sides() if past is None else None
        seen_there = seen.to(q.device)
        for queries, query_rank in zip(q.split(QUERIES, 2), rank.split(QUERIES, 1), strict=True):
            ranks = query_rank.to(q.device)[..., 0]
            # Tokens behind the end of a row have ranks above all.
            visible, body_length = self._visible(token.to(q.device), query_rank.to(q.device), seen_there, prefill)
            tiers = [attend(queries, *window, visible, shape, Places(ranks, token.to(q.device)[:, 0]))]
            if past is not None:
                some = slice(start, start + queries.shape[2])
                tiers.append(Partial(past.out[:, :, some], past.lse[:, :, some]))
                start = some.stop
            # What lies in the body has sinks before it, all of them.
            held = (self.sinks, sinks, seen_there.sinks[:, None, None], 0), (self.body, stored, body_length, self.recipe.sinks)
            for tier, sides, length, first in held:
                if sides is not None and tier.longest:
                    at = torch.arange(tier.longest, device=q.device)
                    tiers.append(attend(queries, *sides, at < length, shape, Places(ranks, first + at[None])))
            parts.append(merge(tiers, sink).out)
        return torch.cat(parts, 2)

    def _visible(self, token: Tensor, rank: Tensor, seen: "_Seen", prefill: Prefill) -> tuple[Tensor, Tensor]:
        """Which tokens of the window each query sees, `[rows, T, n]`, and how many of the body, `[rows, T or 1, 1]`."""
        visible, body = token <= rank, seen.body[:, None, None]
        if prefill == "exact":
            return visible, body
        # What decoding one by one would have in the body when the token of `rank` comes. What was evicted before has left no gap there.
        evicted = seen.evicted[:, None, None]
        ripe = (rank - self.recipe.sinks - self.recipe.window).clamp_min(0) // self.body.block * self.body.block
        ripe = torch.maximum(ripe, body + evicted)
        return visible & ((token < self.recipe.sinks) | (token >= self.recipe.sinks + ripe)), ripe - evicted

    @plainly
    def _observe(self, q: Tensor, seen: "_Seen", shape: Shape, sink: Tensor | None) -> None:
        """Show the scorer what attention the tokens of body and window get, which are those that were there before and the new ones.

        In strict prefill a query may read as codes what is exact here; a scorer sees the exact one.
        """
        assert self.chooser is not None
        there, t = seen.to(q.device), q.shape[2]
        below = torch.arange(max(self.sinks.longest, self.body.longest), device=q.device)
        masks = [below[: tier.longest] < n[:, None, None] for tier, n in ((self.sinks, there.sinks), (self.body, there.body))]
        asked = torch.ones_like(there.ranks, dtype=torch.bool) if there.valid is None else there.valid
        for at in torch.arange(t).split(QUERIES):
            rank = there.ranks[:, at, None]
            causal = (there.tokens(self.window.longest)[:, None] <= rank) & asked[:, at, None]
            held = zip((self.sinks, self.body, self.window), (*masks, causal), strict=True)
            seen_by = [(tier.sides()[0], mask.expand(-1, len(at), -1) & asked[:, at, None]) for tier, mask in held if tier.longest]
            weights = attention_weights(q[:, :, at], seen_by, shape, sink)
            self.chooser.observe(weights[..., self.sinks.longest :], seen.body)

    def _move_old(self) -> None:
        """Move tokens that are too old for the window to where they stay."""
        window = self.window.lengths
        done = self._of_rows(self.lengths) - window
        leaving = (self.recipe.sinks - done).clamp_min(0).minimum(window)
        if int(leaving.max()):
            self.sinks.append(*self.window.pop(leaving), leaving)
            if self.chooser is not None and self.chooser.scorer.records:
                self.chooser.records.pop(leaving)  # a sink stays, whatever a scorer thinks
        leaving = (self.window.lengths - self.recipe.window).clamp_min(0) // self.body.block * self.body.block
        if int(leaving.max()):
            self.body.append(*self.window.pop(leaving), leaving)

    def _keep(self, mask: Tensor) -> None:
        """Keep of the body the tokens where `mask [B, H, N]` is true, as many in each KV head of one row of the tiers."""
        assert self.chooser is not None
        mask = self.chooser.parted(mask)
        counts, body = mask.sum(-1)[:, 0].cpu(), self.body.lengths
        index = indices(mask, int(counts.max()))
        self.body.keep(index, counts)
        self.chooser.keep(index, counts, body, self.window.lengths)

    def crop(self, tokens: int) -> None:
        """Remove the newest `tokens` tokens of every row. What they had pushed out of the window stays encoded.

        Raises BadInputError when a row ends in padding, because then the newest tokens are not the same ones in every row, and when
        some of them are evicted already.
        """
        if self.padding.any():
            raise BadInputError("A cache whose rows end in padding cannot be cropped. Pad on the left.")
        left = torch.full_like(self.lengths, tokens).minimum(self.lengths)
        if self.chooser is not None:
            self.chooser.crop(left)
        self.lengths = self.lengths - left
        left = self._of_rows(left)
        for tier in (self.window, self.body, self.sinks):
            counts = left.minimum(tier.lengths)
            left = left - counts
            if cut := tier.truncate(counts):
                self.window.append(*cut)

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, with repetitions."""
        rows = rows.cpu()
        self.padding, self.lengths = self.padding[rows], self.lengths[rows]
        parts = (rows[:, None] * self.split + torch.arange(self.split)).flatten()
        for tier in self.tiers.values():
            tier.select(parts)
        if self.chooser is not None:
            self.chooser.select(rows, parts)

    def state(self) -> dict[str, Tensor]:
        """Tensors that `load_state` takes."""
        held = {f"{name}.{field}": t for name, tier in self.tiers.items() for field, t in tier.state().items()}
        chosen = {} if self.chooser is None else {f"chooser.{name}": t for name, t in self.chooser.state().items()}
        return {"lengths": self.lengths, **held, **chosen}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises KeyError or ValueError when the tensors are not those of this recipe."""
        for name, tier in self.tiers.items():
            tier.load_state(under(tensors, f"{name}."))
        self.lengths, self.padding = tensors["lengths"], torch.zeros(len(tensors["lengths"]), dtype=torch.bool)
        if self.chooser is not None:
            self.chooser.load_state(under(tensors, "chooser."))

    def _of_rows(self, x: Tensor) -> Tensor:
        """`x [B, ...]` for the rows of the tiers."""
        return x if self.split == 1 else x.repeat_interleave(self.split, 0)

    def _parted(self, x: Tensor) -> Tensor:
        """Keys, values or queries `[B, H, T, D]` for the rows of the tiers."""
        return x if self.split == 1 else x.reshape(x.shape[0] * self.split, -1, *x.shape[2:])


@dataclass(frozen=True)
class _Seen:
    """What was there when queries of `ranks [rows, T]` came: `before [rows]` tokens, of which in window, body and sinks.

    valid: `[rows, T]`, false for padding; None: there is none."""

    before: Tensor
    ranks: Tensor
    window: Tensor
    body: Tensor
    sinks: Tensor
    valid: Tensor | None

    @property
    def evicted(self) -> Tensor:
        """Tokens `[rows]` that were there once."""
        return self.before - self.window - self.body - self.sinks

    def tokens(self, n: int) -> Tensor:
        """Ranks `[rows, n]` of the first n tokens of the window."""
        return (self.before - self.window)[:, None] + torch.arange(n, device=self.before.device)

    def to(self, device: torch.device) -> "_Seen":
        """The same on `device`."""
        before, ranks, window, body, sinks = (x.to(device) for x in (self.before, self.ranks, self.window, self.body, self.sinks))
        return _Seen(before, ranks, window, body, sinks, None if self.valid is None else self.valid.to(device))


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def plan_bytes(recipe: Recipe, tokens: int, key: Context, value: Context) -> float:
    """Bytes of `tokens` tokens of one row by formula: records without slack, lengths or what codecs share."""
    codecs = build_codecs(recipe, key, value)
    block = max(c.block for c in codecs)
    sinks = min(tokens, recipe.sinks)
    body = max(0, tokens - sinks - recipe.window) // block * block
    exact = sum(c.head_dim * exact_dtype(recipe, c).itemsize for c in (key, value))
    return key.num_heads * ((tokens - body) * exact + body * sum(c.bytes_per_token for c in codecs))


def exact_dtype(recipe: Recipe, ctx: Context) -> torch.dtype:
    """Type of sinks and window: the model's own when that has 16 bits or the recipe is lossless, else bfloat16."""
    return ctx.dtype if recipe.precision == Exact() or ctx.dtype.itemsize == 2 else torch.bfloat16


def build_codecs(recipe: Recipe, key: Context, value: Context) -> tuple[Codec, Codec]:
    """The codecs of a body. Raises RecipeError when they do not go with the recipe's selection."""
    codecs = recipe.precision.build("key", key), recipe.precision.build("value", value)
    if recipe.selection is not None:
        if max(c.block for c in codecs) > 1:
            raise RecipeError("This codec stores blocks of tokens, out of which a selection cannot take single ones. Use polar or fp8.")
        if recipe.selection.heads == "pooled" and any(c.centre is not None for c in codecs):
            raise RecipeError(
                "`centre` needs the KV heads of a row together, and heads=pooled stores them apart. Leave one of them out."
            )
    return codecs


def _check_call(chooser: Chooser, steps: int, prefill: Prefill, sink: Tensor | None) -> None:
    """Raise an error for a call that the selection cannot serve."""
    interval = chooser.selection.interval
    if prefill == "strict" and steps > interval:
        raise BadInputError(
            f"A strict chunk of {steps} tokens would see more than decoding, which evicts every {interval}. Give {interval} at most."
        )
    if chooser.split > 1 and sink is not None:
        raise UnsupportedModelError("This model has learned sinks, one for each query head. Use another `heads` than pooled.")


def _left_aligned(x: Tensor, valid: Tensor) -> Tensor:
    """`x [B, H, T, D]` with the valid tokens of every row moved to its front; zero behind them."""
    order = valid.to(x.device).argsort(dim=1, descending=True, stable=True)
    behind = torch.arange(x.shape[2], device=x.device) >= valid.to(x.device).sum(1, keepdim=True)
    return x.take_along_dim(order[:, None, :, None], 2).masked_fill(behind[:, None, :, None], 0)
