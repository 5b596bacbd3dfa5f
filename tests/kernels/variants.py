"""Count the variants of kernels that Triton compiles while rows, lengths and places in a batch change, without a GPU:
`python tests/kernels/variants.py`.

It prints {recipe: {kernel: variants}}. A variant takes seconds, in which a server's requests wait. Launches only ask Triton which
variant it would take, and nothing runs. It is a process of its own, because one that interprets kernels has no variants.
"""

import collections
import json
import random
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import jit

from kvstack.cache.eviction import evict
from kvstack.codecs.base import Context
from kvstack.kernels import append, compact, decode, encode, encode_hopper, linear_hopper, past, score, select
from kvstack.kernels.codes import page_format
from kvstack.kernels.decode import Body, Path, schedule
from kvstack.kernels.pages import Pages
from kvstack.kernels.reference import Shape
from kvstack.recipe import Recipe
from kvstack.rope import Rope
from kvstack.scorers.base import Layer, QueryStats
from kvstack.scorers.tri import Tri

CPU = torch.device("cpu")
HOPPER = CUDABackend(GPUTarget("cuda", 90, 32))
QUERY_HEADS, HEADS, D = 32, 8, 128
LAYERS, KV_HEADS, GROUPS = 6, 2, 2  # of what evictions are of: products that are multiples of 16 only with some rows
TOKENS = 1, 2, 5, 8, 9, 16, 100, 127, 128, 129, 200, 512, 1000  # new ones of a row
found: dict[str, set[str]] = collections.defaultdict(set)


def note(kernel: Any, *args: Any, grid: Any = None, warmup: bool = False, **options: Any) -> None:
    """In the place of a launch."""
    del grid, warmup
    variant = jit.create_function_from_signature(kernel.signature, kernel.params, HOPPER)(*args, **options)[1]
    found[kernel.fn.__name__].add(str(variant))


def batches(recipe: str) -> None:
    """Store and attend to some rows of batches, at any place of them."""
    precision, rng = Recipe.parse(recipe).precision, random.Random(0)
    codecs = [precision.build(side, Context(D, HEADS, torch.bfloat16, CPU, None)) for side in ("key", "value")]
    pages = page_format(D, *codecs)
    pool = torch.zeros(64, HEADS, pages.nbytes, dtype=torch.uint8)
    for _ in range(200):
        rows, tokens, columns = rng.randint(1, 64), rng.choice(TOKENS), rng.randint(1, 300)
        some = slice(start := rng.randrange(rows), rng.randint(start + 1, rows))
        counts, lengths = torch.zeros(2, rows, dtype=torch.int32)
        table = torch.zeros(rows, 320, dtype=torch.int32)[some, :columns]
        body = Body(Pages(pages, pool, table, lengths[some]), *codecs, schedule(lengths[some], HEADS))
        q, k, v = (
            torch.zeros((len(table) + 3) * tokens, heads, D, dtype=torch.bfloat16)[3 * tokens :]
            .unflatten(0, (-1, tokens))
            .transpose(1, 2)
            for heads in (QUERY_HEADS, HEADS, HEADS)
        )
        append.append(body.pages, *codecs, k, v, lengths[some], counts[some])
        past.attend_past(q, body, Shape(D**-0.5, None), dtype=q.dtype)


def evictions(recipe: str) -> None:
    """Evict from some rows of all layers, as a server does."""
    precision, rng = Recipe.parse(recipe).precision, random.Random(0)
    codecs = [precision.build(side, Context(D, KV_HEADS, torch.bfloat16, CPU, None)) for side in ("key", "value")]
    pages = page_format(D, *codecs)
    pool = torch.zeros(64, KV_HEADS, pages.nbytes, dtype=torch.uint8)
    query_heads = LAYERS * KV_HEADS * GROUPS
    stats = QueryStats(torch.zeros(query_heads, D // 2, dtype=torch.complex64), torch.ones(query_heads, D // 2))
    scorer = Tri(budget=256).build(Layer(D, LAYERS * KV_HEADS, GROUPS, Rope.half(D), CPU, stats=stats))
    for rows in range(1, 20):
        held = torch.zeros(LAYERS * rows, dtype=torch.int32)
        table = torch.zeros(LAYERS * rows, rng.randint(3, 40), dtype=torch.int32)
        body = Body(Pages(pages, pool, table, held), *codecs, schedule(held, KV_HEADS))
        evict(body, scorer, 256, held[:rows], held[:rows], D**-0.5, LAYERS)


if __name__ == "__main__":
    jit.JITFunction.run = note
    for module in (append, compact, decode, score, select):
        module.choose = lambda *_: Path("hopper", "as if there were one")  # type: ignore[assignment]
    encode._machine = lambda _: encode.Machine(227 * 1024, "wgmma", True)  # type: ignore[assignment]
    past.processors = encode_hopper.processors = linear_hopper.processors = lambda _: 132  # type: ignore[assignment]
    out = {}
    for name in ("polar4", "k4v2", "fp8"):
        found.clear()
        batches(name)
        evictions(name)
        out[name] = {kernel: len(variants) for kernel, variants in found.items()}
    print(json.dumps(out))
