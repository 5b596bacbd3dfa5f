"""`kvstack serve`: vLLM's own OpenAI-compatible server, with our plugin told what to do.

Nothing is served here: once recipe and profile are checked, this process becomes vLLM, and every further option is vLLM's. What the
plugin then says, in one line of vLLM's log, is whether it is active and how many tokens fit.
"""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvstack.errors import ArtefactError, KVStackError
from kvstack.vllm.settings import VARIABLE, read

EXAMPLES = """
kvstack serve Qwen/Qwen3-8B --recipe polar4
kvstack serve Qwen/Qwen3-8B --recipe polar4 --port 8000 --max-model-len 40960 --tensor-parallel-size 2
kvstack serve Qwen/Qwen3-8B --recipe "tri(3072)+polar4" --profile out/profile/profile.safetensors
curl http://localhost:8000/metrics | grep kvstack
"""
CONTEXT = {"ignore_unknown_options": True}  # they are vLLM's


def serve(
    model: Annotated[str, typer.Argument(help="Folder or hub name.")],
    recipe: Annotated[str, typer.Option(help="How keys and values are stored, for all layers. No window and no sinks.")] = "polar4",
    profile: Annotated[Path | None, typer.Option(help="Profile of the model, for `tri(...)` and centre=on.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[VLLM OPTIONS]...", help="Whatever vLLM's server takes.")] = None,
) -> None:
    """Start vLLM's OpenAI-compatible server with a compressed cache.

    Options that are not named here go to vLLM as they are: --host, --port, --max-model-len, --tensor-parallel-size,
    --pipeline-parallel-size, --nnodes and all others. `GET /health` says when it is up, and `GET /metrics` has, beside vLLM's own
    numbers, kvstack_cache_tokens, kvstack_tokens_per_gib, kvstack_ratio and kvstack_evicted_tokens_total.
    """
    need_vllm("serve")
    if profile is not None and not profile.is_file():
        raise ArtefactError(f"{profile} does not exist. Make a profile with `kvstack calibrate {model} -o DIR`.")
    asked = {"recipe": recipe} | ({} if profile is None else {"profile": str(profile.resolve())})
    os.environ[VARIABLE] = json.dumps(asked)
    settings = read(None, model)
    assert settings is not None
    given = list(arguments or ())
    console = Console(stderr=True)
    if settings.recipe.selection is not None and "--no-enable-prefix-caching" not in given:
        console.print("Pages whose tokens are evicted cannot be shared: without prefix caching.", soft_wrap=True)
        given.append("--no-enable-prefix-caching")
    console.print(f"Serving {model} with {settings.recipe}: GET /health when it is up, GET /metrics for what it holds.", soft_wrap=True)
    os.execv(sys.executable, [sys.executable, "-m", *_server(model), *given])


def need_vllm(command: str) -> None:
    """Raises KVStackError without it."""
    if find_spec("vllm") is None:
        raise KVStackError(f"`kvstack {command}` needs vLLM. Install it with `pip install 'kvstack[vllm]'`.")


def _server(model: str) -> list[str]:
    """The module of vLLM's server, and how it is told the model. vLLM's command looks for its own package by name."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]
