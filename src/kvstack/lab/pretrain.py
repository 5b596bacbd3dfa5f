"""Pretrain a decoder on text, one architecture at a time, so that only the attention differs between runs.

Every run of one `data_seed` sees the same tokens in the same order, whatever its architecture, its processes and its interruptions. The
learning rate warms up and follows a cosine down to a twentieth; steps of short and of long windows are mixed, since a late change to
long ones costs each architecture differently. A run writes into its folder

    checkpoint.pt     weights, optimisers, step: `resume` goes on from there; written every `save` steps and at the end
    pretrain.json     settings, facts, the curve, the loss of every window of the test text, how far decoding is from the forward
    config.json ...   the model, as transformers loads it

Learning rates are chosen on the tuning text; the test text is read only to report. Steps are timed by the GPU's clock, if there is one.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvstack import artefact
from kvstack.attention import DecoderConfig, DecoderForCausalLM
from kvstack.attention.equality import decoding_differences
from kvstack.attention.pooled_cache import PooledCache
from kvstack.environment import environment
from kvstack.errors import BadInputError
from kvstack.lab.corpus import Corpus, as_tensor, corpus_facts, judged, places, windows
from kvstack.lab.optim import MUON, optimizers, schedule
from kvstack.lab.parallel import DDP, World, gather_state, scatter_state, spread
from kvstack.lab.registry import bundled_model
from kvstack.lab.tokenizer import BOS, EOS, PAD, VOCABULARY, load_tokenizer

CHECKPOINT, FACTS = "checkpoint.pt", "pretrain.json"
# The fastest first, of those that have a backward; which one runs is torch's to decide.
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
DECODED = 256  # tokens of a window, at most, of which the last eighth is decoded, to see whether that equals the forward
FLOOR = 0.05  # of the learning rate, at the end
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, mod 1, fall into every part of [0, 1) as evenly as can be
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class PretrainConfig:
    """Architecture, size and run. attention: fields of DecoderConfig, such as {"attention": "lrkv", "rank": 24}.

    lengths: (share of the steps in windows of this length or one before, length), spread evenly. tokens, batch: in tokens. every: steps
    between looks at the first `looks` windows of the tuning and the test text. save: steps between checkpoints. matrix_lr: of Muon or
    AdamW for matrices; other_lr: of AdamW for the rest. per_head: Muon orthogonalises head by head, see `lab.optim`.
    """

    attention: dict[str, Any] = field(default_factory=lambda: {"attention": "mha"})
    width: int = 512
    layers: int = 8
    heads: int = 8
    head_dim: int = 64
    feed_forward: int = 1376
    rope_theta: float = 100_000.0
    tokens: int = 201_326_592
    batch: int = 131_072
    lengths: tuple[tuple[float, int], ...] = ((0.8, 2048), (1.0, 8192))
    optimizer: str = MUON
    matrix_lr: float = 3e-2
    other_lr: float = 3e-3
    per_head: bool = True
    warmup: int = 100
    every: int = 50
    looks: int = 64
    save: int = 500
    seed: int = 0
    data_seed: int = 0
    compile: bool = True
    checkpointing: bool = False
    parallel: str = DDP

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.tokens // self.batch

    def length(self, step: int) -> int:
        """Tokens of a window at a step."""
        return next(n for end, n in self.lengths if step * GOLDEN % 1 < end)

    def factor(self, step: int) -> float:
        """Factor on the learning rates at a step."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / self.warmup) * (FLOOR + (1 - FLOOR) * cosine)

    def model(self) -> DecoderConfig:
        """The config of the decoder."""
        return DecoderConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.width,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.lengths[-1][1],
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            **self.attention,
        )


def small() -> PretrainConfig:
    """A run for trying the loop on a CPU in a minute; it learns little."""
    return PretrainConfig(
        width=64, layers=2, heads=4, head_dim=16, feed_forward=128, tokens=65_536, batch=2048, lengths=((0.8, 128), (1.0, 256)),
        warmup=4, every=8, looks=4, compile=False,
    )  # fmt: skip


class TextLoss(nn.Module):
    """A decoder and its loss as one module, so that DDP and FSDP see the whole forward."""

    def __init__(self, model: DecoderForCausalLM, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.mean_loss = torch.compile(_mean_loss, dynamic=False) if compiled else _mean_loss

    def forward(self, x: Tensor, per_window: bool = False) -> Tensor:
        """Loss of windows `x [B, T + 1]`, nats a token: the mean, or that of each window `[B]`."""
        hidden = self.model.model(input_ids=x[:, :-1], use_cache=False).last_hidden_state
        if not per_window:
            return self.mean_loss(hidden, self.model.lm_head.weight, x[:, 1:])
        logits = self.model.lm_head(hidden).float().transpose(1, 2)
        return F.cross_entropy(logits, x[:, 1:], reduction="none").mean(1)


def _mean_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def window_losses(text_loss: nn.Module, x: Tensor, tokens: int = 65_536) -> list[float]:
    """Loss of each window of `x [n, T + 1]`, nats a token; up to `tokens` go through the model at once. bf16 on a GPU."""
    was, _ = text_loss.training, text_loss.eval()
    with torch.compiler.set_stance("force_eager"), torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        out = [text_loss(part, per_window=True) for part in x.split(max(1, tokens // x.shape[1]))]
    text_loss.train(was)
    return torch.cat(out).tolist()


def pretrain(
    cfg: PretrainConfig,
    corpus: Corpus,
    out: Path,
    world: World,
    *,
    resume: bool = False,
    stop: int | None = None,
    report: Report = print,
) -> dict[str, Any]:
    """Train and write the folder `out`. All processes of the world call it; the first gets what `pretrain.json` holds.

    resume: go on from `out/checkpoint.pt` of a run with the same settings. stop: leave after that step, with a checkpoint. report:
    called with rows of the curve in the first process. Raises BadInputError for batches that do not spread, for a checkpoint of other
    settings and when the loss is not finite.
    """
    for _, n in cfg.lengths:
        if not cfg.batch // n or cfg.batch // n % world.size:
            raise BadInputError(
                f"{cfg.batch // n} windows of {n} tokens do not spread over {world.size} processes. Give another --batch."
            )
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    device = world.device
    model = DecoderForCausalLM(cfg.model()).to(device).train()
    if cfg.checkpointing:
        model.gradient_checkpointing_enable()
    if cfg.compile:
        # One layer at a time: all layers share the compiled code, and each length costs one compilation.
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    text_loss = spread(TextLoss(model, cfg.compile), model.model.layers, cfg.parallel, world)
    opts = optimizers(model, cfg.optimizer, cfg.matrix_lr, cfg.other_lr, per_head=cfg.per_head)
    # losses: of the steps since the last row of the curve.
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "curve": [], "losses": []}
    if resume:
        state = _load_checkpoint(out, cfg, text_loss, opts, world)
    train = as_tensor(corpus.train, device)
    looks = {name: judged(getattr(corpus, name), cfg.lengths[0][1], device, cfg.looks) for name in ("tuning", "test")}
    began, before, clock = time.monotonic(), state["seconds"], _Clock(device)
    losses = list(torch.tensor(state["losses"], device=device))
    for step in range(state["step"], min(cfg.steps, stop or cfg.steps)):
        length = cfg.length(step)
        starts = places(cfg.data_seed, step, cfg.batch // length, len(train), length)[world.rank :: world.size]
        schedule(opts, cfg.factor(step))
        clock.start()
        with sdpa_kernel(BACKENDS, set_priority=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = text_loss(windows(train, starts, length))
            loss.backward()
        torch.nn.utils.clip_grad_norm_((p for p in model.parameters() if p.numel()), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        clock.stop()
        losses.append(loss.detach())
        state["step"] = step + 1
        if state["step"] % cfg.every == 0 or state["step"] == cfg.steps:
            row = {
                "step": state["step"], "tokens": state["step"] * cfg.batch,
                "loss": world.mean(torch.stack(losses).mean()).item(), "ms": clock.mean(),
                **{name: statistics.fmean(window_losses(text_loss, x)) for name, x in looks.items()},
                "seconds": before + time.monotonic() - began,
            }  # fmt: skip
            losses = []
            if not math.isfinite(row["loss"]):
                raise BadInputError("The loss is not finite. Lower --matrix-lr and --other-lr.")
            state["curve"].append(row)
            if world.first:
                report(row)
        state["seconds"] = before + time.monotonic() - began
        if state["step"] % cfg.save == 0 and state["step"] < cfg.steps:
            _checkpoint(out, cfg, text_loss, opts, state, losses, world)
    weights = _checkpoint(out, cfg, text_loss, opts, state, losses, world)
    facts: dict[str, Any] = {"config": asdict(cfg), "corpus": corpus_facts(corpus), **state}
    facts |= {"processes": world.size, "environment": environment()}
    finished = state["step"] == cfg.steps
    if finished:
        lengths = sorted({n for _, n in cfg.lengths} | {cfg.lengths[-1][1] // 2})
        facts["test_losses"] = {n: window_losses(text_loss, judged(corpus.test, n, device)) for n in lengths}
    if world.first:
        trained = DecoderForCausalLM(model.config).to(device)  # whole, however the one that learnt is spread
        trained.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()})
        facts |= {"parameters": trained.num_parameters(), "cache_bytes_per_token": cache_bytes(trained)}
        if finished:
            some = judged(corpus.test, cfg.lengths[0][1], device, 8)[:, :DECODED]
            facts["decoding"] = decoding_differences(trained, some, some.shape[1] // 8)
        # float16 keeps three more bits of every weight than bfloat16 in the same bytes; no weight is near its limits.
        _export(out, trained.half(), facts)
    world.wait()  # none leaves, or reads the folder, before it is written
    return facts


@torch.inference_mode()
def cache_bytes(model: Any, tokens: int = 128) -> float:
    """Measured bytes that a token adds to the cache of `model` in bf16, all layers; windows are full before."""
    model = deepcopy(model).bfloat16().eval()

    def held(n: int) -> int:
        ids = torch.full((1, n), EOS, device=model.device)
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        if isinstance(cache, PooledCache):
            return cache.nbytes
        return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))

    return (held(2 * tokens) - held(tokens)) / tokens


def _settings(cfg: PretrainConfig) -> dict[str, Any]:
    """What two parts of one run must share: all but how the work is spread and saved."""
    own = ("parallel", "compile", "checkpointing", "save")
    return {k: v for k, v in json.loads(json.dumps(asdict(cfg))).items() if k not in own}


def _checkpoint(
    out: Path, cfg: PretrainConfig, text_loss: nn.Module, opts: list[torch.optim.Optimizer], state: dict[str, Any],
    losses: list[Tensor], world: World,
) -> dict[str, Tensor]:  # fmt: skip
    """Write the checkpoint; all processes take part, and the first gets the weights of `text_loss`, whole."""
    state["losses"] = world.mean(torch.stack(losses)).tolist() if losses else []
    held = gather_state(text_loss, opts)
    if world.first:
        with artefact.replacing(out / CHECKPOINT) as temporary:
            torch.save({"settings": _settings(cfg), "state": state, **held}, temporary)
    return held["model"]  # type: ignore[no-any-return]


def _export(out: Path, half: DecoderForCausalLM, facts: dict[str, Any]) -> None:
    """Write the model for transformers, and the facts."""
    half.save_pretrained(out)
    load_tokenizer(bundled_model()).save_pretrained(out)
    with artefact.replacing(out / FACTS) as temporary:
        temporary.write_text(json.dumps(facts), "utf-8")


def _load_checkpoint(
    out: Path, cfg: PretrainConfig, text_loss: nn.Module, opts: list[torch.optim.Optimizer], world: World
) -> dict[str, Any]:
    path = out / CHECKPOINT
    if not path.is_file():
        raise BadInputError(f"There is no {path}. Leave --resume away to start.")
    held = torch.load(path, map_location="cpu", weights_only=True)
    differing = [k for k, v in _settings(cfg).items() if held["settings"].get(k) != v]
    if differing:
        raise BadInputError(f"{path} is of a run with other settings: {', '.join(differing)}. Give the same, or another --out.")
    scatter_state(text_loss, opts, held if world.first else {})
    return held["state"]  # type: ignore[no-any-return]


class _Clock:
    """Milliseconds of steps, by the GPU's events or the CPU's clock."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self.gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Before a step."""
        self.begin = self._now()

    def stop(self) -> None:
        """After a step."""
        self.spans.append((self.begin, self._now()))

    def mean(self) -> float:
        """Of the steps since the last call."""
        if self.gpu:
            torch.cuda.synchronize()
        spans = [a.elapsed_time(b) if self.gpu else 1000 * (b - a) for a, b in self.spans]
        self.spans = []
        return statistics.fmean(spans)
