"""`kvstack bench serve`: engines of vLLM side by side, with its own caches and with ours, on this machine's GPU.

Every engine runs in a process of its own, one after another (`bench.serve`). The tables go to the terminal, the rows to a results file
(`environment.write_results`), the picture to a PNG. What is measured and how is the business of `bench/`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from kvstack.bench import serve as serving
from kvstack.bench import serve_report as report
from kvstack.bench.engine_process import PEERS
from kvstack.bench.generate import SHAPES
from kvstack.bench.problem import pair
from kvstack.cli.bench import JsonOut, present, ready
from kvstack.cli.compare import command_line, number, split
from kvstack.cli.serve import need_vllm
from kvstack.environment import write_results

EXAMPLES = """
kvstack bench serve
kvstack bench serve --engines "bf16, polar4" --step 32x16384 --json out/serving.json --plot out/serving.png
kvstack bench serve --engines "bf16, fp8, polar4, tri(3072)+polar4" --rows 128 --log out/serving.log
kvstack bench serve --model Qwen/Qwen3-8B --engines "bf16, tri(3072)+polar4" --profile out/profile/profile.safetensors
"""
DEFAULT = serving.Points()


def _text(of: Sequence[tuple[int, int] | int]) -> str:
    return ", ".join("x".join(map(str, p)) if isinstance(p, tuple) else str(p) for p in of)


def _pairs(text: str) -> list[tuple[int, int]]:
    return [pair(word, "rows and tokens, such as 32x16384") for word in split(text)]


def serve(
    model: Annotated[
        str, typer.Option(help=f"A shape with random weights ({', '.join(SHAPES)}), a model folder or a hub name.")
    ] = "qwen3-8b",
    engines: Annotated[str, typer.Option(help=f"Separated by commas: caches of vLLM ({', '.join(PEERS)}) and recipes.")] = ", ".join(
        PEERS + serving.OWN
    ),
    prefill: Annotated[str, typer.Option(help="Prompts, rows x tokens, separated by commas; an empty text for none.")] = _text(
        DEFAULT.prefill
    ),
    step: Annotated[str, typer.Option(help="Decode steps, rows x tokens, separated by commas; an empty text for none.")] = _text(
        DEFAULT.steps
    ),
    largest: Annotated[
        str, typer.Option(help="Decode steps of as many rows as fit, of so many tokens, separated by commas; an empty text for none.")
    ] = _text(DEFAULT.largest),
    generation: Annotated[
        str, typer.Option(help="Generations of so many tokens, as many rows as fit, separated by commas; an empty text for none.")
    ] = _text(DEFAULT.generation),
    rows: Annotated[int, typer.Option(min=1, help="Rows at once, at most.")] = 1024,
    memory: Annotated[float, typer.Option(min=0.01, max=1, help="Part of the GPU's memory that an engine may take.")] = 0.9,
    profile: Annotated[
        Path | None, typer.Option(help="Profile of the model, for `tri(...)` and centre=on; a shape has a random one.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Add the output of the engines to this file.")] = None,
    json_out: JsonOut = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this PNG.")] = None,
) -> None:
    """Measure engines of vLLM: tokens that fit, and tokens per second of prompts, decode steps and long generations.

    All engines get the same arguments and differ in the cache alone. Prompts are computed; steps run over a cache that was filled with
    random numbers and codes. Recipes that evict are measured in generations only. "x bf16" above 1 is faster, or holds more, than
    vLLM's own cache in bf16. An engine takes minutes, and one that fails is told below the tables.
    """
    points = serving.Points(_pairs(prefill), _pairs(step), [number(n) for n in split(largest)], [number(n) for n in split(generation)])
    how = serving.Arguments(memory, rows, profile, log)
    chosen = list(serving.check(model, split(engines), points, how))
    need_vllm("bench serve")
    ready(json_out, plot, log)
    tell = Console(stderr=True)
    found: list[report.Row] = []
    for rows_of_one in serving.measure(
        model, chosen, points, how, lambda kv: tell.print(f"measuring {kv}", soft_wrap=True, highlight=False, markup=False)
    ):
        found += rows_of_one
        if json_out:  # so that nothing is lost when the next engine takes the machine down
            write_results(json_out, command_line(), found)
    show(found, f"Serving {model} with vLLM on {torch.cuda.get_device_name()}", json_out, plot)


def show(rows: list[report.Row], title: str, json_out: Path | None, plot: Path | None) -> None:
    """Print the tables and what was not measured, and write the files that were asked for."""
    Console().print(title, soft_wrap=True, highlight=False, markup=False)
    present(rows, report.tables(rows), report.left_out(rows), json_out, plot, lambda to: report.write_plot(rows, title, to))
