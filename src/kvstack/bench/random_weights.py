"""Random weights with which an engine of vLLM says something of its own to every prompt: a load format of vLLM, `kvstack-random`.

vLLM's own (`dummy`) are so small that a model says one token for ever, whatever it has read. Here vectors keep their length on the way
through a matrix, and queries with norms of their own are made half as long again, so that attention has favourites and what it finds
matters. With three times as long rounding decides what is said, in 36 layers.
"""

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from kvstack.bench.engine_process import RANDOM


@register_model_loader(RANDOM)
class RandomLoader(BaseModelLoader):  # type: ignore[misc]
    """Draws the weights of a model, the same ones every time."""

    def download_model(self, model_config: ModelConfig) -> None:
        """See vLLM: there is nothing to download."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """See vLLM: into the parameters of `model`, in place."""
        for i, (name, weight) in enumerate(model.named_parameters()):
            draw = torch.Generator(weight.device).manual_seed(i)
            if weight.dim() == 1:
                weight.data.fill_(0 if name.endswith("bias") else 1.5 if "q_norm" in name else 1)
            else:
                weight.data.normal_(0, weight.shape[-1] ** -0.5, generator=draw)
