"""Prefill measured: a chunk of new queries over a long past, every contender on one problem, as rows of a results file.

    {T, N, Hq, Hkv, D, name, bits, ms, tflops, vs_bf16, error, detail}

T new tokens see all N tokens of the past, without a mask, in one row. Ours read a past in pages of codes, peers one in bf16 or FP8.
What the new tokens see of each other is exact and the same for all, and not measured.

ms: median milliseconds of one layer, in a CUDA graph (`timing`). tflops: 4 Hq T N D operations over that time. vs_bf16: time of the
fastest peer in bf16 over `ms`, None when none ran. error: of the check (`contender`). A contender that did not run has None for all of
these, and a `reason`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstack.bench import own
from kvstack.bench.contender import Contender
from kvstack.bench.problem import Problem
from kvstack.bench.report import Layout, ratio
from kvstack.bench.trial import Progress, Row, only, trials, versus
from kvstack.errors import BadInputError
from kvstack.kernels.decode import Body, Path
from kvstack.kernels.past import attend_past
from kvstack.kernels.reference import Shape

MEASURED = ("ms", "tflops", "vs_bf16", "error", "detail")
LAYOUT = Layout(
    by=("T", "N"),
    time="ms",
    title=lambda r: f"{r['T']:,} new tokens over {r['N']:,}, {r['Hq']} query heads, {r['Hkv']} KV heads of {r['D']}",
    columns={
        "contender": lambda r: r["name"],
        "bits": lambda r: r["bits"],
        "ms": lambda r: f"{r['ms']:,.3f}",
        "TFLOP/s": lambda r: f"{r['tflops']:,.0f}",
        "x best bf16": lambda r: ratio(r["vs_bf16"]),
        "error": lambda r: f"{r['error']:.1e}",
        "what ran": lambda r: r["detail"],
    },
)


def contenders(bits: str, head_dim: int) -> list[Contender]:
    """Ours, for a text such as `4, 3, k4v2, 8`. Raises BadInputError or RecipeError for what no prefill kernel reads."""
    for word in own.words(bits):
        f = own.page_format(word, head_dim)
        if max(f.k, f.v) > 8:
            raise BadInputError(
                f"Prefill kernels read codes of 2 to 8 bits, not {word}. What is not compressed is what the peers read."
            )
    return own.contenders(bits, head_dim, attend)


def attend(q: Tensor, body: Body, shape: Shape, path: Path | None = None) -> Tensor:
    """What is measured: all of a layer's attention over its past."""
    return attend_past(q, body, shape, path, q.dtype).out


def measure(problem: Problem, contenders: Sequence[Contender], device: torch.device, replays: int, progress: Progress) -> list[Row]:
    """The rows of all contenders. Raises KVStackError as `trials` does."""
    ((_, group),) = trials([problem], contenders, device, replays, progress)
    return compared([row(problem, c, found) for c, found in group])


def row(problem: Problem, contender: Contender, found: Row) -> Row:
    """One row; what was not found is None."""
    p, c = problem, contender
    what = {"T": p.queries, "N": p.tokens, "Hq": p.heads, "Hkv": p.kv_heads, "D": p.head_dim, "name": c.name, "bits": c.bits}
    if "us" in found:
        work = 4 * p.heads * p.queries * sum(p.lengths) * p.head_dim
        found = found | {"ms": found["us"] / 1e3, "tflops": work / found["us"] / 1e6}
    return what | only(found, MEASURED)


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows of one problem with `vs_bf16`."""
    return versus(rows, ("bf16",), "ms")
