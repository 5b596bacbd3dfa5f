"""A cache of vLLM that is full from the start: a KV connector under which a prompt needs no prefill, so that a step of many long rows
can be timed at once.

It is vLLM's own `DecodeBenchConnector`, which fills a cache of floating-point numbers with random ones, and two things more: pages of
ours get random codes, and a request with `kv_transfer_params={"compute": true}` is computed like any other. Packed caches of vLLM
itself keep the zeros that the original gives them. `serve` tells vLLM of it.
"""

from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector

from kvstack.bench.own import scramble
from kvstack.vllm.backend import Backend
from kvstack.vllm.settings import layout


class FilledCache(DecodeBenchConnector):  # type: ignore[misc]
    """See the module."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.layers = vllm_config.compilation_config.static_forward_context
        self.dtype = vllm_config.model_config.dtype

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See vLLM: the caches of all layers are there."""
        super().register_kv_caches(kv_caches)
        for name, cache in kv_caches.items():
            backend = self.layers[name].attn_backend
            if issubclass(backend, Backend):
                scramble(layout(backend.precision, self.layers[name].head_size, self.dtype), cache.view(torch.uint8).flatten(2))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See vLLM: how many tokens of a request are there already."""
        if (request.kv_transfer_params or {}).get("compute"):
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)  # type: ignore[no-any-return]
