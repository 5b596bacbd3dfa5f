"""Distil a converted decoder: bring its logits back to those of the model that it came from, on text.

The loss is the mean over tokens of KL(teacher || student); all parameters of the student learn, by AdamW. The learning rate warms up
over a tenth of the steps, stays, and falls as 1 - sqrt over the last sixth (Hägele et al. 2024, arXiv:2405.18392). Which windows of the
text a step sees, its number and the seed decide (`lab.corpus`): students of one seed see the same tokens in the same order.

One process, minutes; it keeps no checkpoint.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from kvstack.errors import BadInputError
from kvstack.lab.corpus import as_tensor, places, windows
from kvstack.lab.optim import schedule
from kvstack.lab.pretrain import BACKENDS

WARMUP, DECAY = 1 / 10, 1 / 6  # shares of the steps
AT_ONCE = 8192  # tokens whose logits are held at a time


@dataclass(frozen=True)
class DistilConfig:
    """tokens: of the whole run. batch: tokens of a step. length: of a window. every: steps between rows of the curve.

    Raises BadInputError when these make no step.
    """

    tokens: int
    batch: int = 32_768
    length: int = 2048
    lr: float = 1e-4
    every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that there is something to do."""
        if not self.rows or not self.steps:
            raise BadInputError(
                f"{self.tokens:,} tokens in steps of {self.batch:,} and windows of {self.length:,} make no step. "
                "Give more tokens, or smaller steps of at least a window."
            )

    @property
    def rows(self) -> int:
        """Windows of a step."""
        return self.batch // self.length

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.tokens // self.batch

    def factor(self, step: int) -> float:
        """Factor on the learning rate at a step."""
        left = (self.steps - step) / (self.steps * DECAY)
        return min(1.0, (step + 1) / (self.steps * WARMUP)) * (1 - math.sqrt(max(0.0, 1 - left)))


def divergence(student: Any, teacher: Any, x: Tensor) -> Tensor:
    """KL(teacher || student) of the next token after each of `x [B, T]`, nats: the mean. Gradients reach the student alone."""
    with torch.no_grad():
        wanted = teacher(input_ids=x, use_cache=False).logits.float().log_softmax(-1)
    found = student(input_ids=x, use_cache=False).logits.float().log_softmax(-1)
    return F.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")


def distil(
    student: Any, teacher: Any, tokens: NDArray[np.uint16], cfg: DistilConfig, report: Callable[[dict[str, Any]], None] = print
) -> list[dict[str, Any]]:
    """Train `student` in place on `tokens [N]`; returns the curve: rows of step, tokens, kl (mean since the last row) and seconds.

    student: float32. teacher: on the same device, with the same vocabulary. On a GPU both run in bf16 autocast. report: called with the
    rows. Raises BadInputError for a text shorter than a window, and when the divergence is not finite.
    """
    if len(tokens) <= cfg.length:
        raise BadInputError(f"The text has {len(tokens)} tokens, too few for a window of {cfg.length}. Give a shorter length.")
    device = student.device
    params = [p for p in student.parameters() if p.numel()]  # a residual of rank 0 has nothing to learn
    opt = torch.optim.AdamW(
        [{"params": params, "initial_lr": cfg.lr}], lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
    )
    train, curve, since, began = as_tensor(tokens, device), list[dict[str, Any]](), list[Tensor](), time.monotonic()
    for step in range(cfg.steps):
        schedule([opt], cfg.factor(step))
        x = windows(train, places(cfg.seed, step, cfg.rows, len(train), cfg.length), cfg.length)[:, :-1]
        for part in x.split(max(1, AT_ONCE // cfg.length)):
            with sdpa_kernel(BACKENDS, set_priority=True):
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    kl = divergence(student, teacher, part) * (len(part) / cfg.rows)
                kl.backward()
            since.append(kl.detach())
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        student.zero_grad(set_to_none=True)
        if (step + 1) % cfg.every == 0 or step + 1 == cfg.steps:
            steps = step + 1 - (curve[-1]["step"] if curve else 0)
            row = {
                "step": step + 1, "tokens": (step + 1) * x.numel(), "kl": torch.stack(since).sum().item() / steps,
                "seconds": time.monotonic() - began,
            }  # fmt: skip
            since = []
            if not math.isfinite(row["kl"]):
                raise BadInputError("The divergence is not finite. Lower the learning rate.")
            curve.append(row)
            report(row)
    return curve
