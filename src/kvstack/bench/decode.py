"""Decode attention measured: every contender on every problem, as rows of a results file.

    {B, N, Hq, Hkv, D, name, bits, us, tb_s, of_copy, vs_bf16, vs_fp8, calls, replays, error, detail}

us: median microseconds of one decode step of one layer, in a CUDA graph (`timing`). tb_s: bytes of K and V as stored over that time;
of_copy: in units of a device copy's bandwidth. vs_bf16, vs_fp8: time of the fastest peer in bf16 and in FP8 over `us`, None when none
ran. calls: in one graph. error: of the check (`contender`). A contender that did not run has None for all of these, and a `reason`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvstack.bench import own
from kvstack.bench.contender import Contender
from kvstack.bench.problem import Problem
from kvstack.bench.timing import copies, copy_tb_s, time_calls
from kvstack.errors import KVStackError

Row = dict[str, Any]
MEASURED = ("us", "tb_s", "of_copy", "vs_bf16", "vs_fp8", "calls", "replays", "error", "detail")
SHAPES = ("1x131072", "8x32768", "32x32768", "64x8192", "256x2048", "1x4096")


def gpu() -> torch.device:
    """The device to measure on. Raises KVStackError without a GPU."""
    if not torch.cuda.is_available():
        raise KVStackError(
            "There is no CUDA GPU here, and nothing else is measured. Run it on a machine with one; `kvstack doctor` says what is seen."
        )
    return torch.device("cuda")


def measure(
    problems: Sequence[Problem],
    contenders: Sequence[Contender],
    device: torch.device,
    replays: int,
    progress: Callable[[int, int], object],
) -> list[Row]:
    """The rows of all contenders on all problems, which have the same heads.

    Raises KVStackError when our own kernel is wrong on a small problem: then there is nothing worth timing.
    """
    torch.manual_seed(0)
    copy = copy_tb_s(device)
    checked = [_check(c, problems[0], device) for c in contenders]
    rows: list[Row] = []
    for problem in problems:
        group = []
        for c, result in zip(contenders, checked, strict=True):
            found = result if "reason" in result else result | _time(c, problem, device, replays, copy)
            group.append(row(problem, c, found))
            torch.cuda.empty_cache()
            progress(len(rows) + len(group), len(problems) * len(contenders))
        rows += compared(group)
    return rows


def row(problem: Problem, contender: Contender, found: Row) -> Row:
    """One row; what was not found is None."""
    p, c = problem, contender
    what = {"B": p.batch, "N": p.tokens, "Hq": p.heads, "Hkv": p.kv_heads, "D": p.head_dim, "name": c.name, "bits": c.bits}
    return what | dict.fromkeys(MEASURED) | found


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows of one problem with `vs_bf16` and `vs_fp8`."""
    best = {
        kind: min((r["us"] for r in rows if r["name"] != own.NAME and r["bits"] == kind and r["us"]), default=None)
        for kind in ("bf16", "fp8")
    }
    ratios = {f"vs_{kind}": us for kind, us in best.items()}
    return [r | {key: us / r["us"] if us and r["us"] else None for key, us in ratios.items()} for r in rows]


def _check(c: Contender, problem: Problem, device: torch.device) -> Row:
    """The error on a small problem, or the reason why the contender cannot be timed."""
    if reason := c.missing(problem.like(c.lengths)):
        return {"reason": reason}
    try:
        error = c.error(problem, device)
    except Exception as e:
        if c.name == own.NAME:
            raise
        return {"reason": _first_line(e)}
    if error <= c.tolerance:  # false for NaN
        return {"error": error}
    wrong = f"its output is wrong by {error:.1e} of its size, with {c.tolerance:.0e} allowed"
    if c.name == own.NAME:
        raise KVStackError(f"{c.name} with {c.bits} bits was not timed: {wrong}. Please report this with `kvstack doctor --json`.")
    return {"reason": wrong}


def _time(c: Contender, problem: Problem, device: torch.device, replays: int, copy: float) -> Row:
    """The times of one row, or the reason why there are none."""
    if reason := c.missing(problem):
        return {"reason": reason}
    try:
        runs = [c.build(problem, device)]
        runs += [c.build(problem, device) for _ in range(copies(runs[0].nbytes, device) - 1)]
        timing = time_calls([run.call for run in runs], replays)
    except torch.OutOfMemoryError:
        return {"reason": "there is not enough GPU memory"}
    except Exception as e:
        if c.name == own.NAME:
            raise
        return {"reason": _first_line(e)}
    tb_s = runs[0].nbytes / timing.us / 1e6
    how = {"calls": timing.calls, "replays": timing.replays, "detail": runs[0].detail}
    return {"us": timing.us, "tb_s": tb_s, "of_copy": tb_s / copy, **how}


def _first_line(e: Exception) -> str:
    """What a peer says when it fails, which is its business and not an error of ours."""
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
