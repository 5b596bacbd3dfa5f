"""`kvstack.generate`: batched generation from a compressed cache, one CUDA graph per step.

    out = kvstack.generate(model, input_ids, attention_mask, recipe="balanced", max_new_tokens=256)
    out.tokens, out.tokens_per_second

Prompts are read row by row, or several of one length together; every row keeps its own length, so no padding is stored. After two
plain steps, which compile kernels, a step is recorded as a graph and replayed: no Python runs between tokens. Without a GPU the steps
stay plain. It is for inference with greedy choice or sampling; for beams, streaming, assistants and processors give a `kvstack.Cache`
to the model's own `generate`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvstack.errors import BadInputError
from kvstack.hf import models
from kvstack.hf.static import StaticCache
from kvstack.profile import Profile
from kvstack.recipe import Recipe

PLAIN_STEPS = 2
LOOK = 32  # steps between looks at which rows are done
PROMPT_TOKENS = 8192  # read at once, unless one prompt is longer


@dataclass(frozen=True)
class Generation:
    """tokens: `[B, steps]` new tokens, padding after a row's end. nbytes: reserved by the cache; ratio: bf16 bytes of the tokens that
    came, evicted ones too, over those. Times are in seconds.

    path: which kernel read the cache, and why. steps: that were timed by `decode_s`; those before are in `prefill_s`, with compilation
    and recording.
    """

    tokens: Tensor
    nbytes: int
    ratio: float
    prefill_s: float
    decode_s: float
    steps: int
    path: str

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows a second, of the steps that were timed; 0 when none was."""
        return len(self.tokens) * self.steps / self.decode_s if self.steps else 0.0


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen. temperature: 0 takes the likeliest. top_p: sample from the likeliest of this total probability.

    Raises BadInputError for numbers out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise BadInputError("`temperature` must be at least 0 and `top_p` above 0 and at most 1.")

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens `[B]` for logits `[B, V]`."""
        if not self.temperature:
            return logits.argmax(-1)
        p = (logits.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            high, order = p.sort(-1, descending=True)
            high = high.masked_fill(high.cumsum(-1) - high >= self.top_p, 0)
            p = torch.zeros_like(p).scatter(-1, order, high)
        return (p / torch.empty_like(p).exponential_()).argmax(-1)  # a draw that needs no synchronisation


@torch.inference_mode()
def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    recipe: str | Recipe = "balanced",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    profile: Profile | None = None,
    graph: bool | None = None,
) -> Generation:
    """Continue the prompts `input_ids [B, n]`, of which `attention_mask [B, n]` hides padding (on either side).

    temperature: 0 takes the likeliest token. top_p: sample from the likeliest tokens of this total probability, with torch's generator.
    eos_token_id: one or more tokens that end a row; pad_token_id: what follows. profile: calibrated centres, for recipes that ask for
    them. graph: replay a CUDA graph; None: when the model is on a GPU.
    Raises BadInputError for bad arguments, and what `StaticCache` raises.
    """
    recipe, choice = Recipe.parse(recipe), Choice(temperature, top_p)
    prompts = _prompts(input_ids, attention_mask)
    longest = max(len(p) for p in prompts)
    if max_new_tokens < 1:
        raise BadInputError("`max_new_tokens` must be at least 1.")
    models.check_context(model, longest + max_new_tokens, "Shorten the prompt or `max_new_tokens`.")
    graph = model.device.type == "cuda" if graph is None else graph
    cache = StaticCache(model, recipe, len(prompts), longest + max_new_tokens, profile)
    began = time.perf_counter()
    loop = DecodeLoop(model, cache, _read(model, cache, prompts), max_new_tokens, choice, _ends(eos_token_id), pad_token_id)
    left = max_new_tokens - 1  # the first token is the prompt's
    for _ in range(min(PLAIN_STEPS, left) if graph else 0):
        loop.evict_if_due()
        loop.step()
        left -= 1
    step = recorded(loop.step) if graph and left else loop.step
    _wait(model)
    middle, timed = time.perf_counter(), 0
    while timed < left:
        if loop.ends and timed % LOOK == 0 and bool(loop.done.all()):
            break
        loop.evict_if_due()
        step()
        timed += 1
    _wait(model)
    tokens = loop.tokens[:, : max_new_tokens - left + timed]
    ratio = int(cache.steps.lengths.sum()) * cache.bf16_bytes_per_token / cache.nbytes
    return Generation(tokens.clone(), cache.nbytes, ratio, middle - began, time.perf_counter() - middle, timed, cache.path)


class DecodeLoop:
    """State of the decode loop, all of it in place on the device."""

    def __init__(
        self, model: Any, cache: StaticCache, first: Tensor, max_new_tokens: int, choice: Choice, ends: Sequence[int], pad: int
    ) -> None:
        self.model, self.cache, self.choice, self.ends, self.pad = model, cache, choice, ends, pad
        token = choice(first)
        self.token = token[:, None].clone()
        self.done = torch.zeros_like(token, dtype=torch.bool)
        self._mark(token)
        self.tokens = torch.full((len(token), max_new_tokens), pad, device=token.device)
        self.tokens[:, 0] = token
        self.at = torch.ones(len(token), 1, dtype=torch.long, device=token.device)
        self.since = 0  # steps since an eviction, or the prompt

    def step(self) -> None:
        """Read one token of every row, choose the next one and store it."""
        steps = self.cache.steps
        positions = steps.lengths[:, None].long()
        logits = self.model(input_ids=self.token, position_ids=positions, past_key_values=self.cache, use_cache=True).logits[:, -1]
        steps.advance()
        token = self.choice(logits).masked_fill(self.done, self.pad)
        self._mark(token)
        self.token.copy_(token[:, None])
        self.tokens.scatter_(1, self.at, self.token)
        self.at += 1

    def evict_if_due(self) -> None:
        """Call it before every step: after as many as the selection's interval, tokens are evicted."""
        selection = self.cache.recipe.selection
        if selection is None:
            return
        if self.since == selection.interval:
            self.cache.evict()
            self.since = 0
        self.since += 1

    def _mark(self, token: Tensor) -> None:
        for end in self.ends:
            self.done |= token == end


def _ends(tokens: int | Sequence[int] | None) -> Sequence[int]:
    return () if tokens is None else (tokens,) if isinstance(tokens, int) else tuple(tokens)


def _read(model: Any, cache: StaticCache, prompts: list[Tensor]) -> Tensor:
    """Fill the cache with the prompts; the logits `[B, V]` of their last tokens."""
    logits, row = [], 0
    while row < len(prompts):
        n = len(prompts[row])
        end = row + 1
        while end < len(prompts) and len(prompts[end]) == n and (end + 1 - row) * n <= PROMPT_TOKENS:
            end += 1
        cache.steps.filling = slice(row, end)
        position = torch.arange(n, device=model.device).expand(end - row, -1)
        out = model(
            input_ids=torch.stack(prompts[row:end]), position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits.append(out.logits[:, -1])
        row = end
    cache.steps.filling = None
    cache.steps.lengths.copy_(torch.tensor([len(p) for p in prompts]))
    cache.steps.refresh()
    return torch.cat(logits)


def recorded(step: Any) -> Any:
    """A function that replays `step` as a graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _prompts(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The real tokens of every row. Raises BadInputError when there are none, or when the mask has another shape."""
    if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        raise BadInputError(f"`input_ids` must be [batch, tokens], and the mask of the same shape; they are {list(ids.shape)}.")
    rows = list(ids) if mask is None else [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    if not rows or any(len(row) == 0 for row in rows):
        raise BadInputError("A prompt is empty. Give at least one token in every row.")
    return rows


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
