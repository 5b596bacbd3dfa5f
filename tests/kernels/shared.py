"""Long kernels, again and again for some seconds: `python tests/kernels/shared.py` prints {kernel: hashes of its results} as JSON.

Two such processes share a GPU by turns: a kernel that runs longer than its turn is stopped in the middle, and goes on later. A block
of threads has to run for milliseconds for that, so the past is long. `test_shared.py` compares one process with two.
"""

import hashlib
import json
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kvstack.bench import own, prefill
from kvstack.bench.problem import Problem
from kvstack.kernels.decode import Body, decode
from kvstack.kernels.reference import Shape

LENGTH = 640 * 1024
SECONDS = 2.0
CHUNK = Problem((LENGTH,), heads=8, kv_heads=1, head_dim=128, queries=2048)
STEP = Problem((LENGTH, LENGTH), heads=256, kv_heads=64, head_dim=128)


def call(problem: Problem, bits: str, head_dim: int) -> Callable[[], Tensor]:
    """Attention of a random problem, by the path that the device takes."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    f = own.page_format(bits, head_dim)
    body = Body.of(own.random_pages(f, problem, device), *(own.codec(x, head_dim, device) for x in (f.k, f.v)))
    q = torch.randn(problem.batch, problem.heads, problem.queries, head_dim, device=device, dtype=torch.bfloat16)
    shape = Shape(head_dim**-0.5)
    if problem.queries == 1:
        return partial(decode, q, body, None, shape)
    return partial(prefill.attend, q, body, shape)


def hashes(run: Callable[[], Tensor]) -> list[str]:
    """Of all results within `SECONDS`."""
    found, end = set(), time.monotonic() + SECONDS
    while time.monotonic() < end:
        found.add(hashlib.sha256(run().cpu().view(torch.uint8).numpy()).hexdigest())
    return sorted(found)


if __name__ == "__main__":
    todo = [("decode", STEP, "4", 128)] + [("prefill", CHUNK, bits, d) for bits, d in (("4", 128), ("4", 256), ("8", 256))]
    print(json.dumps({f"{what} {bits} of {d}": hashes(call(problem, bits, d)) for what, problem, bits, d in todo}))
