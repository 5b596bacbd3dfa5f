"""Run a model with several recipes over one suite and measure what each costs and saves.

Every recipe sees the same batches, teacher-forced, through a real cache in strict mode: each query reads exactly what decoding token
by token would have shown it. The first recipe, plain bf16, is the reference of the KL divergence and of the change in bits per byte.
Bytes are measured on the cache of a full text window. Tokens per second are decoding steps of one sequence after such a window.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvstack.cache.store import LayerStore
from kvstack.errors import BadInputError
from kvstack.eval import metrics
from kvstack.eval.suite import Batch, SuiteConfig, task_batches, text_batches
from kvstack.hf import models
from kvstack.hf.attention import Fresh
from kvstack.hf.cache import Cache
from kvstack.hf.generate import PLAIN_STEPS, generate
from kvstack.hf.static import obstacle
from kvstack.recipe import Recipe

REFERENCE = "bf16"
SPEED_STEPS = 16


@dataclass
class Scores:
    """One value per sequence, for one recipe."""

    nats: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    tasks: dict[str, list[float]] = field(default_factory=dict)
    bytes_per_token: float = 0.0
    ratio: float = 0.0
    tokens_per_s: float = 0.0
    decoding: str = ""  # how that was measured


@torch.inference_mode()
def logits_of(model: Any, recipe: Recipe, tokens: Tensor, profile: Any, chunk: int) -> tuple[Tensor, Cache]:
    """Logits `[B, T, V]` (float32) of every position, read through a cache of `recipe`, and that cache."""
    cache = Cache(model, recipe, profile=profile, prefill="strict")
    if recipe.selection is not None:
        chunk = min(chunk, recipe.selection.interval)  # what a longer one would see, decoding would not
    out = [
        model(input_ids=part, past_key_values=cache, use_cache=True).logits.float()
        for part in tokens.to(model.device).split(chunk, dim=1)
    ]
    return torch.cat(out, dim=1), cache


def _score(batch: Batch, logits: Tensor, reference: Tensor, scores: Scores) -> None:
    targets = batch.tokens[:, 1:].to(logits.device)
    if batch.kind == "text":
        for i in range(len(logits)):  # row by row: with a large vocabulary, logits are what memory is needed for
            logp, logq = (F.log_softmax(x[i, :-1], -1) for x in (logits, reference))
            scores.nats.append(-float(logp.gather(-1, targets[i, :, None]).sum()))
            scores.kl.append(float((logq.exp() * (logq - logp)).sum(-1).mean()))
        scores.nbytes += batch.nbytes
        return
    right = (logits[:, :-1].argmax(-1) == targets).cpu()
    for row, items in zip(right, batch.items, strict=True):
        # The token at position p is predicted at position p - 1.
        hits = [bool(row[a - 1 : b - 1].all()) for a, b in items]
        scores.tasks.setdefault(batch.kind, []).append(sum(hits) / len(hits))


@torch.inference_mode()
def decode_speed(model: Any, cache: Cache, tokens: Tensor) -> tuple[float, str]:
    """Tokens per second of decoding the last tokens of `tokens [1, T]` one by one on top of the filled `cache`, and how it was done.

    On a GPU it is `kvstack.generate` where that can hold the recipe, going on after `tokens` but as many.
    """
    why = obstacle(model, cache.recipe, cache.profile) if model.device.type == "cuda" else "the model is not on a GPU"
    if why is None:
        n = PLAIN_STEPS + 1 + SPEED_STEPS
        out = generate(model, tokens[:, :-n].to(model.device), recipe=cache.recipe, max_new_tokens=n, profile=cache.profile)
        return out.tokens_per_second, f"CUDA graph, {out.path}"
    steps = tokens[:, -SPEED_STEPS - 2 :].to(model.device)

    def step(i: int) -> None:
        model(input_ids=steps[:, i : i + 1], past_key_values=cache, use_cache=True)

    for i in range(2):  # warm-up
        step(i)
    _synchronise(model)
    began = time.perf_counter()
    for i in range(2, 2 + SPEED_STEPS):
        step(i)
    _synchronise(model)
    return SPEED_STEPS / (time.perf_counter() - began), f"step by step: {why}"


def _synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def ratio_of_random(model: Any, recipe: Recipe, tokens: int, profile: Any = None) -> float:
    """Measured ratio of a cache of `model` with `tokens` random tokens, which may be more than the model's context."""
    cache = Cache(model, recipe, profile=profile)
    config = model.config.get_text_config()
    heads, size = config.num_key_value_heads, models.head_dim(model)
    for layer in cache.layers:
        for chunk in torch.arange(tokens).split(4096):
            k, v = (torch.randn(1, heads, len(chunk), size, dtype=model.dtype, device=model.device) for _ in "kv")
            fresh, _ = layer.update(k, v)
            if isinstance(fresh, Fresh):
                assert isinstance(fresh.store, LayerStore)
                fresh.store.append(k, v)
    return cache.ratio


def evaluate(
    model: Any,
    tokenizer: Any,
    recipes: Sequence[Recipe],
    cfg: SuiteConfig,
    text: str,
    *,
    profile: Any = None,
    chunk: int = 512,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Scores]:
    """Scores of each recipe by its name; bf16 is put in front if it is not there."""
    models.check_context(model, cfg.length, "Ask for shorter sequences.")
    if cfg.text_sequences == 1:
        raise BadInputError("One window of text has no interval. Ask for two or more, or for none.")
    if not (cfg.text_sequences or cfg.tasks):
        raise BadInputError("There is nothing to measure. Ask for windows of text or for a task.")
    every = list(dict.fromkeys([Recipe.parse(REFERENCE), *recipes]))
    for recipe in every:
        Cache(model, recipe, profile=profile)  # one that does not fit is refused before the long work
    batches = text_batches(tokenizer, text, cfg) + task_batches(tokenizer, text, cfg)
    scores = {str(r): Scores() for r in every}
    total = (len(batches) + 1) * len(every)
    done = 0
    for batch in batches:
        truth = None
        for recipe in every:
            logits, _ = logits_of(model, recipe, batch.tokens, profile, chunk)
            truth = logits if truth is None else truth
            _score(batch, logits, truth, scores[str(recipe)])
            done += 1
            progress(done, total)
    longest = max(batches[0].lengths)  # text windows come first and are full
    window = batches[0].tokens[batches[0].lengths.index(longest), None, :longest]
    for recipe in every:
        s = scores[str(recipe)]
        _, cache = logits_of(model, recipe, window[:, : -SPEED_STEPS - 2], profile, chunk)
        s.tokens_per_s, s.decoding = decode_speed(model, cache, window)
        s.bytes_per_token, s.ratio = cache.nbytes / cache.get_seq_length(), cache.ratio
        done += 1
        progress(done, total)
    return scores


def rows(scores: dict[str, Scores], cfg: SuiteConfig, against: str | None = None) -> list[dict[str, Any]]:
    """One JSON row per recipe: the compare row of the results files.

    against: a recipe that was measured too; each row gets the paired differences to it in `against`. `sequences` are the raw values.
    """
    reference = scores[REFERENCE]
    out = []
    for name, s in scores.items():
        row: dict[str, Any] = {
            "recipe": name, "tokens": cfg.length, "bytes_per_token": s.bytes_per_token, "ratio": s.ratio,
            "tokens_per_s": s.tokens_per_s,
            "decoding": s.decoding,
        }  # fmt: skip
        if s.nats:
            bits = metrics.ratio_of_sums([v / math.log(2) for v in s.nats], s.nbytes)
            change, kl = _change(s, reference), metrics.mean(s.kl)
            row |= {
                "bits_per_byte": bits.mean, "delta_pct": change.mean, "delta_pct_low": change.low, "delta_pct_high": change.high,
                "kl": kl.mean, "kl_low": kl.low, "kl_high": kl.high, "text_sequences": kl.n,
                "sequences": {"nats": s.nats, "bytes": s.nbytes, "kl": s.kl},
            }  # fmt: skip
            if against is not None:
                other = scores[against]
                pairs = {"delta_pct": _change(s, other), "kl": metrics.paired(s.kl, other.kl)}
                row["against"] = {"recipe": against} | {k: {"mean": e.mean, "low": e.low, "high": e.high} for k, e in pairs.items()}
        row["tasks"] = {}
        for task, values in s.tasks.items():
            e = metrics.proportion(values)
            row["tasks"][task] = {"accuracy": e.mean, "low": e.low, "high": e.high, "n": e.n}
        out.append(row)
    return out


def _change(s: Scores, other: Scores) -> metrics.Estimate:
    """Change of the bits of `s` against those of `other`, per cent, over the same sequences."""
    e = metrics.ratio_of_sums([a - b for a, b in zip(s.nats, other.nats, strict=True)], other.nats)
    return metrics.Estimate(100 * e.mean, 100 * e.low, 100 * e.high, e.n)
