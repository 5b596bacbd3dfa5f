"""The decoder: transformers' Llama with the attention that its config names. A PreTrainedModel like any other.

    model = AutoModelForCausalLM.from_config(DecoderConfig(attention="lrkv", rank=24, ...))

`save_pretrained`, `from_pretrained`, `generate` and gradient checkpointing are transformers'. Importing this room registers it. Weights
start at 1/sqrt(fan-in), projections that write into the residual stream smaller by the square root of twice the layers, and the head
at zero.
"""

import math
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

from kvstack.attention.config import DecoderConfig
from kvstack.attention.grouped import GroupedAttention
from kvstack.attention.lowrank import LowRankAttention
from kvstack.attention.mla import LatentAttention

ATTENTION: dict[str, type[nn.Module]] = {
    "mha": GroupedAttention, "gqa": GroupedAttention, "mqa": GroupedAttention, "mla": LatentAttention, "lrkv": LowRankAttention,
}  # fmt: skip


class DecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """A Llama layer with another attention."""

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = ATTENTION[config.attention](config, layer_idx)


class _Pretrained(LlamaPreTrainedModel):  # type: ignore[misc]
    config_class = DecoderConfig
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 - transformers' convention
    _can_record_outputs: dict[str, Any] = {"hidden_states": DecoderLayer}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """See the module. transformers calls it for every module, inner ones first."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(max(1, module.in_features)))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, DecoderLayer):
            for out in (module.self_attn.o_proj, module.mlp.down_proj):
                nn.init.normal_(out.weight, std=1 / math.sqrt(2 * self.config.num_hidden_layers * out.in_features))
        elif isinstance(module, LowRankAttention):
            module.init_weights()
        else:
            super()._init_weights(module)
        if isinstance(module, DecoderForCausalLM):
            nn.init.zeros_(module.lm_head.weight)


class DecoderModel(_Pretrained, LlamaModel):  # type: ignore[misc]
    """The decoder without its head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class DecoderForCausalLM(_Pretrained, LlamaForCausalLM):  # type: ignore[misc]
    """The decoder with its head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = DecoderModel(config)
        self.post_init()


AutoConfig.register("kvstack", DecoderConfig)
AutoModel.register(DecoderConfig, DecoderModel)
AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM)
