"""Decode attention measured: every contender on every problem, as rows of a results file.

    {B, N, Hq, Hkv, D, name, bits, us, tb_s, of_copy, vs_bf16, vs_fp8, calls, replays, error, detail}

us: median microseconds of one decode step of one layer, in a CUDA graph (`timing`). tb_s: bytes of K and V as stored over that time;
of_copy: in units of a device copy's bandwidth. vs_bf16, vs_fp8: time of the fastest peer in bf16 and in FP8 over `us`, None when none
ran. calls: in one graph. error: of the check (`contender`). A contender that did not run has None for all of these, and a `reason`.
"""

from collections.abc import Sequence

import torch

from kvstack.bench.contender import Contender
from kvstack.bench.problem import Problem
from kvstack.bench.timing import copy_tb_s
from kvstack.bench.trial import Progress, Row, bandwidth, only, trials, versus

MEASURED = ("us", "tb_s", "of_copy", "vs_bf16", "vs_fp8", "calls", "replays", "error", "detail")
SHAPES = ("1x131072", "8x32768", "32x32768", "64x8192", "256x2048", "1x4096")


def measure(
    problems: Sequence[Problem], contenders: Sequence[Contender], device: torch.device, replays: int, progress: Progress
) -> list[Row]:
    """The rows of all contenders on all problems, which have the same heads. Raises KVStackError as `trials` does."""
    copy = copy_tb_s(device)
    rows: list[Row] = []
    for problem, group in trials(problems, contenders, device, replays, progress):
        rows += compared([row(problem, c, bandwidth(found, copy)) for c, found in group])
    return rows


def row(problem: Problem, contender: Contender, found: Row) -> Row:
    """One row; what was not found is None."""
    p, c = problem, contender
    what = {"B": p.batch, "N": p.tokens, "Hq": p.heads, "Hkv": p.kv_heads, "D": p.head_dim, "name": c.name, "bits": c.bits}
    return what | only(found, MEASURED)


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows of one problem with `vs_bf16` and `vs_fp8`."""
    return versus(rows, ("bf16", "fp8"), "us")
