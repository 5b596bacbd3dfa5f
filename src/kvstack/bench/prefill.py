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
from kvstack.kernels.decode import LOG2_E, Body, Path, decode
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
    return own.contenders(bits, head_dim, attend_past)


def attend_past(q: Tensor, body: Body, shape: Shape, path: Path | None = None) -> Tensor:
    """Attention of `q [B, Hq, T, D]` over all tokens of a body: the queries rotated, attention over pages, the output rotated back.

    path: of `choose`; None for the body's own.
    """
    path = path or body.path
    if path.name == "reference":
        return decode(q, body, None, shape, path=path)
    from kvstack.kernels import prefill, prefill_hopper  # these need Triton
    from kvstack.kernels.merge import merge_partials
    from kvstack.kernels.rotate import project

    heads = body.pages.pool.shape[1]
    rotated, bias = project(q, body.signs[0], body.key.centre, shape.scale * LOG2_E, heads)  # [B * H, R, D], [B * H, R]
    part, lse2 = torch.empty_like(rotated)[:, None], torch.empty_like(bias)[:, None]
    if path.name == "hopper":
        prefill_hopper.prefill_pages(rotated, bias, body.pages, *body.tables, part, lse2, shape.softcap)
    else:
        prefill.prefill_pages(rotated, bias, body.pages, *body.levels, part, lse2, shape.softcap)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # One program that takes all pages in turn leaves one partial for every head of every row, in this order.
    merge_partials(out, (part, lse2), None, body.cum, 1, body.signs[1], body.value.centre, None, heads)
    return out


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
