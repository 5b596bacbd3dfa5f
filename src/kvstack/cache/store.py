"""The store of one layer: sinks, window and body, and attention over the three.

    sinks   the first `recipe.sinks` tokens of every row, 16 bits
    window  the newest `recipe.window` tokens, 16 bits; with a block codec up to a block more, until a whole block can leave
    body    everything between, under the recipe's codec

A token enters the window. When it leaves, it becomes a sink or is encoded into the body, once and for good. With a window of 0 tokens
it leaves at once. Keys are stored as attention uses them, after RoPE, so the order inside a tier means nothing to attention.

A token's *rank* is its place among the real tokens of its row. A query always sees its own token exact, and of the tokens before it:

    exact prefill    the chunk that it came in exact, everything before that as stored: best quality, fastest
    strict prefill   what decoding token by token would have shown it: the same quality whatever the chunks are

The store knows nothing of models, positions or engines.
"""

from typing import Literal

import torch
from torch import Tensor

from kvstack.cache.paged import PagedTier, has_pages
from kvstack.cache.tier import Tier
from kvstack.codecs import Exact
from kvstack.codecs.base import Codec, Context
from kvstack.codecs.exact import ExactCodec
from kvstack.errors import BadInputError
from kvstack.kernels.decode import Exact as ExactTokens
from kvstack.kernels.decode import decode
from kvstack.kernels.past import attend_past
from kvstack.kernels.reference import QUERIES, Partial, Shape, attend, attend_first, merge
from kvstack.recipe import Recipe

Prefill = Literal["exact", "strict"]
STEPS = 8  # new tokens of a row that the decode kernels take


class LayerStore:
    """Tokens of one layer, for `batch` rows. The tiers are public: `sinks`, `window`, `body`."""

    def __init__(self, recipe: Recipe, batch: int, key: Context, value: Context) -> None:
        self.recipe = recipe
        codecs = recipe.precision.build("key", key), recipe.precision.build("value", value)
        exact = ExactCodec(key.head_dim, exact_dtype(recipe, key)), ExactCodec(value.head_dim, exact_dtype(recipe, value))

        def tier(pair: tuple[Codec, Codec]) -> Tier:
            return Tier(*pair, batch, key.num_heads, key.device)

        self.sinks, self.window = tier(exact), tier(exact)
        paged = has_pages(*codecs, key.head_dim, key.device)
        self.body = PagedTier(*codecs, batch, key.num_heads, key.device) if paged else tier(codecs)
        self.padding = torch.zeros(batch, dtype=torch.bool)  # rows that end in padding

    @property
    def tiers(self) -> dict[str, Tier]:
        """The tiers by name."""
        return {"sinks": self.sinks, "window": self.window, "body": self.body}

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each row, `[B]` on the CPU."""
        return self.sinks.lengths + self.window.lengths + self.body.lengths

    @property
    def nbytes(self) -> int:
        """Measured bytes of the tiers: live storage, slack and lengths. What codecs share between layers is not in it."""
        return sum(t.nbytes for t in self.tiers.values())

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store `k, v [B, H, T, D]` without attention."""
        self.window.append(k, v, torch.full_like(self.lengths, k.shape[2]))
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
        sink: see `merge`. Raises BadInputError when keys or values are not finite.
        """
        before = self.lengths
        counts, ranks = torch.full_like(before, q.shape[2]), before[:, None] + torch.arange(q.shape[2])
        self.padding = torch.zeros_like(self.padding) if valid is None else ~valid[:, -1].cpu()
        if valid is not None:
            counts, ranks = valid.cpu().sum(1), before[:, None] + valid.cpu().cumsum(1) - 1
            k, v = _left_aligned(k, valid), _left_aligned(v, valid)
        oldest = before - self.window.lengths  # rank of the first token in the window
        body_before, sinks_before = self.body.lengths, self.sinks.lengths
        self.window.append(k, v, counts)
        window, n = self.window.sides(), self.window.longest
        if prefill == "strict":
            self._move_old()
        token, rank = oldest[:, None, None] + torch.arange(n), ranks[:, :, None]  # ranks of each token of `window` and of each query
        if prefill == "exact" and valid is None and not before.any() and shape.softcap is None and sink is None:
            out = attend_first(q, *window, shape)
        elif isinstance(self.body, PagedTier) and (q.shape[2] == 1 or (q.shape[2] <= STEPS and prefill == "exact")):
            seen, body_length = self._seen(token, rank, body_before[:, None, None], prefill)
            below = torch.arange(self.sinks.longest) < sinks_before[:, None, None]
            seen = torch.cat([below.expand(-1, q.shape[2], -1), seen], 2)
            near = [torch.cat([a.codes[0], b.codes[0]], 2) for a, b in zip(self.sinks.sides(), window, strict=True)]
            body = self.body.body(body_length.amax((1, 2))) if self.body.longest else None  # all queries see the same of it
            out = decode(q, body, ExactTokens(near[0], near[1], seen.to(q.device)), shape, sink)
        else:
            parts, start, past = [], 0, None
            if isinstance(self.body, PagedTier) and self.body.longest and prefill == "exact":
                past = attend_past(q, self.body.body(body_before), shape)
            sinks, stored = self.sinks.sides(), self.body.sides() if past is None else None
            for queries, at in zip(q.split(QUERIES, 2), rank.split(QUERIES, 1), strict=True):
                # Tokens behind the end of a row have ranks above all.
                seen, body_length = self._seen(token.to(q.device), at.to(q.device), body_before.to(q.device)[:, None, None], prefill)
                tiers = [attend(queries, *window, seen, shape)]
                if past is not None:
                    some = slice(start, start + queries.shape[2])
                    tiers.append(Partial(past.out[:, :, some], past.lse[:, :, some]))
                    start = some.stop
                held = (self.sinks, sinks, sinks_before.to(q.device)[:, None, None]), (self.body, stored, body_length)
                for tier, sides, length in held:
                    if sides is not None and tier.longest:
                        below = torch.arange(tier.longest, device=q.device) < length
                        tiers.append(attend(queries, *sides, below, shape))
                parts.append(merge(tiers, sink).out)
            out = torch.cat(parts, 2)
        if valid is not None:
            out = out.masked_fill(~valid.to(q.device)[:, None, :, None], 0)
        if prefill == "exact":
            self._move_old()
        return out

    def _seen(self, token: Tensor, rank: Tensor, body_before: Tensor, prefill: Prefill) -> tuple[Tensor, Tensor]:
        """Which tokens of the window each query sees, `[B, T, n]`, and how many of the body, `[B, T or 1, 1]`."""
        seen = token <= rank
        if prefill == "exact":
            return seen, body_before
        # What decoding one by one would have in the body when the token of `rank` comes.
        ripe = (rank - self.recipe.sinks - self.recipe.window).clamp_min(0) // self.body.block * self.body.block
        body = torch.maximum(ripe, body_before)
        return seen & ((token < self.recipe.sinks) | (token >= self.recipe.sinks + body)), body

    def _move_old(self) -> None:
        """Move tokens that are too old for the window to where they stay."""
        done = self.lengths - self.window.lengths
        leaving = (self.recipe.sinks - done).clamp_min(0).minimum(self.window.lengths)
        if int(leaving.max()):
            self.sinks.append(*self.window.pop(leaving), leaving)
        leaving = (self.window.lengths - self.recipe.window).clamp_min(0) // self.body.block * self.body.block
        if int(leaving.max()):
            self.body.append(*self.window.pop(leaving), leaving)

    def crop(self, tokens: int) -> None:
        """Remove the newest `tokens` tokens of every row. What they had pushed out of the window stays encoded.

        Raises BadInputError when a row ends in padding: then the newest tokens are not the same ones in every row.
        """
        if self.padding.any():
            raise BadInputError("A cache whose rows end in padding cannot be cropped. Pad on the left.")
        left = torch.full_like(self.window.lengths, tokens).minimum(self.lengths)
        for tier in (self.window, self.body, self.sinks):
            counts = left.minimum(tier.lengths)
            left = left - counts
            if cut := tier.truncate(counts):
                self.window.append(*cut)

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, with repetitions."""
        self.padding = self.padding[rows.cpu()]
        for tier in self.tiers.values():
            tier.select(rows)


def plan_bytes(recipe: Recipe, tokens: int, key: Context, value: Context) -> float:
    """Bytes of `tokens` tokens of one row by formula: records without slack, lengths or what codecs share."""
    codecs = recipe.precision.build("key", key), recipe.precision.build("value", value)
    block = max(c.block for c in codecs)
    sinks = min(tokens, recipe.sinks)
    body = max(0, tokens - sinks - recipe.window) // block * block
    exact = sum(c.head_dim * exact_dtype(recipe, c).itemsize for c in (key, value))
    return key.num_heads * ((tokens - body) * exact + body * sum(c.bytes_per_token for c in codecs))


def exact_dtype(recipe: Recipe, ctx: Context) -> torch.dtype:
    """Type of sinks and window: the model's own when that has 16 bits or the recipe is lossless, else bfloat16."""
    return ctx.dtype if recipe.precision == Exact() or ctx.dtype.itemsize == 2 else torch.bfloat16


def _left_aligned(x: Tensor, valid: Tensor) -> Tensor:
    """`x [B, H, T, D]` with the valid tokens of every row moved to its front; zero behind them."""
    out = torch.zeros_like(x)
    for b, row in enumerate(valid):
        out[b, :, : int(row.sum())] = x[b][:, row.to(x.device)]
    return out
