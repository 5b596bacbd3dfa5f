"""What all layers of a group share in one step: which rows decode, which bring chunks, and where their tokens lie.

    tokens      [d d d d | c c c c c | c c c ...]     d: rows of a decode step, all with as many new tokens; c: chunks of prompts
    past[b]     tokens of row b that lie in its pages already; the new ones come behind them
    table[b]    pages of row b

Rows come with those of few tokens first. Neighbours with as many new tokens are one `Chunk`, so that a launch serves them all. Numbers that
kernels read are written into buffers that stay where they are, because a CUDA graph of a decode step reads them again.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from kvstack.kernels.decode import schedule
from kvstack.kernels.pages import PAGE


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows with `tokens` new tokens each; the first of these is token `first` of the step.

    past, counts: `[B]` int32, tokens in pages and new ones, of which padded rows have 0. table: `[B, pages]` int32. cum: the schedule of
    `past`. has_past: whether some row may have one.
    """

    first: int
    tokens: int
    past: Tensor
    counts: Tensor
    table: Tensor
    cum: Tensor
    has_past: bool

    @property
    def span(self) -> slice:
        """Their tokens of the step."""
        return slice(self.first, self.first + len(self.past) * self.tokens)


@dataclass(frozen=True)
class Step(AttentionMetadata):  # type: ignore[misc]
    """decodes: rows of the decode step, or None. causal: `[1, T, T]` bool, what their new tokens see of each other. chunks: all others.
    starts: where each row of the chunks begins, `[rows + 1]` int32 from 0. first: the first token of the chunks. longest: of the chunks."""

    decodes: Rows | None
    causal: Tensor
    chunks: tuple[Rows, ...]
    starts: Tensor | None
    first: int
    tokens: int
    longest: int


class Builder(AttentionMetadataBuilder[Step]):  # type: ignore[misc]
    """Makes a `Step` of what vLLM knows of a batch."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        rows = vllm_config.scheduler_config.max_num_seqs
        self.past = torch.zeros(rows, dtype=torch.int32, device=device)
        self.counts = torch.zeros(rows, dtype=torch.int32, device=device)
        self.cum = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self.causal: dict[int, Tensor] = {}

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        """See vLLM. Waits for nothing."""
        c = common_attn_metadata
        rows, (decoding, _, first, _) = c.num_reqs, split_decodes_and_prefills(c, self.reorder_batch_threshold, require_uniform=True)
        counts, past = self.counts[:rows], self.past[:rows]
        torch.sub(c.query_start_loc[1 : rows + 1], c.query_start_loc[:rows], out=counts)
        torch.sub(c.seq_lens[:rows], counts, out=past).clamp_(min=0)
        table = c.block_table_tensor[:, : max(1, -(-c.max_seq_len // PAGE))]
        assert table.dtype == torch.int32
        decodes = None
        if decoding:
            cum = self.cum[: decoding + 1]
            cum.copy_(schedule(past[:decoding], self.kv_cache_spec.num_kv_heads))
            decodes = Rows(0, first // decoding, past[:decoding], counts[:decoding], table[:decoding], cum, True)
        t = decodes.tokens if decodes else 1
        if t not in self.causal:
            self.causal[t] = torch.ones(1, t, t, dtype=torch.bool, device=self.device).tril()
        starts = c.query_start_loc_cpu[: rows + 1].tolist()
        lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)][decoding:]
        chunks = self._chunks(c, decoding, starts, lengths, past, counts, table) if decoding < rows else ()
        cu = c.query_start_loc[decoding : rows + 1] - first if chunks else None
        return Step(decodes, self.causal[t], chunks, cu, first, starts[-1] - first, max(lengths, default=0))

    def _chunks(
        self, c: Any, row: int, starts: list[int], lengths: list[int], past: Tensor, counts: Tensor, table: Tensor
    ) -> tuple[Rows, ...]:
        """Runs of rows, from row `row` on, with as many new tokens."""
        out = []
        ends = c.seq_lens_cpu_upper_bound.tolist()
        while lengths:
            n = next((i for i, x in enumerate(lengths) if x != lengths[0]), len(lengths))
            rows = slice(row, row + n)
            if lengths[0]:
                cum = schedule(past[rows], self.kv_cache_spec.num_kv_heads)
                has_past = max(ends[rows]) > lengths[0]
                out.append(Rows(starts[row], lengths[0], past[rows], counts[rows], table[rows], cum, has_past))
            row, lengths = row + n, lengths[n:]
        return tuple(out)
