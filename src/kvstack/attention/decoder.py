"""The decoder: transformers' Llama with the attention that its config names. A PreTrainedModel like any other.

    model = AutoModelForCausalLM.from_config(DecoderConfig(attention="lrkv", rank=24, ...))

`save_pretrained`, `from_pretrained`, `generate` and gradient checkpointing are transformers'. Importing this room registers it. Weights
start at 1/sqrt(fan-in), projections that write into the residual stream smaller by the square root of twice the layers, and the head
at zero.
"""

import math
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

from kvstack.attention.config import DecoderConfig
from kvstack.attention.grouped import GroupedAttention
from kvstack.attention.lowrank import LowRankAttention
from kvstack.attention.mla import LatentAttention
from kvstack.attention.pooled import PooledAttention
from kvstack.attention.pooled_cache import PooledCache

ATTENTION: dict[str, type[nn.Module]] = {
    "mha": GroupedAttention, "gqa": GroupedAttention, "mqa": GroupedAttention, "mla": LatentAttention, "lrkv": LowRankAttention,
    "csa": PooledAttention, "hca": PooledAttention,
}  # fmt: skip


class DecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """A Llama layer with another attention."""

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = ATTENTION[config.attention](config, layer_idx)
        outputs: list[Any] = [self.self_attn.o_proj, self.mlp.down_proj]
        for out in outputs:
            out.init_std = 1 / math.sqrt(2 * config.num_hidden_layers * out.in_features)


class _Pretrained(LlamaPreTrainedModel):  # type: ignore[misc]
    config_class = DecoderConfig
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 - transformers' convention
    _can_record_outputs: dict[str, Any] = {"hidden_states": DecoderLayer}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """See the module. transformers initialises a parameter once, so a Linear that is special says so: `init_std`."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=getattr(module, "init_std", 1 / math.sqrt(max(1, module.in_features))))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        else:
            super()._init_weights(module)


class DecoderModel(_Pretrained, LlamaModel):  # type: ignore[misc]
    """The decoder without its head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        for layer in self.layers:
            if hasattr(layer.self_attn, "rotary"):
                layer.self_attn.rotary = self.rotary_emb  # one for all, so that casts of the model reach every one alike
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, past_key_values: Any = None, use_cache: bool | None = None, **kwargs: Any
    ) -> Any:
        """See transformers; attention that pools tokens has a cache of its own."""
        wanted = self.config.use_cache if use_cache is None else use_cache
        if self.config.pool and wanted and past_key_values is None:
            past_key_values = PooledCache(self.config)
        return super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache, **kwargs)


class DecoderForCausalLM(_Pretrained, LlamaForCausalLM):  # type: ignore[misc]
    """The decoder with its head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = DecoderModel(config)
        # A new one, because Llama's is initialised already.
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.init_std = 0.0  # type: ignore[assignment]
        self.post_init()

    def _supports_default_dynamic_cache(self) -> bool:
        """Whether `generate` shall make a DynamicCache."""
        return not self.config.pool


AutoConfig.register("kvstack", DecoderConfig)
AutoModel.register(DecoderConfig, DecoderModel)
AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM)
