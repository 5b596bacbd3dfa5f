"""An engine of vLLM in a process of its own, so that it has the GPU alone and leaves nothing behind: for which model it is, what it is
asked of us, and how its process runs.

A process is `python -m MODULE TASK.json FOUND.json`. It reads its task, and writes what it found whenever it has found more.
"""

import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvstack.bench.generate import SHAPES
from kvstack.bench.long import random_statistics
from kvstack.errors import BadInputError, RecipeError
from kvstack.profile import Profile
from kvstack.recipe import Recipe
from kvstack.rope import Rope
from kvstack.vllm.settings import VARIABLE, Settings, layout

PEERS = ("bf16", "fp8", "turboquant_4bit_nc", "int4_per_token_head")  # words of vLLM's --kv-cache-dtype; bf16 is its `auto`
RANDOM = "kvstack-random"  # the load format of `random_weights`, for an engine whose process has imported it
LIMIT = 40960  # tokens of a request to a model with random weights


def recipe_of(kv: str) -> Recipe | None:
    """The recipe of an engine, None for one of vLLM's own caches. Raises RecipeError for what is neither."""
    if kv in PEERS:
        return None
    try:
        settings = Settings(Recipe.parse(kv), profile="one that is looked for later")
        layout(settings.recipe.precision, 128, torch.bfloat16)
    except RecipeError as e:
        raise RecipeError(f"`{kv}` is none of vLLM's caches ({', '.join(PEERS)}), and no recipe of a server: {e}") from e
    return settings.recipe


def cache_arguments(kv: str, random_weights: bool) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that every engine has, and its cache, in which alone it differs from others."""
    return dict(
        kv_cache_dtype=kv if kv in PEERS[1:] else "auto",
        load_format="dummy" if random_weights else "auto",
        skip_tokenizer_init=True,
    )


def names(kv: str, recipe: Recipe | None) -> dict[str, str]:
    """What rows call an engine."""
    return dict(engine="vLLM" if recipe is None else "vLLM + kvstack", kv=kv)


def calibrated(recipe: Recipe | None) -> bool:
    """Whether a recipe needs a profile."""
    return recipe is not None and (recipe.selection is not None or bool(getattr(recipe.precision, "centre", False)))


def check_model(model: str, recipes: Mapping[str, Recipe | None], profile: Path | None) -> None:
    """Raises BadInputError for a model that is not there and for a recipe without its profile, ArtefactError for a profile that cannot
    be read."""
    if profile is not None:
        Profile.load(profile)
    if model in SHAPES:
        return
    import transformers

    try:
        transformers.AutoConfig.from_pretrained(model, local_files_only=Path(model).exists())
    except (OSError, ValueError) as e:
        why = str(e).splitlines()[0]
        raise BadInputError(f"Could not load {model}: {why} Give a folder, a hub name, or one of {', '.join(SHAPES)}.") from e
    for kv, recipe in recipes.items():
        if calibrated(recipe) and profile is None:
            raise BadInputError(f"`{kv}` needs a profile of {model}. Make one with `kvstack calibrate`, and give it as --profile.")


@dataclass(frozen=True)
class Served:
    """A model on the disk. path: its folder or hub name. random: whether its weights are random. profile: its path, or None."""

    path: str
    random: bool
    profile: Path | None

    @classmethod
    def of(cls, model: str, profile: Path | None, place: Path) -> "Served":
        """model: a folder, a hub name, or a shape of `SHAPES`: then its config is written into `place`, and random statistics of its
        queries, unless there is a profile."""
        if model not in SHAPES:
            return cls(model, False, profile and profile.resolve())
        to = _random_model(model, place / "model")
        return cls(str(to), True, profile.resolve() if profile else to / "profile" / "profile.safetensors")

    def environment(self, kv: str, recipe: Recipe | None, place: Path) -> dict[str, str]:
        """The variables of a process that serves it with a recipe; without any, vLLM has its own cache."""
        out = {k: v for k, v in os.environ.items() if k != VARIABLE}
        if recipe is not None:
            asked = place / "kvstack.json"
            asked.write_text(json.dumps({"recipe": kv} | ({"profile": str(self.profile)} if calibrated(recipe) else {})))
            out[VARIABLE] = str(asked)
        return out


def _random_model(shape: str, to: Path) -> Path:
    import transformers

    name, config = SHAPES[shape]
    made = getattr(transformers, f"{name}Config")(**config | {"max_position_embeddings": LIMIT}, architectures=[f"{name}ForCausalLM"])
    made.dtype = torch.bfloat16
    made.save_pretrained(to)
    (to / "profile").mkdir()
    random_statistics(made, Rope.half(made.head_dim).frequency.float(), "none").save(to / "profile" / "profile.safetensors")
    return to


def run(
    title: str,
    module: str,
    task: Any,
    place: Path,
    environment: dict[str, str],
    log: Path | None,
    tell: Callable[[str], object] = lambda _: None,
) -> tuple[Any, str | None]:
    """Run a process, and read what it found: that, or None, and why it failed, or None.

    place: a folder for its files. log: a file to which the title and all that it prints are added as they come. tell: called with
    every line that it prints.
    """
    source, to = place / "task.json", place / "found.json"
    source.write_text(json.dumps(task))
    to.unlink(missing_ok=True)
    said: deque[str] = deque(maxlen=200)
    command = [sys.executable, "-m", module, str(source), str(to)]
    with (
        open(log or os.devnull, "a", encoding="utf-8") as file,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        file.write(f"=== {title}\n")
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            tell(line)
            if line.strip():
                said.append(line.strip())
    why = None
    if process.returncode:
        lines = list(said) or [f"exit code {process.returncode} and no output"]
        errors = [line for line in lines if re.search(r"Error(:|$)", line)]  # not the line of a traceback that raises it
        why = ([line for line in errors if "See root cause above" not in line] or errors or lines)[-1][:400]
    return (json.loads(to.read_text()) if to.exists() else None), why
