"""The incremental state of `PooledAttention`: a transformers cache layer, and a cache made of such layers.

A layer keeps what the next token can read, and no more. Keys are values, one KV head, so there is no head axis:

    keys            [B, min(N, n_win - 1), D]   records of the newest tokens, after norm and RoPE
    main, index     a `Pool` each: entries of the attention, and those of the lightning indexer if there is one

A `Pool` grows by one entry every m tokens; all the rest is of constant size. Nothing here computes: `Compressor` does. The cache cannot
be cropped, because the tokens of a closed window are gone.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


@dataclass(frozen=True, eq=False)
class Pool:
    """Entries, and what the open window has so far. c: size of an entry. S: streams, 2 with overlap, else 1. 2 h: what turns.

    entries: `[B, E, c]`, one for each closed window, after norm and RoPE. rows: `[B, n, 2, S c]`, kv and gate (with its bias) of the
    n < m tokens of the open window. before: `[B, 1, m, 2, c]`, stream b of the last closed window; `[B, 0, m, 2, c]` without overlap.
    start: `[B, 1, 2 h]`, cos and sin at the open window's first token; `[B, 0, 2 h]` when n is 0.
    """

    entries: Tensor
    rows: Tensor
    before: Tensor
    start: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the fields."""
        return self.entries, self.rows, self.before, self.start


class PooledLayer(CacheLayerMixin):  # type: ignore[misc]
    """The state of one `PooledAttention` with a window of `window` tokens. The attention itself replaces `main` and `index`."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys: Any = None
        self.values: Any = None
        self.is_initialized = False
        self.seen = 0
        self.main: Pool | None = None
        self.index: Pool | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with an empty window."""
        self.keys = self.values = key_states[:, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append records `[B, T, D]`, keys and values alike, to the window. Returns those that it had and the new ones, twice."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[1]
        records = torch.cat([self.keys, key_states], 1)
        # A copy, since a view would keep the whole prompt alive.
        self.keys = self.values = records[:, max(0, records.shape[1] - self.window + 1) :].clone()
        return records, records

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See transformers: all tokens, so that padding shows wherever it is."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """See transformers: there is none."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` for beam search."""
        if self.is_initialized:
            self.keys = self.values = self.keys[beam_idx]
            self.main, self.index = (pool and Pool(*(t[beam_idx] for t in pool.tensors)) for pool in (self.main, self.index))

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that its tensors keep alive."""
        tensors: list[Tensor] = [self.keys] if self.is_initialized else []
        tensors += [t for pool in (self.main, self.index) if pool for t in pool.tensors]
        return sum(t.untyped_storage().nbytes() for t in tensors)


class PooledCache(transformers.Cache):  # type: ignore[misc]
    """A transformers cache for a model all of whose layers are `PooledAttention`; `config` gives `num_hidden_layers` and `window`."""

    def __init__(self, config: Any) -> None:
        super().__init__(layers=[PooledLayer(config.window) for _ in range(config.num_hidden_layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that all layers keep alive."""
        return sum(layer.nbytes for layer in self.layers)
