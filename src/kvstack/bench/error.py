"""Errors measured: a decode step over pages against float64 over what the same codes stand for, as rows of a results file.

    {N, Hq, Hkv, D, name, bits, error}

One row of N tokens, up to a million of them, with random queries and random codes. error: RMS of the difference over RMS of the output.
Codes are the same on both sides, so it is the kernel's own error; what the codes cost is the business of `kvstack compare`.
What did not run has None for its error, and a `reason`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvstack.bench.contender import Contender
from kvstack.bench.problem import Problem
from kvstack.bench.report import Layout
from kvstack.bench.trial import Progress, Row, check, only

WRONG = 1e-2  # an error beyond it is no rounding
TOKENS = (1 << 12, 1 << 14, 1 << 17, 1 << 20)
HEADS, KV_HEADS = 32, 8  # a ratio of two RMS over few heads depends on chance
LAYOUT = Layout(
    by=("N", "D"),
    time="error",
    title=lambda r: f"{r['N']:,} tokens, {r['Hq']} query heads, {r['Hkv']} KV heads of {r['D']}",
    columns={"bits": lambda r: r["bits"], "error": lambda r: f"{r['error']:.1e}"},
)


def measure(
    tokens: Sequence[int], head_dim: int, contenders: Sequence[Contender], device: torch.device, progress: Progress
) -> list[Row]:
    """The rows of all contenders at all lengths. Raises KVStackError when an error is beyond `WRONG`."""
    torch.manual_seed(0)
    rows = []
    for n in tokens:
        problem = Problem((n,), HEADS, KV_HEADS, head_dim)
        for c in contenders:
            found = check(replace(c, lengths=(n,), tolerance=WRONG), problem, device)
            what = {"N": n, "Hq": HEADS, "Hkv": KV_HEADS, "D": head_dim, "name": c.name, "bits": c.bits}
            rows.append(what | only(found, ("error",)))
            torch.cuda.empty_cache()
            progress(len(rows), len(tokens) * len(contenders))
    return rows
