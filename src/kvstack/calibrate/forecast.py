"""Training of the networks of `scorers/forecast.py` on samples of the attention that a model pays under a full cache.

A sample is a token n and an event: the moment before position t = 128, 256, ... of its sequence, when an eviction could come.

    x = [key before RoPE, value] of n        age = t - n        target = max over queries q >= t and over the group of P[q, n]

P are the attention probabilities of the KV head. Every sequence gives equally many samples to each KV head, uniform in the event and
then in the token. The loss is the binary cross-entropy, whose minimum is the mean of the target. Inputs are standardised for training;
mean and spread are folded into the weights. A tenth of the samples is held out and says how good the fit is, though not how it carries
over to other text. Samples lie in memory as float16; when those of all layers are too many, the model runs again for the next ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from kvstack.calibrate.run import Attended, Batch, run, unpack
from kvstack.codecs.exact import ExactCodec
from kvstack.errors import BadInputError
from kvstack.kernels.reference import Shape, Side, attention_weights
from kvstack.profile import Profile
from kvstack.scorers.base import ForecastWeights
from kvstack.scorers.forecast import SPAN, forecast, line

STEP = 128  # tokens from one event to the next
SHORTEST = 2 * STEP  # tokens of a sequence with one event, and a whole step of queries after it
CHUNK = 8 * STEP  # queries whose probabilities are held at once
HELD = 4 * 2**30  # bytes of inputs that are held at once
HIDDEN = 16
STEPS, WARMUP, BATCH = 1500, 50, 4096
RATE, LAST, DECAY = 3e-3, 0.02, 1e-2  # learning rate, the share of it at the end of a linear fall, weight decay


def add_forecast(
    profile: Profile,
    model: Any,
    batches: Sequence[Batch],
    source: str = "",
    samples: int = 3072,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Profile:
    """`profile`, which is of `model`, with a forecast for every layer that it has statistics of.

    batches: as for `calibrate`. source: what they are, in words; it is added to the profile's. samples: of each sequence, for each KV
    head. progress: called with the work that is done, and all there is. The same arguments give the same forecast.
    Raises ArtefactError when the profile is of another model, BadInputError for no sequences or sequences of fewer than 256 tokens.
    """
    profile.check(model)
    lengths = [n for batch in batches for n in unpack(batch, torch.device("cpu"))[1].sum(1).tolist()]
    if not lengths or min(lengths) < SHORTEST:
        found = f"one has {min(lengths)}" if lengths else "there are none"
        raise BadInputError(f"A forecast needs sequences of {SHORTEST} tokens or more; {found}. Give others, or do without it.")
    layers = profile.query_norm.flatten(1).any(1).nonzero().flatten().tolist()
    count, heads, head_dim = profile.key_centre.shape
    size = samples * len(lengths)
    at_once = max(1, HELD // (heads * size * 2 * head_dim * 2))
    groups = [layers[i : i + at_once] for i in range(0, len(layers), at_once)]
    total, done = len(groups) * len(batches) + len(layers), 0
    out: dict[str, Tensor] = {}
    for group in groups:
        drawn = {i: Samples(heads, head_dim, size, samples, seed=i) for i in group}
        for batch in batches:
            with torch.no_grad():
                run(model, *unpack(batch, model.device), lambda seen, drawn=drawn: drawn[seen.layer].add(seen), group)  # type: ignore[misc]
            progress(done := done + 1, total)
        for i in group:
            weights, fit = train(drawn.pop(i), model.device)
            parts = {f.name: getattr(weights, f.name) for f in fields(ForecastWeights)} | {"fit": fit}
            for name, t in parts.items():
                out.setdefault(f"forecast_{name}", torch.zeros(count, *t.shape))[i] = t
            progress(done := done + 1, total)
    return replace(profile, **out, source=f"{profile.source}; forecast: {source}" if source else profile.source)  # type: ignore[arg-type]


class Samples:
    """Samples of one layer, `size` for every KV head, on the CPU: x `[H, size, 2 D]` float16, age and target `[H, size]` float32."""

    def __init__(self, heads: int, head_dim: int, size: int, each: int, seed: int) -> None:
        self.x = torch.empty(heads, size, 2 * head_dim, dtype=torch.float16)
        self.age, self.target = torch.empty(heads, size), torch.empty(heads, size)
        self.each, self.filled = each, 0
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, seen: Attended) -> None:
        """Draw `each` samples of every sequence of a call of attention."""
        heads = seen.key.shape[1]
        for b, real in enumerate(seen.real):
            query, key, value = (x[b, :, real].float() for x in (seen.query, seen.key, seen.value))  # [Hq or H, T, D]
            x = torch.cat([seen.rope.unturn(key, seen.position[b, real]), value], -1)
            sinks = None if seen.sink is None else seen.sink.unflatten(0, (heads, -1))
            new = slice(self.filled, self.filled + self.each)
            for h, q in enumerate(query.unflatten(0, (heads, -1))):
                ahead = attention_ahead(q, key[h], seen.shape, None if sinks is None else sinks[h])
                event = torch.randint(1, len(ahead), (self.each,), generator=self.generator)
                token = (torch.rand(self.each, generator=self.generator) * STEP * event).long()
                self.x[h, new] = x[h, token.to(x.device)].half().cpu()
                self.age[h, new] = (STEP * event - token).float()
                self.target[h, new] = ahead.cpu()[event, token].clamp(0, 1)
            self.filled = new.stop


def attention_ahead(query: Tensor, key: Tensor, shape: Shape, sink: Tensor | None = None) -> Tensor:
    """`[T // 128, T]`: the greatest attention probability that the queries from position 128 e on give to each token, for event e.

    query `[G, T, D]`, key `[T, D]`: of one KV head after RoPE. shape, sink: see `kernels/reference.py`.
    """
    t, d = key.shape
    place = torch.arange(t, device=key.device)
    blocks = []
    for start in range(0, t, CHUNK):
        q, k = query[None, :, start : start + CHUNK], key[None, None, : start + CHUNK]
        causal = place[start : start + CHUNK, None] >= place[: start + CHUNK]
        weights = attention_weights(q, [(Side(ExactCodec(d, k.dtype), (k,)), causal[None])], shape, sink)[0].amax(0)
        blocks += [torch.nn.functional.pad(w.amax(0), (0, t - w.shape[1])) for w in weights.split(STEP)]
    ahead: Tensor = torch.stack(blocks).flip(0).cummax(0).values.flip(0)
    return ahead[: t // STEP]


@torch.inference_mode(False)
@torch.enable_grad()
def train(samples: Samples, device: torch.device) -> tuple[ForecastWeights, Tensor]:
    """Networks of all KV heads of a layer, trained together on `device`, and their rank correlation and loss on the samples that were
    held out, `[H, 2]`; both on the CPU."""
    generator = torch.Generator().manual_seed(0)
    heads, size, inputs = samples.x.shape
    held, rest = torch.randperm(size, generator=generator).split([size // 10, size - size // 10])
    x, age, target = (t.to(device) for t in (samples.x, samples.age / SPAN, samples.target))
    spread, mean = (torch.stack(m)[:, None] for m in zip(*(torch.std_mean(one.float(), 0) for one in x), strict=True))  # [H, 1, 2 D]
    spread = spread.where(spread > 1e-6, 1)  # a coordinate that is always the same

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[1])

    start = (normal(heads, inputs, HIDDEN), torch.zeros(heads, HIDDEN), normal(heads, HIDDEN, 2), torch.zeros(heads, 2))
    weights = ForecastWeights(*(t.to(device).requires_grad_() for t in start))
    optimizer = torch.optim.AdamW([getattr(weights, f.name) for f in fields(weights)], RATE, weight_decay=DECAY)

    def judge(index: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[H, N]` and loss `[H]` of the samples at `index [N]`."""
        i = index.to(device)
        logits = forecast(line((x[:, i].float() - mean) / spread, weights), age[:, i])
        return logits, binary_cross_entropy_with_logits(logits, target[:, i], reduction="none").mean(1)

    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARMUP) * max(LAST, 1 - step / STEPS)
        optimizer.zero_grad()
        judge(rest[torch.randint(len(rest), (BATCH,), generator=generator)])[1].sum().backward()
        optimizer.step()
    with torch.no_grad():
        logits, loss = judge(held)
        fit = torch.stack([rank_correlation(logits, target[:, held.to(device)]), loss], -1)
        hidden = weights.hidden / spread.mT
        bias = weights.hidden_bias - (mean @ hidden)[:, 0]
        folded = ForecastWeights(*(t.detach().cpu() for t in (hidden, bias, weights.out, weights.out_bias)))
    return folded, fit.cpu()


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation `[H]` of the rows of `a, b [H, N]`; 0 where all of a row are equal."""

    def ranks(x: Tensor) -> Tensor:
        _, inverse, count = x.unique(return_inverse=True, return_counts=True)
        middle: Tensor = count.cumsum(0) - (count - 1) / 2  # equal ones share their mean rank
        return middle[inverse]

    return torch.stack([torch.corrcoef(torch.stack([ranks(p), ranks(q)]))[0, 1] for p, q in zip(a, b, strict=True)]).nan_to_num()
