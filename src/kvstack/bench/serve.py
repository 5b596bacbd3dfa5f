"""Serving measured: vLLM with its own caches and with ours, each engine in a process of its own, all with the same arguments.

    {engine, kv, kind, B, N, capacity_tokens, prefill_tokens_per_s, ms_per_step, tokens_per_s}

What the kinds of rows are, `serve_engine` says. The model has a shape of `generate.SHAPES` and random weights, and statistics of its
queries are random too, or it is yours.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvstack.bench.engine_process import LIMIT, Served, cache_arguments, check_model, names, recipe_of, run
from kvstack.bench.serve_engine import LONG
from kvstack.errors import BadInputError
from kvstack.recipe import Recipe

Row = dict[str, Any]
OWN = ("polar4", "tri(3072)+polar4")
CONNECTOR = {  # `filled_cache`, by name: this process does without vLLM
    "kv_connector": "FilledCache",
    "kv_connector_module_path": "kvstack.bench.filled_cache",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"fill_mean": 0.0, "fill_std": 1.0, "startup_fill": True, "any_content": True},
}


@dataclass(frozen=True)
class Points:
    """What to measure: (rows, tokens) of prefills and steps, tokens of largest batches and of whole generations."""

    prefill: Sequence[tuple[int, int]] = ((4, 16384), (2, 32768))
    steps: Sequence[tuple[int, int]] = ((1, 32768), (8, 32768), (32, 4096), (32, 16384), (128, 2048))
    largest: Sequence[int] = (32768,)
    generation: Sequence[int] = (32768,)


@dataclass(frozen=True)
class Arguments:
    """memory: of the GPU's, that an engine may take. rows: at most at once. profile: of a selection for a model with weights. log:
    where the engines' output goes. extra: further arguments of `vllm.LLM`."""

    memory: float = 0.9
    rows: int = 1024
    profile: Path | None = None
    log: Path | None = None
    extra: Row = field(default_factory=dict)


def measure(
    model: str, engines: Sequence[str], points: Points, how: Arguments, tell: Callable[[str], object] = print
) -> Iterator[list[Row]]:
    """The rows of every engine, one after another; one that fails has a row with its `reason`. model: a name of `SHAPES`, a folder or a
    hub name.

    Raises as `check` does.
    """
    recipes = check(model, engines, points, how)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        served = Served.of(model, how.profile, place)
        for kv, recipe in recipes.items():
            tell(kv)
            selection = None if recipe is None else recipe.selection
            some = points if selection is None else Points((), (), (), points.generation)
            task = asdict(some) | dict(
                model=served.path,
                arguments=_arguments(kv, points, served.random, how),
                selection=None if selection is None else dict(budget=selection.budget, interval=selection.interval),
            )
            rows, why = run(kv, "kvstack.bench.serve_engine", task, place, served.environment(kv, recipe, place), how.log)
            rows = (rows or []) + ([] if why is None else [dict(kind="failed", B=None, N=None, reason=why)])
            yield [names(kv, recipe) | row for row in rows]


def check(model: str, engines: Sequence[str], points: Points, how: Arguments) -> dict[str, Recipe | None]:
    """The recipe of every engine, None for vLLM's own caches. What can be known to fail fails here, before minutes of work.

    Raises RecipeError for an engine that is none of vLLM's caches and no recipe that a server can hold, ArtefactError for a profile
    that cannot be read, BadInputError for a recipe without its profile, a model that is not there, and what no engine can measure.
    """
    if not engines or not any((points.prefill, points.steps, points.largest, points.generation)):
        raise BadInputError('There is nothing to measure. Give some engines, such as "bf16, polar4", and something to do.')
    recipes = {kv: recipe_of(kv) for kv in engines}
    longest = max([n for _, n in (*points.prefill, *points.steps)] + [*points.largest, *points.generation], default=0)
    if longest > LIMIT - LONG:
        raise BadInputError(f"{longest} tokens are too many: a request holds {LIMIT}, of which {LONG} are new. Give fewer.")
    most = max((b for b, _ in points.steps), default=0)
    if most > how.rows:
        raise BadInputError(f"A step of {most} rows needs as many at once, and {how.rows} are allowed. Give more, or smaller steps.")
    check_model(model, recipes, how.profile)
    return recipes


def _arguments(kv: str, points: Points, random_weights: bool, how: Arguments) -> Row:
    """Arguments of `vllm.LLM` for an engine; they differ in nothing but the cache."""
    few = range(8, min(how.rows, 128) + 1, 8)
    sizes = sorted({1, 2, 4, *few, *range(192, how.rows + 1, 64), *(b for b, _ in points.steps)})
    return dict(
        dtype="bfloat16",
        max_model_len=LIMIT,
        max_num_seqs=how.rows,
        gpu_memory_utilization=how.memory,
        enable_prefix_caching=False,
        kv_transfer_config=CONNECTOR,
        compilation_config={"cudagraph_capture_sizes": [s for s in sizes if s <= how.rows]},
        **cache_arguments(kv, random_weights),
        **how.extra,
    )
