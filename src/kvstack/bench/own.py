"""Our kernels as contenders: one per pair of bits, over pages of random codes made on the GPU."""

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kvstack.bench.contender import NAME, Contender, Run, not_capable
from kvstack.bench.problem import Problem, attention, random_queries
from kvstack.codecs.base import Codec
from kvstack.codecs.exact import ExactCodec
from kvstack.codecs.fp8 import Fp8Codec
from kvstack.codecs.polar import PolarCodec
from kvstack.codecs.rotation import rotation
from kvstack.errors import BadInputError
from kvstack.kernels.decode import Body, choose, decode
from kvstack.kernels.pages import PAGE, Format, Pages, read
from kvstack.kernels.reference import Shape

Attend = Callable[[Tensor, Body, Shape], Tensor]  # of queries [B, Hq, T, D]
RAGGED = (1, 127, 128, 1000, 5000)
_SPREAD = 50.0  # standard deviation of random E4M3 numbers, which end at 448 and go on with NaN


def decode_step(q: Tensor, body: Body, shape: Shape) -> Tensor:
    """What `bench decode` measures."""
    return decode(q, body, None, shape)


def contenders(bits: str, head_dim: int, attend: Attend = decode_step) -> list[Contender]:
    """Contenders for a text such as `4, 3, k4v2, 8`. Raises BadInputError or RecipeError for what has no page format."""
    formats = [(word, page_format(word, head_dim)) for word in words(bits)]
    return [Contender(NAME, word, 2e-3, partial(missing, f), partial(_build, f, attend), RAGGED, precise=True) for word, f in formats]


def words(text: str) -> list[str]:
    """What commas separate."""
    return [word for word in (w.strip() for w in text.split(",")) if word]


def page_format(word: str, head_dim: int) -> Format:
    """The page format of bits such as `4` or `k4v2`. Raises BadInputError or RecipeError."""
    match = re.fullmatch(r"(\d+)|k(\d+)v(\d+)", word)
    if not match:
        raise BadInputError(f"{word!r} are no bits. Give a number such as 4, or one for keys and one for values, such as k4v2.")
    k, v = (int(match[1]),) * 2 if match[1] else (int(match[2]), int(match[3]))
    return Format(head_dim, k, v)


def missing(f: Format, _: Problem) -> str | None:
    """Why our kernels for pages of a format cannot run here, or None."""
    if reason := not_capable(least=(8, 0)):
        return reason
    device = torch.device("cuda")
    path = choose(device, *(codec(bits, f.head_dim, device) for bits in (f.k, f.v)))
    return path.reason if path.name == "reference" else None


def _build(f: Format, attend: Attend, problem: Problem, device: torch.device) -> Run:
    codecs = (codec(f.k, f.head_dim, device), codec(f.v, f.head_dim, device))
    body = Body.of(random_pages(f, problem, device), *codecs)
    q = random_queries(problem, device)
    tiles = sum(-(-n // PAGE) for n in problem.lengths) * problem.kv_heads
    return Run(
        call=partial(attend, q, body, Shape(problem.scale)),
        want=lambda: attention(q, *_decoded(body), problem),
        nbytes=tiles * f.nbytes,
        detail=f"{body.path.name} kernel",
    )


def codec(bits: int, head_dim: int, device: torch.device, search: bool = False) -> Codec:
    """The codec of K or V with these bits that is the fastest to read."""
    if bits == 16:
        return ExactCodec(head_dim, torch.bfloat16)
    return Fp8Codec(head_dim) if bits == 8 else PolarCodec(rotation(head_dim, 0, device), bits, search=search)


def random_pages(f: Format, problem: Problem, device: torch.device) -> Pages:
    """Random codes, in pages in random order; logits have a standard deviation of 1 to 2. Scales behind the ends of rows are NaN."""
    lengths = torch.tensor(problem.lengths, dtype=torch.int32, device=device)
    counts = [-(-n // PAGE) for n in problem.lengths]
    order = torch.randperm(sum(counts), device=device, dtype=torch.int32)
    table = torch.zeros(problem.batch, max(counts), dtype=torch.int32, device=device)
    for row, ids in zip(table, order.split(counts), strict=True):
        row[: len(ids)] = ids
    pool = torch.empty(len(order), problem.kv_heads, f.nbytes, dtype=torch.uint8, device=device)
    scramble(f, pool)
    scales = pool[..., f.scale_offset :].view(torch.bfloat16).unflatten(-1, (PAGE, 2))  # [P, H, 128, (k, v)]
    for b, n in enumerate(problem.lengths):
        if n % PAGE:
            scales[table[b, n // PAGE].long(), :, n % PAGE :] = torch.nan
    return Pages(f, pool, table, lengths)


def scramble(f: Format, pool: Tensor) -> None:
    """Fill the pages `[P, H, f.nbytes]` with random codes, and scales with which logits of random queries have a spread of about 1."""
    for pages in pool.split(1024):  # random numbers are larger than their codes
        pages.random_(0, 256)
        for bits, part in ((f.k, pages[..., : f.value_offset]), (f.v, pages[..., f.value_offset : f.scale_offset])):
            if bits == 8:
                part.copy_(torch.randn(part.shape, device=pool.device).mul_(_SPREAD).to(torch.float8_e4m3fn).view(torch.uint8))
            elif bits == 16:
                part.view(torch.bfloat16).normal_()
        scales = pages[..., f.scale_offset :].view(torch.bfloat16).unflatten(-1, (PAGE, 2))  # [P, H, 128, (k, v)]
        scales.uniform_(0.5, 1.5)
        for i, bits in enumerate((f.k, f.v)):
            if bits == 8:
                scales[..., i] *= 1 / _SPREAD
            elif bits == 16:
                scales[..., i] = 1


def _decoded(body: Body) -> tuple[Tensor, Tensor]:
    """`k, v [B, N, H, D]` float64 that the codes stand for, by the definition of the codecs."""
    *codes, scales = read(body.pages)  # [B, H, N, D], [B, H, N, 2]
    out = []
    for i, (codec, code) in enumerate(zip((body.key, body.value), codes, strict=True)):
        numbers = codec.levels[code.int()] if isinstance(codec, PolarCodec) else code.view(codec.fields[0].dtype)
        x = numbers.double() * scales[..., i, None].double()
        out.append((x if codec.transform is None else x @ codec.transform.double()).transpose(1, 2))
    return out[0], out[1]
