"""A tier whose tokens lie in pages (`kernels.pages`), for the codecs and devices that kernels serve.

To a store it is a `Tier`, with the same words and the same state in files. Pages of 128 tokens come from a pool that grows in steps of
1/128; a token is encoded once, into its place. Kernels read a `body`; `sides` unpacks all codes, for the torch reference and for files.
"""

import torch
from torch import Tensor

from kvstack.cache.tier import Tier, plainly
from kvstack.codecs.base import Codec
from kvstack.errors import RecipeError
from kvstack.kernels.append import append
from kvstack.kernels.codes import from_page, page_format, to_page
from kvstack.kernels.compact import compact
from kvstack.kernels.decode import Body, choose, schedule
from kvstack.kernels.pages import PAGE, Pages, read, write
from kvstack.kernels.reference import Side


def has_pages(key: Codec, value: Codec, head_dim: int, device: torch.device, ragged: bool = False) -> bool:
    """Whether tokens of these codecs shall lie in pages: where a kernel on `device` reads them, and where rows are `ragged`, because
    every row has pages of its own, and a buffer gives each what the longest needs."""
    try:
        page_format(head_dim, key, value)
    except RecipeError:
        return False
    return ragged or choose(device, key, value).name != "reference"


class PagedTier(Tier):
    """Tokens in pages. Raises RecipeError for codecs without a page format."""

    def __init__(self, key: Codec, value: Codec, batch: int, heads: int, device: torch.device) -> None:
        super().__init__(key, value, batch, heads, device)
        self.buffers = [[], []]
        f = page_format(key.fields[0].shape[0] if key.transform is None else key.transform.shape[-1], key, value)
        pool = torch.empty(0, heads, f.nbytes, dtype=torch.uint8, device=device)
        table = torch.zeros(batch, 0, dtype=torch.int32, device=device)
        self.pages = Pages(f, pool, table, torch.zeros(batch, dtype=torch.int32, device=device))
        self.held = torch.zeros(batch, dtype=torch.long)  # pages of every row, on the CPU like the lengths
        self.used = 0  # pages of the pool that belong, or have belonged, to rows
        self.free: list[int] = []  # those that no row has any more
        self._body: Body | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, slack included, of the table and of the lengths."""
        p = self.pages
        return self.lengths.nbytes + self.held.nbytes + sum(t.untyped_storage().nbytes() for t in (p.pool, p.table, p.lengths))

    @plainly
    def body(self, lengths: Tensor) -> Body:
        """What kernels read: the first `lengths[b]` tokens of every row."""
        p = self.pages
        if self._body is None:
            self._body = Body.of(Pages(p.format, p.pool, p.table, torch.zeros_like(p.lengths)), *self.codecs)
        body = self._body
        body.pages.lengths.copy_(lengths)
        body.cum.copy_(schedule(body.pages.lengths, p.pool.shape[1]))
        return body

    @plainly
    def append(self, k: Tensor, v: Tensor, counts: Tensor) -> None:
        """See `Tier.append`; but nobody looks whether numbers are finite, for which a device would have to be waited for. They come
        out of a window, which has looked."""
        if not int(counts.sum()):
            return
        starts = self.pages.lengths
        self._reserve(self.lengths + counts)
        append(self.pages, *self.codecs, k, v, starts, counts.to(starts.device, torch.int32))
        self._set_lengths(self.lengths + counts)

    def sides(self) -> tuple[Side, Side]:
        """See `Tier.sides`; the codes are copies."""
        numbers_k, numbers_v, scales = (x[:, :, : self.longest] for x in read(self.pages))
        key, value = self.codecs
        return Side(key, from_page(key, numbers_k, scales[..., 0])), Side(value, from_page(value, numbers_v, scales[..., 1]))

    @plainly
    def truncate(self, counts: Tensor) -> None:
        """See `Tier.truncate`; no block is ever cut. Pages stay with their rows."""
        self._set_lengths(self.lengths - counts)

    @plainly
    def keep(self, index: Tensor, counts: Tensor) -> None:
        """See `Tier.keep`. Pages that nothing is in go back to the pool, which becomes smaller when half of it is empty now, or when
        nobody has asked for an eighth of it since the last time."""
        device, pool, idle = self.pages.table.device, len(self.pages.pool), len(self.free)
        compact(self.pages, index.to(device, torch.int32), counts.to(device, torch.int32), ordered=True)
        held = -(-counts // PAGE)
        table = self.pages.table.cpu()
        for row, (old, new) in enumerate(zip(self.held.tolist(), held.tolist(), strict=True)):
            self.free += table[row, new:old].tolist()
        self.held = torch.minimum(self.held, held)
        self._set_lengths(counts)
        if 2 * len(self.free) > pool or 8 * idle > pool:
            self.select(torch.arange(len(counts)))

    @plainly
    def select(self, rows: Tensor) -> None:
        """See `Tier.select`. Every row gets pages of its own, since rows that are the same now will not stay so."""
        p, rows = self.pages, rows.cpu()
        held = -(-self.lengths[rows] // PAGE)
        ids = [p.table[int(row), : int(n)] for row, n in zip(rows, held, strict=True)]
        pool = p.pool[torch.cat(ids).long()] if len(ids) else p.pool[:0]
        self._replace(Pages(p.format, pool, p.table[:0].new_zeros(len(rows), 0), p.lengths[:0].new_zeros(len(rows))))
        lengths, self.held, self.used, self.free = self.lengths[rows], torch.zeros_like(held), 0, []
        self._reserve(lengths)
        self._set_lengths(lengths)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """See `Tier.load_state`."""
        plain = Tier(*self.codecs, len(tensors["lengths"]), self.pages.pool.shape[1], self.pages.pool.device)
        plain.load_state(tensors)
        lengths = plain.lengths
        self.held, self.used, self.free = torch.zeros_like(lengths), 0, []
        p = self.pages
        self._replace(Pages(p.format, p.pool[:0], p.table.new_zeros(len(lengths), 0), p.lengths.new_zeros(len(lengths))))
        self._reserve(lengths)
        if plain.longest:
            (k, k_scale), (v, v_scale) = (to_page(side.codec, side.codes) for side in plain.sides())
            write(self.pages, k, v, torch.stack([k_scale, v_scale], -1), torch.zeros_like(lengths), lengths)
        self._set_lengths(lengths)

    def _replace(self, pages: Pages) -> None:
        """Another pool or table; a body that held the old ones would keep them in memory."""
        self.pages, self._body = pages, None

    def _set_lengths(self, lengths: Tensor) -> None:
        p = self.pages
        self.lengths = lengths
        self.pages = Pages(p.format, p.pool, p.table, lengths.to(p.table.device, torch.int32))

    def _reserve(self, lengths: Tensor) -> None:
        """Give every row the pages for `lengths[b]` tokens. Those of the first rows come first."""
        p, held = self.pages, torch.maximum(self.held, -(-lengths // PAGE))
        new = held - self.held
        total = int(new.sum())
        if not total:
            return
        table = torch.zeros(len(held), int(held.max()), dtype=torch.int32)
        table[:, : p.table.shape[1]] = p.table[:, : table.shape[1]].cpu()
        for row, (before, n) in enumerate(zip(self.held.tolist(), new.tolist(), strict=True)):
            reused, self.free = self.free[:n], self.free[n:]
            fresh = n - len(reused)
            table[row, before : before + n] = torch.tensor([*reused, *range(self.used, self.used + fresh)], dtype=torch.int32)
            self.used += fresh
        pool = p.pool
        if self.used > len(pool):
            # The first tokens are mostly a whole prompt, and get what they need; what grows once will grow again.
            size = self.used if not len(pool) else self.used + self.used // 128
            pool = pool.new_zeros(size, *pool.shape[1:])  # no NaN behind the ends of rows
            pool[: len(p.pool)] = p.pool
        self.held = held
        self._replace(Pages(p.format, pool, table.to(p.table.device), p.lengths))
