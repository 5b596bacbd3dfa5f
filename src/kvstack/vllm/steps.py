"""What all layers of a group share in one step: which rows decode, which bring chunks, and where their tokens lie.

    tokens      [d d d d | c c c c c | c c c ...]     d: rows of a decode step, all with as many new tokens; c: chunks of prompts
    past[b]     tokens of row b that lie in its pages already; the new ones come behind them
    table[b]    pages of row b

Rows come with those of few tokens first. Neighbours with as many new tokens are one `Rows`, so that a launch serves them all. Numbers
that kernels read are written into buffers that stay where they are, because a CUDA graph of a decode step reads them again.

With a selection, `past` and `table` are what evictions have left (`selection.Plan`). What a step makes due is evicted when the next one
is prepared: nothing has been written since, and no graph has to hold it.
"""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from kvstack.kernels.decode import schedule
from kvstack.kernels.pages import PAGE
from kvstack.vllm.selection import Due, Evictor, Plan, SelectionSpec


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows with `tokens` new tokens each; the first of these is token `first` of the step.

    past, counts: `[B]` int32, tokens in pages and new ones, of which padded rows have 0. table: `[B, pages]` int32. cum: the schedule
    of `past`. has_past: whether some row may have one.
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
    starts: where each row of the chunks begins, `[rows + 1]` int32 from 0. first: the first token of the chunks. tokens, longest: of
    them."""

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
        self.past, self.counts = (torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(2))
        self.cum = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self.causal: dict[int, Tensor] = {}
        self.plan: Plan | None = None
        self.due: Due | None = None
        self.evictor: Evictor | None = None
        if isinstance(kv_cache_spec, SelectionSpec):
            self.plan = Plan(kv_cache_spec.budget, kv_cache_spec.interval)
            self.table = torch.zeros(rows, self._columns(1), dtype=torch.int32, device=device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        """See vLLM. Waits for nothing."""
        c = common_attn_metadata
        rows, (decoding, _, first, _) = c.num_reqs, split_decodes_and_prefills(c, self.reorder_batch_threshold, require_uniform=True)
        starts = c.query_start_loc_cpu[: rows + 1].tolist()
        ends = c.seq_lens_cpu_upper_bound[:rows].tolist()
        lengths = [b - a for a, b in itertools.pairwise(starts)]
        counts, past = self.counts[:rows], self.past[:rows]
        torch.sub(c.query_start_loc[1 : rows + 1], c.query_start_loc[:rows], out=counts)
        torch.sub(c.seq_lens[:rows], counts, out=past).clamp_(min=0)
        table = c.block_table_tensor[:rows, : max(1, -(-c.max_seq_len // PAGE))]
        if self.plan is not None:
            table = self._evicting(self.plan, table, past, ends, lengths, decoding)
        decodes = None
        if decoding:
            cum = self.cum[: decoding + 1]
            cum.copy_(schedule(past[:decoding], self.kv_cache_spec.num_kv_heads))
            decodes = Rows(0, first // decoding, past[:decoding], counts[:decoding], table[:decoding], cum, True)
        t = decodes.tokens if decodes else 1
        if t not in self.causal:
            self.causal[t] = torch.ones(1, t, t, dtype=torch.bool, device=self.device).tril()
        chunks = []
        for row, n in runs(lengths, decoding):
            some = slice(row, row + n)
            if lengths[row]:
                cum = schedule(past[some], self.kv_cache_spec.num_kv_heads)
                has_past = max(ends[some]) > lengths[row]
                chunks.append(Rows(starts[row], lengths[row], past[some], counts[some], table[some], cum, has_past))
        cu = c.query_start_loc[decoding : rows + 1] - first if chunks else None
        longest = max(lengths[decoding:], default=0)
        return Step(decodes, self.causal[t], tuple(chunks), cu, first, starts[-1] - first, longest)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Step:
        """See vLLM: a step of made-up rows, of which nothing is due."""
        step = self.build(0, common_attn_metadata)
        self.due = None
        if self.plan is not None and self.evictor is None and self._layers()[0].impl.body is not None:
            self._evictor().evict(Due.nothing(self._columns(0), self.device), self.plan.budget)  # compiles what it needs
        return step

    def _columns(self, tokens: int) -> int:
        """Pages of a row that can hold what evictions leave, and `tokens` new ones."""
        assert self.plan is not None
        return -(-(self.plan.budget + self.plan.interval + tokens) // PAGE) + 1

    def _evicting(self, plan: Plan, table: Tensor, past: Tensor, ends: list[int], lengths: list[int], decoding: int) -> Tensor:
        """Evict what the last step made due, take from `past` what is gone, note what this step makes due, and return the rows'
        pages."""
        if self.due is not None:
            self._evictor().evict(self.due, plan.budget)
        gone = plan.gone(past)
        past.sub_(gone)
        pages = plan.table(table, gone, self._columns(max(lengths)))
        before = [plan.gone(end - n) for end, n in zip(ends, lengths, strict=True)]
        due = [i for i, end in enumerate(ends) if lengths[i] and plan.gone(end) > before[i]]
        self.due = None
        if due:
            after = [plan.gone(ends[i]) for i in due]
            held = [n + plan.budget - before[i] for i, n in zip(due, after, strict=True)]
            newer = [ends[i] - n - plan.budget for i, n in zip(due, after, strict=True)]
            rows, *numbers = self._to_device(due, held, [ends[i] for i in due], newer)
            self.due = Due(pages[rows.long(), : max(held) // PAGE], *numbers)
        # A graph is of decode steps alone.
        return self.table[:decoding].copy_(pages) if decoding == len(ends) else pages

    def _layers(self) -> list[Any]:
        return [self.vllm_config.compilation_config.static_forward_context[name] for name in self.layer_names]

    def _evictor(self) -> Evictor:
        """What evicts in our layers, as long as their caches are where they were."""
        layers = self._layers()
        if self.evictor is None or self.evictor.layers[0].kv_cache.data_ptr() != self.evictor.pool.data_ptr():
            self.evictor = Evictor(layers, layers[0].impl.settings, self.vllm_config)
        return self.evictor

    def _to_device(self, *lists: list[int]) -> Tensor:
        """Lists of one length as `[lists, n]` int32, without waiting."""
        host = torch.tensor(lists, dtype=torch.int32)
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host


def runs(lengths: list[int], start: int) -> list[tuple[int, int]]:
    """Runs of equal numbers of `lengths` from `start` on: where each begins, and how many there are."""
    out = []
    while start < len(lengths):
        n = next((i for i, x in enumerate(lengths[start:]) if x != lengths[start]), len(lengths) - start)
        out.append((start, n))
        start += n
    return out
