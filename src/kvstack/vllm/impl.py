"""What a layer does in a forward: its new tokens attend to the pages and to each other, and then go into the pages.

A query sees the tokens of its own step exact and those before as stored, which is what `kvstack.Cache` does with a window of 0: a
prompt in one chunk, and then token by token, gives the same tokens. Everything is asked of `kernels`; only attention of chunks over
themselves is FlashAttention's, as vLLM has it, and on a CPU torch's.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl

from kvstack.codecs.base import Context
from kvstack.codecs.exact import ExactCodec
from kvstack.errors import UnsupportedModelError
from kvstack.kernels.append import append
from kvstack.kernels.codes import page_format
from kvstack.kernels.decode import Body, Exact, decode
from kvstack.kernels.pages import PAGE, Pages
from kvstack.kernels.past import attend_past
from kvstack.kernels.reference import Partial, Shape, Side, attend, merge
from kvstack.vllm.backend import assign, tell
from kvstack.vllm.profiles import own_heads, profile_of
from kvstack.vllm.steps import Rows, Step


def or_windowed(own: Any) -> Any:
    """A class that makes our attention of a layer, or for one with a sliding window that of vLLM's backend `own`."""

    class OrWindowed(Impl):
        def __new__(cls, *args: Any, **extra: Any) -> Any:
            windowed = inspect.signature(Impl.__init__).bind(None, *args, **extra).arguments.get("sliding_window")
            return (Impl if windowed is None else own.get_impl_cls())(*args, **extra)

    return OrWindowed


class Impl(AttentionImpl[Step]):  # type: ignore[misc]
    """Attention of one layer over pages of codes."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        found = {
            "ALiBi": alibi_slopes,
            "a sliding window": sliding_window,
            "layers that share keys and values": kv_sharing_target_layer_name,
            "attention that is not a decoder's": attn_type != "decoder",
            **extra,
        }
        for what, value in found.items():
            if isinstance(value, Tensor) or value:
                raise UnsupportedModelError(f"kvstack cannot serve this model's layers with {what}. Take away the recipe.")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.shape = Shape(self.scale, logits_soft_cap or None)
        self.body: Body | None = None  # of no tokens; codecs and what kernels made of them
        self.settings: Any = None
        self.told = False
        self.config = get_current_vllm_config()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """See vLLM: the moment at which all layers are there and nobody has asked for the size of a page."""
        self.settings = assign()

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of `query [tokens, Hq, D]` into `output`; `key, value [tokens, H, D]` go into `kv_cache [blocks, H, 128,
        bytes]`."""
        if attn_metadata is None:  # vLLM measures how much memory a forward takes
            return output.zero_()
        if self.body is None:
            self.body = self._body(layer, kv_cache, query.dtype)
            self._compile(self.body, query, key, kv_cache)
        # vLLM tries graphs with a small cache first, of a block a row.
        if not self.told and kv_cache.shape[0] > self.config.scheduler_config.max_num_seqs:
            self.told = True
            if layer is self._first():
                tell(self.settings, self.config, self.body.path)
        body = self.body
        pool, step = kv_cache.view(torch.uint8).flatten(2), attn_metadata
        groups = [rows for rows in (step.decodes, *step.chunks) if rows is not None]
        pasts = [body.over(Pages(body.pages.format, pool, rows.table, rows.past), rows.cum) for rows in groups]
        for rows, past in zip(groups, pasts, strict=True):  # first, because a row may read what another one brings in the same step
            append(past.pages, body.key, body.value, self._by_row(key, rows), self._by_row(value, rows), rows.past, rows.counts)
        lse = self._within(step, query, key, value, output) if step.chunks and query.is_cuda else None
        for rows, past in zip(groups, pasts, strict=True):
            q, k, v, out = (self._by_row(x, rows) for x in (query, key, value, output))
            if rows is step.decodes:
                out.copy_(decode(q, past, Exact(k, v, step.causal), self.shape))
                continue
            before = attend_past(q, past, self.shape, dtype=q.dtype) if rows.has_past else None
            if lse is None:
                out.copy_(_merged(q, k, v, before, self.shape))
            elif before is not None:
                own = slice(rows.span.start - step.first, rows.span.stop - step.first)
                _merge_on_device(output[rows.span], lse[:, own], before)
        return output

    def _body(self, layer: Any, kv_cache: Tensor, dtype: torch.dtype) -> Body:
        """The codecs of a layer, and what kernels need of them."""
        index = extract_layer_index(layer.layer_name)
        profile = profile_of(self.settings, self.config.model_config)
        precision, codecs = self.settings.precision(index), []
        for side in ("key", "value"):
            centre = None if profile is None else own_heads(getattr(profile, f"{side}_centre")[index], self.num_kv_heads)
            codecs.append(precision.build(side, Context(self.head_size, self.num_kv_heads, dtype, kv_cache.device, centre)))
        nothing = torch.zeros(1, dtype=torch.int32, device=kv_cache.device)
        f = page_format(self.head_size, *codecs)
        pool = kv_cache.view(torch.uint8).flatten(2)
        # No part of the cache at hand, which would stay for ever, since vLLM tries graphs with another one first.
        body = Body.of(Pages(f, pool.new_empty(0, *pool.shape[1:]), nothing[None], nothing), *codecs)
        assert body.pages.pool.shape[2] == f.nbytes, "the pages are of another format than this layer's"
        return body

    def _compile(self, body: Body, query: Tensor, key: Tensor, kv_cache: Tensor) -> None:
        """Store and attend to nothing, so that no request waits for a compiler: with so few and so many new tokens that each kernel has
        its turn, over pages of one program and over so many that several share them. Pages of 16 bits, which chunks read without a
        kernel, are left out."""
        if body.path.name == "reference" or max(body.pages.format.k, body.pages.format.v) > 8:
            return
        pool, nothing = kv_cache.view(torch.uint8).flatten(2), body.pages.lengths
        for tokens, pages in ((2, 1), (16, 1), (64, 1), (PAGE, 1), (PAGE, 64)):
            q, k = (x.new_zeros(1, x.shape[1], tokens, x.shape[2]) for x in (query, key))
            past = body.over(Pages(body.pages.format, pool, nothing.new_zeros(1, pages), nothing), body.cum)
            append(past.pages, body.key, body.value, k, k, nothing, nothing)
            attend_past(q, past, self.shape, dtype=q.dtype)

    def _first(self) -> Any:
        """The first layer that is ours."""
        layers = get_layers_from_vllm_config(self.config, Attention).values()
        return next(layer for layer in layers if isinstance(layer.impl, Impl))

    def _within(self, step: Step, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> Tensor:
        """Causal attention of all chunks over themselves, into `output`; returns the logarithms of the sums `[Hq, tokens]`."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

        span = slice(step.first, step.first + step.tokens)
        sums: tuple[Tensor, Tensor] = flash_attn_varlen_func(
            query[span], key[span], value[span], max_seqlen_q=step.longest, cu_seqlens_q=step.starts, max_seqlen_k=step.longest,
            cu_seqlens_k=step.starts, softmax_scale=self.scale, causal=True, softcap=self.shape.softcap or 0.0, return_softmax_lse=True,
            out=output[span], fa_version=get_flash_attn_version(head_size=self.head_size),
        )  # fmt: skip
        return sums[1]

    @staticmethod
    def _by_row(x: Tensor, rows: Rows) -> Tensor:
        """`[B, H, T, D]`, a view, of the tokens of some rows of `x [tokens, H, D]`."""
        out: Tensor = x[rows.span].unflatten(0, (len(rows.past), rows.tokens)).transpose(1, 2)
        return out


def _merged(q: Tensor, k: Tensor, v: Tensor, before: Partial | None, shape: Shape) -> Tensor:
    """Attention of `q [B, Hq, T, D]` over its own chunk, exact, and what was `before`."""
    seen = torch.ones(1, q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    own, value = (Side(ExactCodec(x.shape[-1], x.dtype), (x,)) for x in (k, v))
    within = attend(q, own, value, seen, shape)
    return (merge([before, within]) if before is not None else within).out


def _merge_on_device(output: Tensor, lse: Tensor, before: Partial) -> None:
    """Merge what was `before` the chunks of some rows into their `output [tokens, Hq, D]`, with `lse [Hq, tokens]`, by vLLM's
    kernel."""
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    out = before.out.transpose(1, 2).flatten(0, 1)
    sums = before.lse.transpose(0, 1).flatten(1)
    merge_attn_states(output, out.contiguous(), sums.contiguous(), output, lse.contiguous())  # number by number, in place
