"""A tier: tokens of one layer stored under one pair of codecs, in growing buffers.

Layout: per field of a codec a buffer `[B, H, capacity // block, *shape]`; row b holds `lengths[b]` tokens from the left, in the order
they came in; whatever lies behind them is not read. Rows may have different lengths (ragged batches). Buffers grow in steps of 1/128
of their size, at least 32 tokens, so that the slack stays under two per cent in long contexts; `nbytes` counts the slack.

A tier with a block codec holds whole blocks only, except after `truncate`. A tier does not decide what enters or leaves it.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.kernels.reference import Side

STEP = 32  # tokens

P = ParamSpec("P")
R = TypeVar("R")


def plainly(method: Callable[P, R]) -> Callable[P, R]:
    """Buffers outlive the mode in which they were filled: they are no inference tensors, and hold no graph."""

    @wraps(method)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return plain


class Tier:
    """Tokens under the codecs `key` and `value`, `[B, H]` rows and heads."""

    def __init__(self, key: Codec, value: Codec, batch: int, heads: int, device: torch.device) -> None:
        self.codecs = (key, value)
        self.block = max(key.block, value.block)
        self.lengths = torch.zeros(batch, dtype=torch.long)  # on the CPU: it steers, and costs no synchronisation
        self.buffers: list[list[Tensor]] = [
            [torch.empty(batch, heads, 0, *f.shape, dtype=f.dtype, device=device) for f in codec.fields] for codec in self.codecs
        ]

    @property
    def longest(self) -> int:
        """Tokens in the longest row."""
        return int(self.lengths.max()) if len(self.lengths) else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, slack included, and of the lengths."""
        return self.lengths.nbytes + sum(t.untyped_storage().nbytes() for side in self.buffers for t in side)

    @plainly
    def append(self, k: Tensor, v: Tensor, counts: Tensor) -> None:
        """Encode and store the first `counts[b]` tokens of row b of `k, v [B, H, n, D]`; n and the counts are multiples of `block`."""
        if not int(counts.sum()):
            return
        encoded = [codec.encode(x) for codec, x in zip(self.codecs, (k, v), strict=True)]  # may refuse, so before anything changes
        self.lengths, old = self.lengths + counts, self.lengths
        for codec, buffers, codes in zip(self.codecs, self.buffers, encoded, strict=True):
            size = codec.block
            for i, new in enumerate(codes):
                buffers[i] = _grown(buffers[i], self.longest, size)
                _write(buffers[i], new, old // size, counts // size)

    def sides(self) -> tuple[Side, Side]:
        """K and V up to the longest row; the codes are views of the buffers."""
        key, value = (
            Side(codec, tuple(t[:, :, : -(-self.longest // codec.block)] for t in side))
            for codec, side in zip(self.codecs, self.buffers, strict=True)
        )
        return key, value

    @plainly
    def pop(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Remove the oldest `counts[b]` tokens of every row and return them decoded, `[B, H, max(counts), D]`, zero past the counts."""
        most = int(counts.max())
        out = []
        for codec, side in zip(self.codecs, self.buffers, strict=True):
            assert codec.block == 1, "tokens leave only tiers that store them one by one"
            x = codec.decode(tuple(t[:, :, :most] for t in side))
            out.append(x.masked_fill(~_below(counts, most, x.device)[:, None, :, None], 0))
        if most:
            self.lengths = self.lengths - counts
            self._map(lambda t: _shifted(t, counts, self.longest))
        return out[0], out[1]

    @plainly
    def truncate(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Remove the newest `counts[b]` tokens of every row.

        Of a block that is cut the rest cannot stay: it is removed too and returned decoded, `k, v [B, H, n, D]`, of which the first
        `rest[b]` tokens of row b count. None when no block is cut.
        """
        lengths = self.lengths - counts
        rest = lengths % self.block
        self.lengths = lengths - rest
        most = int(rest.max())
        if not most:
            return None
        k, v = (self._block_at(i, self.lengths)[:, :, :most] for i in (0, 1))
        behind = ~_below(rest, most, k.device)[:, None, :, None]
        return k.masked_fill(behind, 0), v.masked_fill(behind, 0), rest

    @plainly
    def keep(self, index: Tensor, counts: Tensor) -> None:
        """Keep of every head of row b the tokens `index [B, H, :counts[b]]` (ascending), and give the memory of the others back."""
        assert self.block == 1, "single tokens leave only tiers that store them one by one"

        def taken(t: Tensor) -> Tensor:
            at = index.to(t.device, torch.long).reshape(*index.shape, *[1] * (t.ndim - 3)).expand(*index.shape, *t.shape[3:])
            return _movable(t).gather(2, at).view(t.dtype)

        self._map(taken)
        self.lengths = counts

    def _block_at(self, side: int, tokens: Tensor) -> Tensor:
        """Decoded vectors `[B, H, block, D]` from token `tokens[b]` of row b on; of a row that ends there, anything."""
        codec, device = self.codecs[side], self.buffers[side][0].device
        at = (tokens[:, None] + torch.arange(0, self.block, codec.block)) // codec.block
        rows = torch.arange(len(tokens), device=device)[:, None]
        codes = (t[rows, :, at.to(device).clamp_max(t.shape[2] - 1)].movedim(1, 2) for t in self.buffers[side])
        return codec.decode(tuple(codes))

    @plainly
    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, with repetitions (beams)."""
        self.lengths = self.lengths[rows.cpu()]
        self._map(lambda t: t.index_select(0, rows.to(t.device)))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.buffers = [[change(t) for t in side] for side in self.buffers]

    def state(self) -> dict[str, Tensor]:
        """Tensors that `load_state` takes."""
        named = {}
        for name, side in zip(("key", "value"), self.sides(), strict=True):
            for field, t in zip(side.codec.fields, side.codes, strict=True):
                # What lies behind the end of a row is memory that nobody wrote: it has no place in a file.
                real = _below(self.lengths // side.codec.block, t.shape[2], t.device).reshape(len(t), 1, -1, *[1] * (t.ndim - 3))
                named[f"{name}.{field.name}"] = torch.where(real, _movable(t), 0).view(t.dtype)
        return {"lengths": self.lengths, **named}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave. Raises KeyError or ValueError when the tensors are not those of these codecs."""
        lengths, buffers = tensors["lengths"], self.buffers
        for side, codec, held in zip(("key", "value"), self.codecs, buffers, strict=True):
            blocks = -(-int(lengths.max()) // codec.block)
            for i, f in enumerate(codec.fields):
                t = tensors[f"{side}.{f.name}"]
                expected = (len(lengths), held[i].shape[1], blocks, *f.shape)
                if t.shape != expected or t.dtype != f.dtype:
                    raise ValueError(f"{side}.{f.name} is {t.dtype} {list(t.shape)}, expected {f.dtype} {list(expected)}")
                held[i] = t.to(held[i].device)
        self.lengths = lengths


def _below(counts: Tensor, n: int, device: torch.device) -> Tensor:
    """`[B, n]` bool, true in the first `counts[b]` places."""
    return torch.arange(n, device=device) < counts.to(device)[:, None]


def _grown(t: Tensor, tokens: int, block: int) -> Tensor:
    """A buffer for at least `tokens` tokens, with the contents of `t`."""
    if tokens <= t.shape[2] * block:
        return t
    # The first chunk is mostly a whole prompt (or the sinks), and gets what it needs; what grows once will grow again.
    wanted = tokens if t.shape[2] == 0 else tokens + max(STEP, tokens // 128)
    new = t.new_empty(t.shape[0], t.shape[1], -(-wanted // block), *t.shape[3:])
    new[:, :, : t.shape[2]] = t
    return new


def _movable(t: Tensor) -> Tensor:
    """`t`, or its bytes where it has float8 numbers, which torch neither gathers nor chooses."""
    return t.view(torch.uint8) if t.dtype.itemsize == 1 else t


def _rows(counts: Tensor) -> Sequence[tuple[slice, int]]:
    """Batch rows that can be moved together: all at once when their counts agree, else one by one."""
    if bool((counts == counts[0]).all()):
        return [(slice(None), int(counts[0]))]
    return [(slice(b, b + 1), int(n)) for b, n in enumerate(counts)]


def _write(buffer: Tensor, new: Tensor, starts: Tensor, counts: Tensor) -> None:
    """Copy the first `counts[b]` items of row b of `new` to `starts[b]` of the buffer."""
    if bool((starts == starts[0]).all()) and bool((counts == counts[0]).all()):
        start, n = int(starts[0]), int(counts[0])
        buffer[:, :, start : start + n] = new[:, :, :n]
        return
    row, item = (torch.arange(int(counts.max())) < counts[:, None]).nonzero(as_tuple=True)
    at = [x.to(buffer.device) for x in (row, starts[row] + item, item)]
    _movable(buffer)[at[0], :, at[1]] = _movable(new)[at[0], :, at[2]]


def _shifted(t: Tensor, counts: Tensor, longest: int) -> Tensor:
    """A new buffer without the first `counts[b]` items of row b, for `longest` items."""
    new = t.new_empty(t.shape[0], t.shape[1], longest, *t.shape[3:])
    for row, n in _rows(counts):
        rest = t[row, :, n : n + longest]
        new[row, :, : rest.shape[2]] = rest
    return new
