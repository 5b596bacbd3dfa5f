"""A pretrained decoder with MHA as one that caches less, without training: model in, model out. The mathematics is `retrofit`'s.

    lrkv        LRKV `exact` of the rank, its heads aligned
    lrkv-mean   LRKV `exact` of the rank, its heads as they are
    gqa         GQA, of the fewest KV heads that take no less than LRKV of the rank
    per-head    an SVD of every head          )  references: MHA whose key and value weights are of that structure. Their cache is as
    joint       one SVD of all heads          )  large as it was; what counts is the loss that the structure leaves. Keys would be
    mla         one SVD of keys and values    )  rebuilt before RoPE, which MLA with a decoupled RoPE key cannot hold.

A reference gets as many numbers a token as LRKV of the rank takes, 2 (D + H r) a layer. mla never needs more than d: with so many it
caches the input of the layer itself.

What comes in is our decoder with `mha`, or transformers' Llama with as many KV heads as query heads and no biases. Beside its weights a
fit needs C = E[x x^T] of the input of every attention: `moments`, from one pass over text. Not here: training, see `lab.distil`.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from kvstack.attention.config import DecoderConfig
from kvstack.attention.decoder import DecoderForCausalLM
from kvstack.attention.lowrank_fit import energy
from kvstack.attention.retrofit import Side, fit_key, fit_mla, fit_value, key_side, pool_key, pool_value, svd_key, svd_value, value_side
from kvstack.errors import BadInputError, UnsupportedModelError

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Cost:
    """Of one layer. numbers: what a token takes in a cache of this structure. key, value: the shares of energy that are lost, in the
    metric of `retrofit` whatever the method."""

    numbers: int
    key: float
    value: float


def check(model: Any, rank: int = 0) -> None:
    """Raise UnsupportedModelError when `model` is none that `convert` takes, BadInputError when its heads have no such `rank`."""
    config = model.config
    if any(name.endswith(("q_norm.weight", "k_norm.weight")) for name, _ in model.named_parameters()):
        raise UnsupportedModelError(
            f"{config.model_type} normalises its queries and keys, and nothing can be moved from one to the other through a norm. "
            "Give a model without QK-norm, such as one of `kvstack lab pretrain`."
        )
    if type(model) not in (DecoderForCausalLM, LlamaForCausalLM):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be converted. Give a LlamaForCausalLM, or one of `kvstack lab pretrain --attention mha`."
        )
    if getattr(config, "attention", "mha") != "mha":
        raise UnsupportedModelError(f"The attention of this model is {config.attention} already. Give one with mha.")
    if config.num_key_value_heads != config.num_attention_heads:
        raise UnsupportedModelError(
            f"This model is GQA: {config.num_attention_heads} query heads share {config.num_key_value_heads} KV heads, and LRKV has a "
            "residual for every query head. Give one with as many KV heads as query heads."
        )
    if config.attention_bias:
        raise UnsupportedModelError("The attention of this model has biases, which LRKV has not. Give a model without attention_bias.")
    if not 0 <= rank <= config.head_dim:
        raise BadInputError(f"The rank cannot be {rank}. Give a whole number from 0 to the head size, {config.head_dim}.")


@torch.no_grad()
def moments(model: Any, batches: Iterable[Tensor], progress: Progress = lambda tokens: None) -> list[Tensor]:
    """C = E[x x^T] `[d, d]` float64 of the input of every layer's attention, over `batches` of tokens `[B, T]`.

    progress: called after every batch with the tokens so far. Raises as `check` does, and BadInputError when there are no tokens or the
    inputs are not finite.
    """
    check(model)
    size, layers = model.config.hidden_size, model.model.layers
    sums = [torch.zeros(size, size, dtype=torch.float64, device=model.device) for _ in layers]

    def adding(total: Tensor) -> Callable[..., None]:
        def add(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            x = kwargs["hidden_states"].flatten(0, 1).double()
            total.addmm_(x.T, x)

        return add

    hooks = [x.self_attn.register_forward_pre_hook(adding(s), with_kwargs=True) for x, s in zip(layers, sums, strict=True)]
    tokens = 0
    try:
        for batch in batches:
            model.model(input_ids=batch.to(model.device), use_cache=False)
            tokens += batch.numel()
            progress(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise BadInputError("There are no tokens to take moments of. Give at least one batch.")
    if not all(s.isfinite().all() for s in sums):
        raise BadInputError("The model gives numbers that are NaN or Inf. Check its weights, or load it in bfloat16 or float32.")
    return [s / tokens for s in sums]


def query_energies(w_q: Tensor, c: Tensor, head_dim: int) -> Tensor:
    """E |q_j|^2 `[H, D / 2]` float64 of the queries `w_q x` before RoPE, by head and plane (j, j + D / 2): the diagonal of W C W^T."""
    w = w_q.double()
    return ((w @ c) * w).sum(1).view(-1, 2, head_dim // 2).sum(1)


@torch.no_grad()
def convert(
    model: Any, moments: list[Tensor], method: str, rank: int, progress: Progress = lambda layers: None
) -> tuple[DecoderForCausalLM, list[Cost]]:
    """`model` after one of `METHODS` at the bytes of LRKV of `rank`, a model of its own; and what each layer costs.

    moments: of the same model, from `moments`. progress: called with the number of layers done. Weights stay in the model's dtype and
    on its device; sums are float64. Raises as `check` does, and BadInputError for a method that does not exist.
    """
    check(model, rank)
    if method not in METHODS:
        raise BadInputError(f"There is no method {method!r}. Choose one of {', '.join(METHODS)}.")
    new: list[_New] = []
    for layer, c in zip(model.model.layers, moments, strict=True):
        w_q, w_k, w_v, w_o = (getattr(layer.self_attn, f"{name}_proj").weight for name in "qkvo")
        new.append(METHODS[method](_Layer(w_q, w_k, w_v, w_o, c, model.config.head_dim), rank))
        progress(len(new))
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    with model.device:
        made: DecoderForCausalLM = DecoderForCausalLM._from_config(
            DecoderConfig(**fields | new[0].fields), dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    state = {name: x for name, x in model.state_dict().items() if ".self_attn." not in name}
    state |= {f"model.layers.{i}.self_attn.{name}.weight": x for i, layer in enumerate(new) for name, x in layer.weights.items()}
    made.load_state_dict(state)
    made.generation_config = deepcopy(model.generation_config)
    return made.eval(), [layer.cost for layer in new]


@dataclass(frozen=True, eq=False)
class _Layer:
    """Weights of an attention as `torch.nn.Linear` holds them, and the moment of its input."""

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_o: Tensor
    c: Tensor
    head_dim: int

    @property
    def energies(self) -> Tensor:
        return query_energies(self.w_q, self.c, self.head_dim)

    @property
    def heads(self) -> int:
        return len(self.w_k) // self.head_dim

    def numbers(self, rank: int) -> int:
        """What LRKV of `rank` caches of a token."""
        return 2 * (self.head_dim + self.heads * rank)

    def sides(self) -> tuple[Side, Side]:
        """Keys and values in the metric of `retrofit`."""
        return key_side(self.w_k, self.w_q, self.c, self.energies), value_side(self.w_v, self.w_o, self.c, self.head_dim)


@dataclass(frozen=True, eq=False)
class _New:
    """A layer's new attention: fields of DecoderConfig, weights by module, and its cost."""

    fields: dict[str, Any]
    weights: dict[str, Tensor]
    cost: Cost


def _lrkv(layer: _Layer, rank: int, method: Literal["aligned", "mean"] = "aligned") -> _New:
    key, w_q = fit_key(layer.w_k, layer.w_q, layer.c, layer.energies, rank, method)
    value, w_o = fit_value(layer.w_v, layer.w_o, layer.c, layer.head_dim, rank, method)
    weights = {"q_proj": w_q, "o_proj": w_o}
    for side, fit in (("k", key), ("v", value)):
        weights |= {f"{side}_shared": fit.shared, f"{side}_down": fit.down, f"{side}_up": fit.up.flatten(0, 1)}
    fields = {"attention": "lrkv", "rank": rank, "variant": "exact"}
    return _New(fields, weights, Cost(layer.numbers(rank), key.lost, value.lost))


def _lrkv_mean(layer: _Layer, rank: int) -> _New:
    return _lrkv(layer, rank, "mean")


def _gqa(layer: _Layer, rank: int) -> _New:
    enough = (n for n in range(1, layer.heads) if layer.heads % n == 0 and 2 * n * layer.head_dim >= layer.numbers(rank))
    kv_heads = next(enough, layer.heads)  # of more than all heads take there is no GQA
    w_k, w_q, lost_key = pool_key(layer.w_k, layer.w_q, layer.c, layer.energies, kv_heads)
    w_v, w_o, lost_value = pool_value(layer.w_v, layer.w_o, layer.c, layer.head_dim, kv_heads)
    weights = {"q_proj": w_q, "k_proj": w_k, "v_proj": w_v, "o_proj": w_o}
    fields = {"attention": "gqa", "num_key_value_heads": kv_heads}
    return _New(fields, weights, Cost(2 * kv_heads * layer.head_dim, lost_key, lost_value))


def _svd(layer: _Layer, rank: int, joint: bool) -> _New:
    w_k, lost_key = svd_key(layer.w_k, layer.w_q, layer.c, layer.energies, rank, joint)
    w_v, lost_value = svd_value(layer.w_v, layer.w_o, layer.c, layer.head_dim, rank, joint)
    return _dense(layer, w_k, w_v, Cost(min(layer.numbers(rank), 2 * len(layer.w_k)), lost_key, lost_value))


def _per_head(layer: _Layer, rank: int) -> _New:
    return _svd(layer, rank, joint=False)


def _joint(layer: _Layer, rank: int) -> _New:
    return _svd(layer, rank, joint=True)


def _mla(layer: _Layer, rank: int) -> _New:
    width = min(layer.numbers(rank), layer.w_k.shape[1])
    fit = fit_mla(layer.w_k, layer.w_v, layer.c, width)
    w_k, w_v, (key, value) = fit.up_k @ fit.down, fit.up_v @ fit.down, layer.sides()
    lost = _lost(key, layer.w_k - w_k, layer.c), _lost(value, layer.w_v - w_v, layer.c)
    return _dense(layer, w_k, w_v, Cost(width, *lost))


# Each takes a layer and the rank of LRKV that sets the bytes.
METHODS: dict[str, Callable[[_Layer, int], _New]] = {
    "lrkv": _lrkv, "lrkv-mean": _lrkv_mean, "gqa": _gqa, "per-head": _per_head, "joint": _joint, "mla": _mla,
}  # fmt: skip
REFERENCES = ("per-head", "joint", "mla")  # those that come back as MHA


def _dense(layer: _Layer, w_k: Tensor, w_v: Tensor, cost: Cost) -> _New:
    """MHA with other keys and values; queries and output stay."""
    return _New({"attention": "mha"}, {"q_proj": layer.w_q, "k_proj": w_k, "v_proj": w_v, "o_proj": layer.w_o}, cost)


def _lost(side: Side, error: Tensor, c: Tensor) -> float:
    """The share of a side's energy in an `error [H D, d]` of its weights: that of L_h error_h C^{1/2}."""
    x = torch.linalg.solve(side.inverse, error.double().view(len(side.a), -1, len(c)))
    return float(((x @ c) * x).sum()) / energy(side.a)
