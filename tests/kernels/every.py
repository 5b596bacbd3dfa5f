"""Every kernel on small problems of a GPU, checked as `kvstack bench` checks it: `python tests/kernels/every.py [PART/PARTS]`.

Part 0/8 takes every eighth problem, so that several processes can share them out. `sanitize.py` runs them all under a tool.
"""

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvstack.bench import encode, lowrank, own, prefill, trial
from kvstack.bench.problem import Problem
from kvstack.errors import KVStackError
from kvstack.kernels.compact import compact
from kvstack.kernels.decode import Body, Exact, Path, choose
from kvstack.kernels.decode import decode as attend
from kvstack.kernels.linear import score_pages
from kvstack.kernels.pages import Pages
from kvstack.kernels.reference import Shape
from kvstack.kernels.score import score_linear
from kvstack.kernels.select import select
from kvstack.rope import Rope

STEP = Problem((300, 1), heads=4, kv_heads=1, head_dim=128)
CHUNK = Problem((300, 1), heads=4, kv_heads=1, head_dim=128, queries=70)
LENGTHS = (1, 127, 300)


def portable(q: Tensor, body: Body, shape: Shape) -> Tensor:
    return attend(q, body, None, shape, path=Path("portable", ""))


def portable_chunk(q: Tensor, body: Body, shape: Shape) -> Tensor:
    return prefill.attend(q, body, shape, Path("portable", ""))


def near(device: torch.device) -> None:
    """Exact tokens, some of which nobody sees, by a path without a body."""
    q, (k, v) = torch.randn(2, 8, 3, 128, device=device), torch.randn(2, 2, 2, 140, 128, device=device)
    seen = torch.rand(2, 3, 140, device=device) < 0.5
    got, want = (attend(q, None, Exact(k, v, seen), Shape(0.1), path=p) for p in (choose(device), Path("reference", "")))
    assert (got - want).norm() <= 1e-4 * want.norm()


def again(device: torch.device) -> None:
    """Logits that grow from the last page to the first until sums overflow: the pages are done a second time."""
    body = Body.of(own.random_pages(own.page_format("4", 128), CHUNK, device), *(own.codec(4, 128, device) for _ in "kv"))
    q = 1e4 * torch.randn(CHUNK.batch, CHUNK.heads, CHUNK.queries, 128, device=device)
    assert prefill.attend(q, body, Shape(CHUNK.scale)).isfinite().all()


def evict(bits: int, head_dim: int, device: torch.device) -> None:
    """Scores by both kernels, a choice by each order, and compaction, as without a GPU."""
    here, cpu = own.random_pages(own.page_format(str(bits), head_dim), STEP, device), torch.device("cpu")
    there = Pages(here.format, here.pool.cpu(), here.table.cpu(), here.lengths.cpu())
    w, c = torch.randn(STEP.batch, 1, STEP.heads, head_dim), torch.rand(1, STEP.heads, head_dim // 2)
    want = score_linear(there, own.codec(bits, head_dim, cpu), Rope.half(head_dim), w, c)
    for scores in (score_linear, score_pages):
        got = scores(here, own.codec(bits, head_dim, device), Rope.half(head_dim, device=device), w.to(device), c.to(device)).cpu()
        assert (got - want).norm() <= 1e-3 * want.norm()
    for ordered in (False, True):
        keep, counts = select(want, there.lengths, 100, True, ordered), there.lengths.clamp_max(100)
        assert torch.equal(select(want.to(device), here.lengths, 100, True, ordered).cpu()[0], keep[0])
        compact(there, keep, counts, ordered)
        compact(here, keep.to(device), counts.to(device), ordered)
        assert torch.equal(here.pool.cpu(), there.pool)


def main(part: str = "0/1") -> None:
    torch.manual_seed(0)
    first, step = map(int, part.split("/"))
    device = torch.device("cuda")
    own.RAGGED = LENGTHS
    todo: list[tuple[str, Any]] = []
    for d, bits in ((128, "4, 3, 2, 8, k4v2, 16"), (64, "4"), (256, "4, 8")):
        p = replace(STEP, head_dim=d)
        todo += [(f"decode {c.bits} of {d}", partial(trial.check, c, p, device)) for c in own.contenders(bits, d)]
    for d, bits in ((128, "4, 3, 2, 8"), (64, "4"), (256, "4, 8")):
        p = replace(CHUNK, head_dim=d)
        todo += [(f"prefill {c.bits} of {d}", partial(trial.check, c, p, device)) for c in prefill.contenders(bits, d)]
    for what, p, run in (("decode", STEP, portable), ("prefill", CHUNK, portable_chunk)):
        todo += [(f"portable {what} {c.bits}", partial(trial.check, c, p, device)) for c in own.contenders("4, 8", 128, run)]
    for p in (STEP, replace(STEP, lengths=(20, 1)), replace(STEP, lengths=(5, 1))):
        todo += [(f"encode {c.bits}", partial(trial.check, c, p, device)) for c in encode.contenders("4, 3, 2, 8, 4+search", 128)]
    for d, bits in ((128, (2, 3, 4, 8, 16)), (64, (4,)), (256, (4,))):
        todo += [(f"evict {b} of {d}", partial(evict, b, d, device)) for b in bits]
    for p in (replace(STEP, heads=8, kv_heads=8), replace(STEP, heads=6, kv_heads=6, head_dim=64)):
        few = (replace(c, lengths=LENGTHS) for c in lowrank.contenders(ranks=(60,)))
        todo += [(f"low rank {c.bits} of {p.head_dim}", partial(trial.check, c, p, device)) for c in few]
    wrong = []
    for what, check in todo[first::step]:
        try:
            print(what, check(), flush=True)
        except KVStackError as e:  # ours is wrong; a tool shall see the others, too
            wrong.append(f"{what}: {e}")
    near(device)
    again(device)
    torch.cuda.synchronize()
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main(*sys.argv[1:])
