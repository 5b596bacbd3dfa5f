"""Decode attention over low-rank records (LRKV) measured, beside multi-head attention (MHA) in bf16 of the same shape.

    {kernel, variant, B, N, H, D, rank, bytes, us, tb_per_s, speedup_over_best_mha, error, detail}

us: median microseconds of one decode step of one layer, in a CUDA graph (`timing`): from the query to the output of every head, for
low-rank records with both products with up-projections. variant: "nope" or "exact" residuals (`kernels.lowrank_reference`), "mha" of
peers, whose rank is None. bytes: of K and V as stored, tb_per_s: over that time. speedup_over_best_mha: time of the fastest peer over
`us`, None when none ran. error: of the check, which for low-rank records is against the torch twin. A contender that did not run has
None for all of these, and a `reason`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kvstack.bench import peers
from kvstack.bench.contender import NAME, Contender, Run, not_capable
from kvstack.bench.problem import Problem, random_query
from kvstack.bench.trial import Progress, Row, bandwidth, only, trials, versus
from kvstack.kernels import lowrank_reference
from kvstack.kernels.decode import choose
from kvstack.kernels.lowrank import lowrank_decode
from kvstack.kernels.lowrank_reference import Rebuild
from kvstack.rope import Rope

VARIANTS = ("nope", "exact")
RANKS = (56, 60, 64)
RAGGED = (1, 31, 33, 1000, 3000)


def contenders(variants: Sequence[str] = VARIANTS, ranks: Sequence[int] = RANKS) -> list[Contender]:
    """Ours; the variant and the rank are their `bits`."""
    return [Contender(NAME, f"{v} {r}", 1e-2, _missing, partial(_build, v, r), RAGGED) for v in variants for r in ranks]


def mha() -> list[Contender]:
    """All peers that read K and V in bf16."""
    return [c for c in peers.select(", ".join(peers.PEERS)) if c.bits == "bf16"]


def measure(
    problems: Sequence[Problem], found: Sequence[Contender], device: torch.device, replays: int, progress: Progress
) -> list[Row]:
    """The rows of all contenders on all problems, which have as many KV heads as heads. Raises KVStackError as `trials` does."""
    assert all(p.heads == p.kv_heads for p in problems), "every head has keys of its own"
    return [r for p, group in trials(problems, found, device, replays, progress) for r in rows(p, group)]


def rows(problem: Problem, group: Sequence[tuple[Contender, Row]]) -> list[Row]:
    """The rows of one problem, of what was found of every contender."""
    timed = versus([{"name": c.name, "bits": c.bits, "us": found.get("us")} for c, found in group], ("bf16",), "us")
    return [_row(problem, c, found, t["vs_bf16"]) for (c, found), t in zip(group, timed, strict=True)]


def _row(p: Problem, c: Contender, found: Row, speedup: float | None) -> Row:
    variant, rank = c.bits.split() if c.name == NAME else ("mha", None)
    what = {
        "kernel": c.name,
        "variant": variant,
        "B": p.batch,
        "N": p.tokens,
        "H": p.heads,
        "D": p.head_dim,
        "rank": rank and int(rank),
    }
    found = bandwidth(found, 1.0)
    measured = {"bytes": found.get("nbytes"), "us": found.get("us"), "tb_per_s": found.get("tb_s"), "speedup_over_best_mha": speedup}
    return what | measured | only(found, ("error", "detail"))


def _missing(_: Problem) -> str | None:
    if reason := not_capable(least=(8, 0)):
        return reason
    path = choose(torch.device("cuda"))
    return None if path.name == "hopper" else path.reason


def _build(variant: str, rank: int, problem: Problem, device: torch.device) -> Run:
    b, h, d, n = problem.batch, problem.heads, problem.head_dim, problem.tokens
    q, lengths = random_query(problem, device), torch.tensor(problem.lengths, dtype=torch.int32, device=device)
    keys, values = (torch.randn(b, n, d + h * rank, device=device, dtype=problem.dtype) for _ in "kv")
    behind = torch.arange(n, device=device) >= lengths[:, None]
    for records in (keys, values):
        records.masked_fill_(behind[..., None], torch.nan)
    up_k, up_v = (torch.randn(h, d, rank, device=device, dtype=problem.dtype).mul_(rank**-0.5) for _ in "kv")
    phase = Rope.half(d, device=device).phase(torch.arange(n, device=device))
    rebuild = Rebuild(up_k, phase.real.contiguous(), phase.imag.contiguous(), torch.zeros_like(lengths))

    def attend(decode: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        residual = rebuild if variant == "exact" else torch.matmul(q[:, :, None], up_k).squeeze(2)
        shared, latent = decode(q[:, :, None], residual, keys, values, lengths, problem.scale)
        return shared + torch.matmul(up_v, latent[..., None]).squeeze(3)

    nbytes = 2 * sum(problem.lengths) * keys[0, 0].nbytes
    return Run(partial(attend, lowrank_decode), partial(attend, lowrank_reference.attend), nbytes, "low-rank kernel")
