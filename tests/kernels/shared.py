"""Long kernels, again and again for some seconds: `python tests/kernels/shared.py` prints {kernel: hashes of its results} as JSON.

Two such processes share a GPU by turns: a kernel that runs longer than its turn is stopped in the middle, and goes on later. A block
of threads has to run for milliseconds for that, so the past is long. `test_shared.py` compares one process with two.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kvstack.bench import own, prefill
from kvstack.bench.contender import Contender
from kvstack.bench.problem import Problem

LENGTH = 640 * 1024
SECONDS = 2.0
CHUNK = Problem((LENGTH,), heads=8, kv_heads=1, head_dim=128, queries=2048)
STEP = Problem((LENGTH, LENGTH), heads=256, kv_heads=64, head_dim=128)


def call(c: Contender, problem: Problem) -> Callable[[], Tensor]:
    """Attention of a problem that is the same in every process."""
    torch.manual_seed(0)
    return c.build(problem, torch.device("cuda")).call


def hashes(run: Callable[[], Tensor]) -> list[str]:
    """Of all results within `SECONDS`."""
    found, end = set(), time.monotonic() + SECONDS
    while time.monotonic() < end:
        found.add(hashlib.sha256(run().cpu().contiguous().view(torch.uint8).numpy()).hexdigest())
    return sorted(found)


if __name__ == "__main__":
    todo = {f"decode {c.bits}": (c, STEP) for c in own.contenders("4", 128)}
    for d, bits in ((128, "4"), (256, "4, 8")):
        todo |= {f"prefill {c.bits} of {d}": (c, replace(CHUNK, head_dim=d)) for c in prefill.contenders(bits, d)}
    print(json.dumps({what: hashes(call(c, problem)) for what, (c, problem) in todo.items()}))
