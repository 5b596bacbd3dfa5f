"""Serving measured: vLLM with its own caches and with ours, each engine in a process of its own, all with the same arguments.

    {engine, kv, kind, B, N, capacity_tokens, prefill_tokens_per_s, ms_per_step, tokens_per_s}

What the kinds of rows are, `serve_engine` says. The model has a shape of `generate.SHAPES` and random weights, and statistics of its
queries are random too, or it is yours.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvstack.bench.generate import SHAPES
from kvstack.bench.long import random_statistics
from kvstack.bench.serve_engine import LONG
from kvstack.errors import BadInputError, RecipeError
from kvstack.profile import Profile
from kvstack.recipe import Recipe
from kvstack.rope import Rope
from kvstack.vllm.settings import VARIABLE, Settings, layout

Row = dict[str, Any]
PEERS = ("bf16", "fp8", "turboquant_4bit_nc", "int4_per_token_head")  # words of vLLM's --kv-cache-dtype; bf16 is its `auto`
OWN = ("polar4", "tri(3072)+polar4")
LIMIT = 40960  # tokens of a request
CONNECTOR = {  # `filled_cache`, by name: this process does without vLLM
    "kv_connector": "FilledCache",
    "kv_connector_module_path": "kvstack.bench.filled_cache",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"fill_mean": 0.0, "fill_std": 1.0, "startup_fill": True, "any_content": True},
}


@dataclass(frozen=True)
class Points:
    """What to measure: (tokens, rows) of prefills, (rows, tokens) of steps, tokens of largest batches and of whole generations."""

    prefill: Sequence[tuple[int, int]] = ((16384, 4), (32768, 2))
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


def measure(model: str, engines: Sequence[str], points: Points, how: Arguments, tell: Callable[[str], object] = print) -> list[Row]:
    """Rows of all engines; one that fails has a row with its `reason`. model: a name of `SHAPES`, a folder or a hub name.

    Raises as `check` does.
    """
    recipes = check(model, engines, points, how)
    out: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        path = str(random_model(model, place / "model")) if model in SHAPES else model
        profile = how.profile or (place / "model" / "profile" / "profile.safetensors" if model in SHAPES else None)
        for kv, recipe in recipes.items():
            tell(kv)
            selection = None if recipe is None else recipe.selection
            environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
            if recipe is not None:
                asked = place / "kvstack.json"
                asked.write_text(json.dumps({"recipe": kv} | ({"profile": str(profile)} if _calibrated(recipe) else {})))
                environment[VARIABLE] = str(asked)
            some = points if selection is None else Points((), (), (), points.generation)
            task = asdict(some) | dict(
                model=path,
                arguments=_arguments(kv, points, model in SHAPES, how),
                selection=None if selection is None else dict(budget=selection.budget, interval=selection.interval),
            )
            names = dict(engine="vLLM" if recipe is None else "vLLM + kvstack", kv=kv)
            out += [names | row for row in _engine(kv, task, place, environment, how.log)]
    return out


def check(model: str, engines: Sequence[str], points: Points, how: Arguments) -> dict[str, Recipe | None]:
    """The recipe of every engine, None for vLLM's own caches. What can be known to fail fails here, before minutes of work.

    Raises RecipeError for an engine that is none of vLLM's caches and no recipe that a server can hold, ArtefactError for a profile
    that cannot be read, BadInputError for a recipe without its profile, a model that is not there, and what no engine can measure.
    """
    if not engines:
        raise BadInputError('There is nothing to measure. Give some engines, such as "bf16, polar4".')
    recipes = {kv: None if kv in PEERS else _recipe(kv) for kv in engines}
    longest = max([n for n, _ in points.prefill] + [n for _, n in points.steps] + [*points.largest, *points.generation], default=0)
    if longest > LIMIT - LONG:
        raise BadInputError(f"{longest} tokens are too many: a request holds {LIMIT}, of which {LONG} are new. Give fewer.")
    most = max((b for b, _ in points.steps), default=0)
    if most > how.rows:
        raise BadInputError(f"A step of {most} rows needs as many at once, and {how.rows} are allowed. Give more, or smaller steps.")
    if how.profile is not None:
        Profile.load(how.profile)
    if model not in SHAPES:
        _check_config(model)
        for kv, recipe in recipes.items():
            if recipe is not None and _calibrated(recipe) and how.profile is None:
                raise BadInputError(f"`{kv}` needs a profile of {model}. Make one with `kvstack calibrate`, and give it as --profile.")
    return recipes


def _recipe(kv: str) -> Recipe:
    try:
        settings = Settings(Recipe.parse(kv), profile="one that is looked for later")
        layout(settings.recipe.precision, 128, torch.bfloat16)
    except RecipeError as e:
        raise RecipeError(f"`{kv}` is none of vLLM's caches ({', '.join(PEERS)}), and no recipe of a server: {e}") from e
    return settings.recipe


def _calibrated(recipe: Recipe) -> bool:
    """Whether a recipe needs a profile."""
    return recipe.selection is not None or bool(getattr(recipe.precision, "centre", False))


def _check_config(model: str) -> None:
    import transformers

    try:
        transformers.AutoConfig.from_pretrained(model, local_files_only=Path(model).exists())
    except (OSError, ValueError) as e:
        why = str(e).splitlines()[0]
        raise BadInputError(f"Could not load {model}: {why} Give a folder, a hub name, or one of {', '.join(SHAPES)}.") from e


def random_model(shape: str, to: Path) -> Path:
    """Write the config of a shape of `SHAPES` into a folder, for random weights, and beside it random statistics of queries."""
    import transformers

    name, config = SHAPES[shape]
    made = getattr(transformers, f"{name}Config")(**config | {"max_position_embeddings": LIMIT}, architectures=[f"{name}ForCausalLM"])
    made.dtype = torch.bfloat16
    made.save_pretrained(to)
    (to / "profile").mkdir()
    random_statistics(made, Rope.half(made.head_dim).frequency.float(), "none").save(to / "profile" / "profile.safetensors")
    return to


def _arguments(kv: str, points: Points, random_weights: bool, how: Arguments) -> Row:
    """Arguments of `vllm.LLM` for an engine; they differ in nothing but the cache."""
    few = range(8, min(how.rows, 128) + 1, 8)
    sizes = sorted({1, 2, 4, *few, *range(192, how.rows + 1, 64), *(b for b, _ in points.steps)})
    return dict(
        dtype="bfloat16",
        kv_cache_dtype=kv if kv in PEERS[1:] else "auto",
        load_format="dummy" if random_weights else "auto",
        skip_tokenizer_init=True,
        max_model_len=LIMIT,
        max_num_seqs=how.rows,
        gpu_memory_utilization=how.memory,
        enable_prefix_caching=False,
        kv_transfer_config=CONNECTOR,
        compilation_config={"cudagraph_capture_sizes": [s for s in sizes if s <= how.rows]},
        **how.extra,
    )


def _engine(kv: str, task: Row, place: Path, environment: dict[str, str], log: Path | None) -> list[Row]:
    source, to = place / "task.json", place / "rows.json"
    source.write_text(json.dumps(task))
    to.unlink(missing_ok=True)
    command = [sys.executable, "-m", "kvstack.bench.serve_engine", str(source), str(to)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if log is not None:
        with log.open("a") as file:
            file.write(f"=== {kv}\n{done.stdout}\n")
    rows = list(json.loads(to.read_text())) if to.exists() else []
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.strip()]
        why = [line for line in said if "Error" in line] or said or [f"exit code {done.returncode} and no output"]
        rows.append(dict(kind="failed", B=None, N=None, reason=why[-1][-300:]))
    return rows
