"""Contenders on trial: each is checked, then timed, whatever it is that they compute, and ours are not timed at all on a red check.

What is found of a contender on a problem is a row, `{us, nbytes, calls, replays, detail, error}` (see `timing` and `contender`), or
`{reason}` of one that did not run, with its error if it was checked. A benchmark makes the rows of its results file of these.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from kvstack.bench.contender import NAME, Contender
from kvstack.bench.problem import Problem
from kvstack.bench.timing import copies, time_calls
from kvstack.errors import KVStackError

Row = dict[str, Any]
Progress = Callable[[int, int], object]


def gpu() -> torch.device:
    """The device to measure on. Raises KVStackError without a GPU."""
    if not torch.cuda.is_available():
        raise KVStackError(
            "There is no CUDA GPU here, and nothing else is measured. Run it on a machine with one; `kvstack doctor` says what is seen."
        )
    return torch.device("cuda")


def trials(
    problems: Sequence[Problem], contenders: Sequence[Contender], device: torch.device, replays: int, progress: Progress
) -> Iterator[tuple[Problem, list[tuple[Contender, Row]]]]:
    """Every problem with what is found of every contender.

    Raises KVStackError when ours is wrong on a small problem: then there is nothing worth timing.
    """
    torch.manual_seed(0)
    pairs = dict.fromkeys((c, c.small(p)) for p in problems for c in contenders)  # problems may have their small one in common
    results = {pair: check(*pair, device) for pair in pairs}
    for i, problem in enumerate(problems):
        group = []
        for c in contenders:
            result = results[c, c.small(problem)]
            group.append((c, result if "reason" in result else result | _time(c, problem, device, replays)))
            torch.cuda.empty_cache()
            progress(i * len(contenders) + len(group), len(problems) * len(contenders))
        yield problem, group


def check(c: Contender, problem: Problem, device: torch.device) -> Row:
    """The error on a small problem, or the reason why the contender cannot be timed."""
    if reason := c.missing(c.small(problem)):
        return {"reason": reason}
    try:
        error = c.error(problem, device)
    except Exception as e:
        if c.name == NAME:
            raise
        return {"reason": _first_line(e)}
    if error <= c.tolerance:  # false for NaN
        return {"error": error}
    wrong = f"its output is wrong by {error:.1e}, with {c.tolerance:.0e} allowed"
    if c.name == NAME:
        raise KVStackError(f"{c.name} with {c.bits} bits was not timed: {wrong}. Please report this with `kvstack doctor --json`.")
    return {"reason": wrong}


def _time(c: Contender, problem: Problem, device: torch.device, replays: int) -> Row:
    """The time of one contender, or the reason why there is none."""
    if reason := c.missing(problem):
        return {"reason": reason}
    try:
        runs = [c.build(problem, device)]
        runs += [c.build(problem, device) for _ in range(copies(runs[0].held or runs[0].nbytes, device) - 1)]
        timing = time_calls([run.call for run in runs], replays)
    except torch.OutOfMemoryError:
        return {"reason": "there is not enough GPU memory"}
    except Exception as e:
        if c.name == NAME:
            raise
        return {"reason": _first_line(e)}
    how = {"calls": timing.calls, "replays": timing.replays, "detail": runs[0].detail}
    return {"us": timing.us, "nbytes": runs[0].nbytes, **how}


def only(found: Row, keys: Iterable[str]) -> Row:
    """The fields `keys` of a row, None where they were not found, and the reason if there is one."""
    return {key: found.get(key) for key in keys} | {key: found[key] for key in ("reason",) if key in found}


def bandwidth(found: Row, copy: float) -> Row:
    """`found` with its bandwidth, `tb_s`, and that in units of a device copy's, `of_copy`, if it was timed."""
    if "us" not in found:
        return found
    tb_s = found["nbytes"] / found["us"] / 1e6
    return found | {"tb_s": tb_s, "of_copy": tb_s / copy}


def versus(rows: Sequence[Row], kinds: Sequence[str], time: str) -> list[Row]:
    """The rows of one problem with `vs_KIND`: the time of the fastest peer with such bits over the row's, None when none ran."""
    best = {kind: min((r[time] for r in rows if r["name"] != NAME and r["bits"] == kind and r[time]), default=None) for kind in kinds}
    return [r | {f"vs_{kind}": t / r[time] if t and r[time] else None for kind, t in best.items()} for r in rows]


def _first_line(e: Exception) -> str:
    """What a peer says when it fails, which is its business and not an error of ours."""
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
