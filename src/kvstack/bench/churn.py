"""Churn: requests of any length come at any time, share prefixes, are aborted, and are more than there is room for.

Afterwards nothing may be left behind, and no token may be wrong. What the engine did and what is left, its own process says
(`churn_engine`). An engine that has done nothing else is made to say some of the answers again, token for token, one at a time:

    {engine, kv, model, rows, longest, blocks, seed, seconds, requests, finished, aborted, preempted, new_tokens, cached_tokens,
    leaked_blocks, gpu_bytes, host_bytes, checked, tokens, differing, gaps, together, others, worst}

It must find them about as likely as its own choices. `gaps` are the differences of log-probabilities where it would have chosen another
token, in `differing` of `checked` answers: batches, chunks and prefixes round differently, and a prompt whose prefix is cached reads
codes where this engine read it exact; but a page that is not where it should be does not say something nearly as good. How large they
may be, two controls tell: `together`, the same of what the second engine says itself when it is asked for eight answers at once and has
their prompts in its cache; and `others`, for tokens that other requests said at the same places, which are wrong. `worst` is the answer
with the greatest, [{at, prompt, said}] in tokens, to look into.
"""

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvstack.bench.churn_engine import PART, TOGETHER, Load
from kvstack.bench.engine_process import LIMIT, RANDOM, Served, cache_arguments, check_model, names, recipe_of, run
from kvstack.errors import BadInputError
from kvstack.kernels.pages import PAGE
from kvstack.recipe import Recipe

Row = dict[str, Any]
MODULE = "kvstack.bench.churn_engine"


@dataclass(frozen=True)
class Wanted:
    """seconds: of churn; it ends earlier when there were so many `requests`. rows: requests at once, at most. longest: tokens of a
    request, prompt and answer. new_tokens: of an answer, at most. checked: answers that are said again. blocks: pages, or as many as
    half of the rows take on average. dtype, memory: of the engine; memory is the part of a GPU's. profile: for `tri(...)`. log: where
    the output of the engines goes. extra: further arguments of `vllm.LLM`."""

    seconds: float
    rows: int = 64
    longest: int = 2048
    new_tokens: int = 256
    checked: int = 100
    seed: int = 0
    blocks: int | None = None
    dtype: str = "bfloat16"
    memory: float = 0.9
    requests: int | None = None
    profile: Path | None = None
    log: Path | None = None
    extra: Row = field(default_factory=dict)


def measure(
    model: str, engines: Sequence[str], text: str, how: Wanted, tell: Callable[[str, float], object] = lambda _, __: None
) -> Iterator[Row]:
    """A row for every engine, one after another; one that fails has a `reason`. model: of `SHAPES`, a folder or a hub name. text:
    prompts are parts of it; random weights get random tokens. tell: called with what is done and which part of it is.

    Raises as `check` does, and BadInputError for a text that is too short.
    """
    recipes = check(model, engines, how)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        served = Served.of(model, how.profile, place)
        load = Load(_ids(served, text, how), how.longest, how.new_tokens, how.rows, how.checked)
        for kv, recipe in recipes.items():
            yield names(kv, recipe) | dict(model=model) | _row(served, kv, recipe, load, how, place, tell)


def check(model: str, engines: Sequence[str], how: Wanted) -> dict[str, Recipe | None]:
    """The recipe of every engine, None for vLLM's own caches. What can be known to fail fails here, before minutes of work.

    Raises RecipeError as `recipe_of` does, BadInputError and ArtefactError as `check_model` does, and for what cannot be churn.
    """
    if not engines:
        raise BadInputError('There is nothing to measure. Give some engines, such as "bf16, polar4".')
    if how.new_tokens >= how.longest or how.longest > LIMIT:
        raise BadInputError(f"Requests have up to {LIMIT} tokens, and answers fewer than requests. Give other numbers.")
    recipes = {kv: recipe_of(kv) for kv in engines}
    check_model(model, recipes, how.profile)
    return recipes


def _row(
    served: Served, kv: str, recipe: Recipe | None, load: Load, how: Wanted, place: Path, tell: Callable[[str, float], object]
) -> Row:
    arguments = _arguments(served, kv, recipe, how)
    environment = served.environment(kv, recipe, place) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    evicting = recipe is not None and recipe.selection is not None
    row: Row = dict(rows=how.rows, longest=how.longest, blocks=arguments["num_gpu_blocks_override"], seed=how.seed)

    def step(title: str, task: Row) -> Any:
        def line(text: str) -> None:
            if text.startswith(PART):
                tell(title, float(text.removeprefix(PART)))

        tell(title, 0)
        found, why = run(title, MODULE, dict(model=served.path) | task, place, environment, how.log, line)
        if why is not None:
            row["reason"] = f"{title}: {why}"
        return found

    if torch.cuda.is_available():
        # An engine that compiles its model may round otherwise than the next one, which finds it compiled.
        step(f"{kv}: compiling", dict(arguments=arguments, done=[]))
        if "reason" in row:
            return row
    churned = step(
        f"{kv}: churn",
        dict(arguments=arguments, load=asdict(load), seconds=how.seconds, requests=how.requests, seed=how.seed),
    )  # fmt: skip
    if "reason" in row:
        return row
    row |= churned["row"]
    done = [one for one in churned["done"] if not (evicting and one["preempted"])]  # it then keeps other tokens: all come at once
    room = TOGETHER * (-(-how.longest // PAGE) + 2)
    found = step(f"{kv}: saying again", dict(arguments=arguments | dict(num_gpu_blocks_override=room), done=done))
    return row if "reason" in row else row | found


def _arguments(served: Served, kv: str, recipe: Recipe | None, how: Wanted) -> Row:
    """Arguments of `vllm.LLM`. Where tokens are evicted, a prompt is computed in one piece: what is kept depends on the pieces."""
    selection, tokens = None if recipe is None else recipe.selection, how.longest
    if selection is not None:
        tokens = min(tokens, selection.budget + selection.interval)
    blocks = how.blocks or how.rows * tokens // (4 * PAGE)
    return dict(
        dtype=how.dtype,
        max_model_len=how.longest,
        block_size=PAGE,
        max_num_seqs=how.rows,
        max_num_batched_tokens=max(how.longest, how.rows) if selection else max(how.longest // 2, how.rows),
        num_gpu_blocks_override=max(blocks, -(-how.longest // PAGE) + 2),
        gpu_memory_utilization=how.memory,
        enable_prefix_caching=selection is None,
        enable_chunked_prefill=selection is None,
        disable_log_stats=False,
        **cache_arguments(kv, served.random) | (dict(load_format=RANDOM) if served.random else {}),
        **how.extra,
    )


def _ids(served: Served, text: str, how: Wanted) -> list[int]:
    if served.random:
        rng = random.Random(how.seed)
        return [rng.randrange(1000, 100000) for _ in range(8 * how.longest)]
    from transformers import AutoTokenizer

    ids = [int(i) for i in AutoTokenizer.from_pretrained(served.path)(text[: 64 * how.longest])["input_ids"]]
    if len(ids) < 2 * how.longest:
        raise BadInputError(
            f"The text has {len(ids)} tokens, too few for requests of {how.longest}. Give a longer one, or fewer tokens."
        )
    return ids
