"""Train a lab model from scratch on the mixture of text and tasks, in minutes on one GPU: transformers' Qwen3, or our own decoder.

The schedule is in wall-clock time, because the machine is what is scarce: lengths grow from 256 to the full context, the learning
rate warms up, stays, and falls to zero over the last `cooldown` of the time. Weight matrices are trained by Muon, the rest by AdamW.
A run can start from the folder of another one. It writes a model folder that transformers loads: float16 weights, tokenizer and
`training.json` with the settings and the curve.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from kvstack.attention import DecoderConfig, DecoderForCausalLM
from kvstack.calibrate import add_forecast, calibrate
from kvstack.errors import BadInputError
from kvstack.lab.calibration import LENGTH, calibration_batches
from kvstack.lab.data import Mixture, Stream
from kvstack.lab.optim import MUON, optimizers, schedule
from kvstack.lab.tasks import TASKS
from kvstack.lab.text import digest, training_text, tuning_text
from kvstack.lab.tokenizer import BOS, EOS, PAD, VOCABULARY, Words, load_tokenizer, train_tokenizer


@dataclass(frozen=True)
class TrainConfig:
    """Size of the model and of the run. minutes: wall-clock training time, compilation included. attention: None for Qwen3; else fields
    of DecoderConfig, such as {"attention": "lrkv", "rank": 24, "qk_norm": True}, which replace `kv_heads`."""

    width: int = 256
    layers: int = 6
    feed_forward: int = 512
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    attention: dict[str, Any] | None = None
    context: int = 4096
    rope_theta: float = 100_000.0
    minutes: float = 12.5
    tokens: int = 4096 * 24
    text_bytes: int = 100_000_000
    muon_lr: float = 4e-3
    adam_lr: float = 2e-3
    warmup: int = 200
    cooldown: float = 0.35
    # (share of the time after which it ends, length)
    lengths: tuple[tuple[float, int], ...] = ((0.16, 256), (0.3, 512), (0.48, 1024), (0.7, 2048), (1.0, 4096))
    workers: int = 10
    seed: int = 0
    compile: bool = True

    def model(self) -> Any:
        """A fresh model of this size."""
        sizes: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": self.width,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": True,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        }
        if self.attention is None:
            return Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=self.kv_heads))
        return DecoderForCausalLM(DecoderConfig(**sizes, **self.attention))


def small() -> TrainConfig:
    """A model for trying the loop on a CPU in two minutes; it learns little."""
    return TrainConfig(
        width=128, layers=2, feed_forward=256, heads=2, kv_heads=1, head_dim=64, context=256, minutes=2.0, tokens=4096,
        text_bytes=2_000_000, lengths=((1.0, 128),), workers=1, compile=False,
    )  # fmt: skip


def weighted_loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean of the cross-entropy, and the share of answer tokens that are right. hidden: [N, width]."""
    logits = F.linear(hidden, head).float()
    loss = F.cross_entropy(logits, targets, reduction="none")
    answer = weights == 1.0
    right = ((logits.argmax(-1) == targets) & answer).sum() / answer.sum().clamp_min(1)
    return (loss * weights).sum() / weights.sum(), right


def learning_rate(progress: float, step: int, cfg: TrainConfig) -> float:
    """Factor on the learning rates: linear warm-up in steps, flat, linear fall to zero at the end of the time."""
    return min(1.0, (step + 1) / cfg.warmup) * min(1.0, max(0.0, 1.0 - progress) / cfg.cooldown)


def train_model(
    cfg: TrainConfig,
    out: Path,
    *,
    tokenizer: Path | None = None,
    resume: Path | None = None,
    report: Callable[[dict[str, float]], None] = lambda row: None,
) -> Any:
    """Train for `cfg.minutes` and write the model folder `out`.

    tokenizer: folder of a tokenizer to use instead of training one. resume: the folder of a model to continue from, with its
    tokenizer, and fresh optimizers and schedule. report: called every few seconds with step, progress, length, loss, answers, tokens.
    """
    if resume is not None and not (resume / "training.json").is_file():
        raise BadInputError(f"{resume} is not the folder of a lab model. Leave --resume away to start from scratch.")
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = training_text(cfg.text_bytes)
    known = resume or tokenizer
    tok = load_tokenizer(known) if known else train_tokenizer(texts)
    ids = tok.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    text = np.concatenate([np.asarray(e.ids, np.uint16) for e in ids])
    state: dict[str, Any] = {"steps": 0, "tokens": 0, "seconds": 0.0, "curve": []}
    model = cfg.model()
    if resume is not None:
        model = type(model).from_pretrained(resume, dtype=torch.float32)
        state = {k: v for k, v in json.loads((resume / "training.json").read_text()).items() if k in state}
    model = model.to(device).train()
    first = state["steps"]
    opts = optimizers(model, MUON, cfg.muon_lr, cfg.adam_lr, scale="rms", per_head=True)  # Qwen3 says nothing of heads
    loss_fn = weighted_loss
    if cfg.compile:
        # One layer at a time: every layer shares the same compiled code, and each length costs one compilation.
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        loss_fn = torch.compile(weighted_loss, dynamic=False)
    mix = Mixture(tokens=cfg.tokens, seed=cfg.seed + first)  # a continued run sees new samples
    began = last = time.monotonic()
    limit = cfg.minutes * 60
    with Stream(Words(tok), text, mix, cfg.workers) as stream:
        for tokens, weights in stream:
            now = time.monotonic() - began
            if now >= limit:
                break
            stream.length.value = next(n for end, n in cfg.lengths if now / limit <= end)
            schedule(opts, learning_rate(now / limit, state["steps"] - first, cfg))
            x = torch.from_numpy(tokens.astype(np.int64)).to(device, non_blocking=True)
            w = torch.from_numpy(weights).to(device, non_blocking=True)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                hidden = model.model(input_ids=x[:, :-1], use_cache=False).last_hidden_state
                loss, answers = loss_fn(hidden.flatten(0, 1), model.lm_head.weight, x[:, 1:].flatten(), w[:, 1:].flatten().float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad(set_to_none=True)
            state["steps"] += 1
            state["tokens"] += tokens.size
            if time.monotonic() - last > 5:
                last = time.monotonic()
                row = {
                    "step": state["steps"], "seconds": state["seconds"] + now, "progress": now / limit,
                    "length": tokens.shape[1] - 1, "loss": loss.item(), "answers": answers.item(), "tokens": state["tokens"],
                }  # fmt: skip
                if not math.isfinite(row["loss"]):
                    raise BadInputError("The loss is not finite. Lower --muon-lr and --adam-lr, or use another --seed.")
                state["curve"].append(row)
                report(row)
    state["seconds"] += time.monotonic() - began
    _save(model, tok, out, cfg, state, digest("".join(texts)), len(text))
    return model.eval()


def _save(
    model: Any,
    tok: PreTrainedTokenizerFast,
    out: Path,
    cfg: TrainConfig,
    state: dict[str, Any],
    text: str,
    text_tokens: int,
) -> None:
    # float16 keeps three more bits of every weight than bfloat16 in the same bytes; no weight is near its limits.
    half = type(model)(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(out)
    tok.save_pretrained(out)
    facts = {
        "config": asdict(cfg), "parameters": model.num_parameters(), "text_digest": text, "text_tokens": text_tokens,
        **state,
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(facts))


def write_profile(folder: Path) -> None:
    """Calibrate the lab model in `folder` and write `profile/profile.safetensors`. Raises UnsupportedModelError for LRKV `exact`
    and MLA.

    Statistics are of eight windows of the tuning text. The forecast is trained on that text and on samples of the tasks; a model with a
    shorter context than these has none.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    text, tok, context = tuning_text(), load_tokenizer(folder), model.config.max_position_embeddings
    ids = tok.encode(text, add_special_tokens=False)
    windows = [torch.tensor([[BOS, *ids[i * (context - 1) : (i + 1) * (context - 1)]]]) for i in range(8)]
    profile = calibrate(model, windows, source=f"tuning text {digest(text)}")
    if context >= LENGTH:
        profile = add_forecast(profile, model, calibration_batches(tok, text, samples=128), f"tuning text and {', '.join(TASKS)}")
    (folder / "profile").mkdir(exist_ok=True)  # in a folder of its own: some load whatever tensors lie beside a model's
    profile.save(folder / "profile" / "profile.safetensors")
