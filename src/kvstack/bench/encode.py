"""Encoding measured: 16-bit K and V of new tokens into pages of codes, as rows of a results file.

    {B, n, H, D, name, bits, us, tb_s, of_copy, calls, replays, error}

n new tokens in each of B rows, as a model gives them: `[B, H, n, D]`, with the heads of a token together in memory. Row b begins at
token 77 b % 128 of a page: a single row fills whole pages, and a decode step (n = 1) puts its bits between those of other tokens.

bits: of the pages; with `+search` the codecs try nine scales a vector. us: median microseconds for K and V of one layer, in a CUDA
graph (`timing`). tb_s: bytes of K and V in 16 bits and of their codes and scales over that time; of_copy: in units of a device copy's
bandwidth. error: share of codes that are not the codec's own, see `difference`. `torch` is the codecs themselves, which write no pages:
in a graph too, but one kernel an operation. What did not run has None for all that is measured, and a `reason`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kvstack.bench import own
from kvstack.bench.contender import NAME, Contender, Run, not_capable
from kvstack.bench.problem import Problem, random_tokens
from kvstack.bench.report import Layout
from kvstack.bench.timing import copy_tb_s
from kvstack.bench.trial import Progress, Row, bandwidth, only, trials
from kvstack.codecs.base import Codec
from kvstack.errors import BadInputError, KVStackError
from kvstack.kernels.append import append
from kvstack.kernels.codes import to_page
from kvstack.kernels.pages import PAGE, Format, Pages, read, write

MEASURED = ("us", "tb_s", "of_copy", "calls", "replays", "error")
SHAPES = ("1x32768", "32x1", "256x1")
BITS = "4, 3, 2, k4v2, 8, 4+search"
OFFSET = 77  # tokens that a row's first page has less room for than that of the row before
CHECKED = 2000  # tokens of the longest row of a check
LOOSE = 48  # last bits that the scale of a vector with another code may be off, about a third: so far apart are trials of a search
TOLERANCE = 1e-3  # share of codes that may be one level off: of coordinates that lie on an edge but for rounding
LAYOUT = Layout(
    by=("B", "n"),
    time="us",
    title=lambda r: f"rows x new tokens {r['B']} x {r['n']:,}, {r['H']} KV heads of {r['D']}",
    columns={
        "contender": lambda r: r["name"],
        "bits": lambda r: r["bits"],
        "µs": lambda r: f"{r['us']:,.1f}",
        "TB/s": lambda r: f"{r['tb_s']:.3f}",
        "of a copy": lambda r: f"{r['of_copy']:.1%}",
        "codes that differ": lambda r: f"{r['error']:.1e}",
    },
)


@dataclass(frozen=True)
class Tokens:
    """New tokens and where they go: the first `counts[b]` of `k, v [B, H, n, D]` to token `starts[b]` of row b of the pages."""

    pages: Pages
    key: Codec
    value: Codec
    k: Tensor
    v: Tensor
    starts: Tensor
    counts: Tensor


Store = Callable[[Tokens], object]


def store(t: Tokens) -> None:
    """Encode and store them: what is measured."""
    append(t.pages, t.key, t.value, t.k, t.v, t.starts, t.counts)


def only_encode(t: Tokens) -> None:
    """Encode them by torch, without a look whether they are finite, for which torch would wait for the device."""
    t.key._encode(t.k)
    t.value._encode(t.v)


def new_tokens(f: Format, search: bool, problem: Problem, device: torch.device) -> Tokens:
    """Random tokens, `problem.lengths` of them, for pages of random bytes, in random order."""
    rows, h = problem.batch, problem.kv_heads
    columns = (problem.tokens + PAGE - 2) // PAGE + 1  # pages that so many tokens touch, at most
    pool = torch.randint(0, 256, (rows * columns, h, f.nbytes), dtype=torch.uint8, device=device)
    table = torch.randperm(rows * columns, dtype=torch.int32, device=device).view(rows, columns)
    counts = torch.tensor(problem.lengths, dtype=torch.int32, device=device)
    starts = torch.arange(rows, dtype=torch.int32, device=device) * OFFSET % PAGE
    key, value = (own.codec(bits, f.head_dim, device, search) for bits in (f.k, f.v))
    k, v = (x.transpose(1, 2) for x in random_tokens(problem, device))  # [B, H, n, D]
    return Tokens(Pages(f, pool, table, starts + counts), key, value, k, v, starts, counts)


def difference(t: Tokens, put: Store = store) -> float:
    """Share of the codes that `put` stores that are not those of the codecs, of K or of V, whichever is larger.

    Raises KVStackError when one is off by more than a level, a scale by more than its last bit, or other tokens have changed. Where a
    code differs the scale, which is made for the codes, may do so more: of nine trials of a search two can be equally good.
    """
    twin = replace(t.pages, pool=t.pages.pool.clone())
    (k, k_scale), (v, v_scale) = (to_page(codec, codec.encode(x)) for codec, x in ((t.key, t.k), (t.value, t.v)))
    write(twin, k, v, torch.stack([k_scale, v_scale], -1), t.starts, t.counts)
    put(t)
    found, wanted = ([*codes, scales.view(torch.int16)] for *codes, scales in (read(t.pages), read(twin)))
    slot = torch.arange(found[0].shape[2], device=t.k.device)
    new = (slot >= t.starts[:, None]) & (slot < (t.starts + t.counts)[:, None])  # [B, N]
    off = [(x.int() - y.int()).abs().transpose(1, 2) for x, y in zip(found, wanted, strict=True)]  # [B, N, H, ...]
    k_off, v_off, scale_off = off
    differs = torch.stack([k_off.any(-1), v_off.any(-1)], -1)  # [B, N, H, 2]
    if any(bool(x[~new].any()) for x in off):
        wrong = "has changed tokens that are not its own"
    elif (most := max(int(k_off.max()), int(v_off.max()))) > 1:
        wrong = f"is off by {most} levels, where one is allowed"
    elif bool((scale_off > torch.where(differs, LOOSE, 1)).any()):
        wrong = "gives scales that do not belong to the codes"
    else:
        return max(float(x[new].bool().double().mean()) for x in (k_off, v_off))
    raise KVStackError(f"The encoding kernel {wrong}, and was not timed. Please report this with `kvstack doctor --json`.")


@dataclass(frozen=True, kw_only=True)
class Encoder(Contender):
    """A way to encode. make: the tokens of a problem, whose `lengths` are the numbers of new tokens."""

    make: Callable[[Problem, torch.device], Tokens]
    put: Store | None = None  # what is checked; None for what is right by definition

    def small(self, problem: Problem) -> Problem:
        """Rows as long as those of `problem`, up to a limit, shorter ones, and one without any."""
        n = min(problem.tokens, CHECKED)
        return problem.like((n, (n + 1) // 2, 0, n, 1))

    def error(self, problem: Problem, device: torch.device) -> float:
        """See `difference`."""
        return 0.0 if self.put is None else difference(self.make(self.small(problem), device), self.put)


def contenders(bits: str, head_dim: int) -> list[Contender]:
    """Ours, for a text such as `4, k4v2, 4+search`, and torch for the first of them.

    Raises BadInputError or RecipeError for what is not encoded.
    """
    found: list[Contender] = []
    for word in own.words(bits):
        f = own.page_format(word.removesuffix("+search"), head_dim)
        search = word.endswith("+search")
        if max(f.k, f.v) > 8 or (search and min(f.k, f.v) == 8):
            raise BadInputError(f"Codes have 2 to 8 bits, and those of 8 are not searched for. Take another word than {word!r}.")
        make = partial(new_tokens, f, search)
        ours = Encoder(NAME, word, TOLERANCE, partial(own.missing, f), partial(_build, make, store), make=make, put=store)
        found.append(ours)
        if len(found) == 1:
            found.append(replace(ours, name="torch", missing=_no_gpu, build=partial(_build, make, only_encode), put=None))
    return found


def _no_gpu(_: Problem) -> str | None:
    return not_capable(least=(0, 0))


def _build(make: Callable[[Problem, torch.device], Tokens], put: Store, problem: Problem, device: torch.device) -> Run:
    t = make(problem, device)
    f, tokens = t.pages.format, sum(problem.lengths) * problem.kv_heads
    inputs = t.k.nbytes + t.v.nbytes
    return Run(partial(put, t), None, inputs + tokens * f.nbytes // PAGE, "", held=inputs + t.pages.pool.nbytes)


def measure(
    problems: Sequence[Problem], contenders: Sequence[Contender], device: torch.device, replays: int, progress: Progress
) -> list[Row]:
    """The rows of all contenders on all problems. Raises KVStackError as `trials` does."""
    copy = copy_tb_s(device)
    return [
        row(problem, c, bandwidth(found, copy))
        for problem, group in trials(problems, contenders, device, replays, progress)
        for c, found in group
    ]


def row(problem: Problem, contender: Contender, found: Row) -> Row:
    """One row; what was not found is None."""
    p, c = problem, contender
    return {"B": p.batch, "n": p.tokens, "H": p.kv_heads, "D": p.head_dim, "name": c.name, "bits": c.bits} | only(found, MEASURED)
