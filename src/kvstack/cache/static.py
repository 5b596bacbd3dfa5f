"""A store of fixed size for decoding with CUDA graphs: everything that changes from step to step lives on the device.

    exact   `[B, H, S, D]`: the first `sinks` tokens of a row, then a ring of the newest `window` ones and those of the step
    body    pages (`kernels.pages`) of all tokens between, reserved for `capacity` tokens a row; with a selection, for its budget and
            the tokens of an interval

A step attends to the body as it was, to the window and to its own tokens, and then the tokens that are too old for the window are
encoded into the body: what `LayerStore` does one by one, with the same result. Positions are the same in all layers, so they are worked
out once a step (`Steps`) and shared. After every `interval` steps, and not in between, somebody calls `evict`, which needs no number
from the device. Only recipes whose codes have a page format fit, and selections that look at keys and values alone and leave as many
tokens in all KV heads; the flexible store is `LayerStore`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstack.cache.eviction import evict
from kvstack.cache.store import build_codecs, exact_dtype
from kvstack.codecs.base import Context
from kvstack.codecs.exact import ExactCodec
from kvstack.kernels.append import append
from kvstack.kernels.codes import page_format
from kvstack.kernels.decode import Body, Exact, decode
from kvstack.kernels.pages import PAGE, Pages
from kvstack.kernels.reference import Shape, Side, attend, attend_first, merge
from kvstack.kernels.select import select
from kvstack.recipe import Recipe
from kvstack.scorers.base import Scorer, View


@dataclass(frozen=True)
class Size:
    """batch: rows. heads: KV heads. capacity: most tokens of a row. steps: new tokens of a row in one decode step."""

    batch: int
    heads: int
    capacity: int
    steps: int = 1


class Steps:
    """Where the tokens of a step go, are seen and leave to, for all layers. All tensors keep their place in memory.

    lengths: `[B]` int32, tokens of every row before the step. slots: `[B, T]` exact slots of the new tokens. seen: `[B, T, S]`.
    body, cum: `[B]` and `[B + 1]` int32, tokens in the body before the step, and their schedule. leaving: `[B, T]` slots of the tokens
    that leave the window, of which the first `leaves [B]` count. evicted: `[B]` int32, tokens that have left the body for good. All
    rows take T tokens a step.

    filling: rows whose prompts come now, instead of a step.
    """

    def __init__(self, size: Size, sinks: int, window: int, device: torch.device) -> None:
        self.size, self.sinks, self.window = size, sinks, window
        self.filling: slice | None = None
        self.ring = window + size.steps
        b, t = size.batch, size.steps
        self.lengths, self.body, self.leaves, self.evicted = (torch.zeros(b, dtype=torch.int32, device=device) for _ in range(4))
        self.cum = torch.zeros(b + 1, dtype=torch.int32, device=device)
        self.slots, self.leaving = (torch.zeros(b, t, dtype=torch.long, device=device) for _ in range(2))
        self.seen = torch.zeros(b, t, sinks + self.ring, dtype=torch.bool, device=device)
        self.refresh()

    def ripe(self, lengths: Tensor) -> Tensor:
        """Tokens that have come into the body of rows with `lengths` tokens."""
        return (lengths - self.sinks - self.window).clamp_min(0)

    def slot(self, position: Tensor) -> Tensor:
        """Exact slot of the token at a position of its row."""
        return torch.where(position < self.sinks, position, self.sinks + (position - self.sinks) % self.ring)

    def evict(self, places: int) -> None:
        """Count what an eviction that leaves `places` tokens in the body takes away; every layer must have made it."""
        self.evicted += (self.body - places).clamp_min(0)
        self.refresh()

    def advance(self) -> None:
        """Count the tokens of the step that was made."""
        self.lengths += self.size.steps
        self.refresh()

    def refresh(self) -> None:
        """Work out everything from the lengths."""
        n, device = self.lengths.long()[:, None], self.lengths.device
        step = torch.arange(self.size.steps, device=device)
        ripe = self.ripe(n)
        self.slots.copy_(self.slot(n + step))
        self.body.copy_(ripe[:, 0] - self.evicted)
        self.leaves.copy_((self.ripe(n + self.size.steps) - ripe)[:, 0])
        self.leaving.copy_(self.slot(self.sinks + ripe + step))
        torch.cumsum((self.body + PAGE - 1) // PAGE * self.size.heads, 0, dtype=torch.int32, out=self.cum[1:])
        # The newest token in each slot of the ring once the step's tokens are there; negative where there is none.
        place = torch.arange(self.ring, device=device)
        newest = n + self.size.steps - self.sinks - 1 - place
        held = torch.div(newest, self.ring, rounding_mode="floor") * self.ring + place  # counted from the sinks on
        sink = torch.arange(self.sinks, device=device).expand(len(n), -1)
        position = torch.cat([sink, torch.where(held >= ripe, self.sinks + held, torch.iinfo(torch.long).max)], 1)
        self.seen.copy_(position[:, None] <= (n + step)[:, :, None])


class StaticStore:
    """Keys and values of one layer, for the rows and the capacity of `steps`."""

    def __init__(self, recipe: Recipe, steps: Steps, key: Context, value: Context, scorer: Scorer | None = None) -> None:
        self.recipe, self.steps, self.scorer, size = recipe, steps, scorer, steps.size
        slots = steps.sinks + steps.ring
        k, v = (
            torch.zeros(size.batch, size.heads, slots, c.head_dim, dtype=exact_dtype(recipe, c), device=c.device) for c in (key, value)
        )
        self.exact = k, v
        self.scale = 1.0  # of the logits, as the last call had it
        self.body: Body | None = None
        capacity = size.capacity
        if recipe.selection is not None:
            capacity = min(capacity, recipe.selection.budget + recipe.selection.interval)
        if steps.sinks + steps.window < capacity:
            codecs = build_codecs(recipe, key, value)
            pages = -(-(capacity - steps.sinks - steps.window) // PAGE)
            f = page_format(key.head_dim, *codecs)
            table = torch.arange(size.batch * pages, dtype=torch.int32, device=key.device).reshape(size.batch, pages)
            pool = torch.zeros(size.batch * pages, size.heads, f.nbytes, dtype=torch.uint8, device=key.device)
            self.body = Body(Pages(f, pool, table, steps.body), *codecs, steps.cum)

    @property
    def nbytes(self) -> int:
        """Bytes of the exact slots and of the pages, reserved ones included."""
        return sum(t.nbytes for t in self.exact) + (
            0 if self.body is None else self.body.pages.pool.nbytes + self.body.pages.table.nbytes
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, sink: Tensor | None = None) -> Tensor:
        """Store `k, v [b, H, n, D]` and return the attention `[b, Hq, n, D]` of `q`: a step of all rows, or prompts of `filling`."""
        assert shape.logits is None, "keys are not rebuilt here"
        self.scale = shape.scale
        return self._step(q, k, v, shape, sink) if self.steps.filling is None else self._fill(q, k, v, shape, sink, self.steps.filling)

    def _fill(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, sink: Tensor | None, rows: slice) -> Tensor:
        """Causal attention of whole prompts of one length, whose tokens become those of `rows`."""
        k, v = (x.to(exact.dtype) for exact, x in zip(self.exact, (k, v), strict=True))
        n = k.shape[2]
        position = torch.arange(n, device=k.device)
        keep = torch.cat([position[: self.steps.sinks], position[max(self.steps.sinks, n - self.steps.window) :]])
        slots = self.steps.slot(keep)
        for exact, x in zip(self.exact, (k, v), strict=True):
            exact[rows, :, slots] = x[:, :, keep]
        count = max(0, n - self.steps.sinks - self.steps.window)
        if self.body is not None and count:
            p, old = self.body.pages, slice(self.steps.sinks, self.steps.sinks + count)
            part = Pages(p.format, p.pool, p.table[rows], p.lengths[rows])
            old_k, old_v = k[:, :, old], v[:, :, old]
            if count > self.places:
                old_k, old_v = self._best(k, v, shape.scale)
                self.steps.evicted[rows] = count - self.places
            counts = torch.full_like(part.lengths, old_k.shape[2])
            append(part, self.body.key, self.body.value, old_k, old_v, torch.zeros_like(counts), counts)
        key, value = (Side(ExactCodec(x.shape[-1], x.dtype), (x,)) for x in (k, v))
        if shape.softcap is None and sink is None:
            return attend_first(q, key, value, shape)
        causal = torch.ones(1, n, n, dtype=torch.bool, device=q.device).tril()
        return merge([attend(q, key, value, causal, shape)], sink).out

    def _step(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, sink: Tensor | None) -> Tensor:
        at = self.steps
        for exact, x in zip(self.exact, (k, v), strict=True):
            exact.scatter_(2, at.slots[:, None, :, None].expand(x.shape), x.to(exact.dtype))
        out = decode(q, self.body, Exact(*self.exact, at.seen), shape, sink)
        if self.body is not None:
            old_k, old_v = (x.gather(2, at.leaving[:, None, :, None].expand(k.shape)) for x in self.exact)
            append(self.body.pages, self.body.key, self.body.value, old_k, old_v, at.body, at.leaves)
        return out

    @property
    def places(self) -> int:
        """Tokens of the body that an eviction leaves to every KV head; as many as there is room for when there is no selection."""
        if self.recipe.selection is None:
            return self.steps.size.capacity
        return self.recipe.selection.budget - self.steps.sinks - self.steps.window

    def _best(self, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Of the tokens of whole prompts `k, v [b, H, n, D]` between sinks and window, the `places` that the scorer wants most."""
        assert self.scorer is not None
        n, window = k.shape[2], self.steps.window
        old = slice(self.steps.sinks, n - window)
        keys = k[:, :, old].float()
        age = torch.arange(n - self.steps.sinks - 1, window - 1, -1, device=k.device).expand(keys.shape[:3])
        seen = torch.full(k.shape[:1], n, device=k.device)
        values = v[:, :, old].float() if self.scorer.values else None
        view = View.of_keys(keys, values, torch.ones_like(age, dtype=torch.bool), age, seen, scale)
        length = torch.full(k.shape[:1], keys.shape[2], dtype=torch.int32, device=k.device)
        best = select(self.scorer.score(view)[:, :, None].contiguous(), length, self.places, standardise=False, ordered=True)
        at = best.long()[..., None] + self.steps.sinks
        return k.take_along_dim(at, 2), v.take_along_dim(at, 2)

    def evict(self) -> None:
        """Leave the body of every row the `places` tokens that the scorer wants most, if it has more. The caller counts (`Steps`)."""
        assert self.scorer is not None
        if self.body is None:  # sinks and window hold all
            return
        at = self.steps
        evict(self.body, self.scorer, self.places, at.lengths, torch.full_like(at.lengths, at.window), self.scale)
