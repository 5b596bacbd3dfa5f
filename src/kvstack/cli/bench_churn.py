"""`kvstack bench churn`: engines of vLLM under random requests, aborts and too little room, and what is left and wrong
afterwards. The table goes to the terminal, the rows to a results file (`environment.write_results`). What is done is the business of
`bench.churn`.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from kvstack.bench import churn as churning
from kvstack.bench.engine_process import PEERS
from kvstack.bench.generate import SHAPES
from kvstack.cli.bench import JsonOut, present, ready
from kvstack.cli.compare import command_line, read_text, split
from kvstack.cli.serve import need_vllm
from kvstack.environment import write_results
from kvstack.eval.churn import lines

EXAMPLES = """
kvstack bench churn Qwen/Qwen3-8B --engines polar4 --minutes 60 --json out/churn.json
kvstack bench churn ./my-model --engines "exact, tri(1024)+polar4" --profile out/profile/profile.safetensors --log out/churn.log
kvstack bench churn qwen3-8b --engines polar4 --longest 32768 --blocks 4096
"""
DEFAULT = churning.Wanted(seconds=600)


def churn(
    model: Annotated[str, typer.Argument(help=f"A model folder, a hub name, or a shape with random weights ({', '.join(SHAPES)}).")],
    engines: Annotated[
        str, typer.Option(help=f"Separated by commas: caches of vLLM ({', '.join(PEERS)}) and recipes.")
    ] = "bf16, polar4",
    minutes: Annotated[float, typer.Option(min=0.01, help="Of churn, for each.")] = DEFAULT.seconds / 60,
    rows: Annotated[int, typer.Option(min=1, help="Requests at once, at most.")] = DEFAULT.rows,
    longest: Annotated[int, typer.Option(min=16, help="Tokens of a request, prompt and answer, at most.")] = DEFAULT.longest,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = DEFAULT.new_tokens,
    checked: Annotated[int, typer.Option(min=1, help="Answers that a fresh engine is made to say again.")] = DEFAULT.checked,
    blocks: Annotated[
        int | None, typer.Option(min=1, help="Pages of 128 tokens. Default: what half of the rows take on average.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file that prompts are parts of. Default: Python sources; random tokens for a shape.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the model.")] = DEFAULT.dtype,
    memory: Annotated[float, typer.Option(min=0.01, max=1, help="Part of the GPU's memory that an engine may take.")] = DEFAULT.memory,
    profile: Annotated[
        Path | None, typer.Option(help="Profile of the model, for `tri(...)` and centre=on; a shape has a random one.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Add the output of the engines to this file.")] = None,
    json_out: JsonOut = None,
) -> None:
    """Keep an engine busy with requests that come, end and are aborted at random, and see whether it leaks or says anything wrong.

    Lengths are random, prefixes are shared, and there is room for half of what is wanted, so requests are preempted. Then no block may
    be missing, and memory must not have grown; and a fresh engine, made to say some of the answers again, one at a time, must find
    every token about as likely as its own choice. It may choose another: batches, chunks and cached prefixes round differently, as the
    table shows by what the fresh engine says itself when it is asked for eight answers at once. Exits with 1 when blocks are missing or
    an engine failed; how much memory and which likelihoods are too much, you judge by the table.
    """
    how = churning.Wanted(60 * minutes, rows, longest, new_tokens, checked, seed, blocks, dtype, memory, profile=profile, log=log)
    churning.check(model, split(engines), how)
    need_vllm("bench churn")
    ready(json_out, log)
    with Progress(TextColumn("{task.description}"), BarColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=1)
        found = []
        for row in churning.measure(
            model, split(engines), read_text(text), how, lambda what, part: bar.update(task, description=what, completed=part)
        ):
            found.append(row)
            if json_out:  # so that nothing is lost when the next engine takes the machine down
                write_results(json_out, command_line(), found)
    show(found, f"{model} under churn", json_out)
    if any("reason" in r or r["leaked_blocks"] for r in found):
        raise typer.Exit(1)


def show(rows: list[churning.Row], title: str, json_out: Path | None) -> None:
    """Print what happened and what was found, a column for every engine, and write the file that was asked for."""
    done = [r for r in rows if "reason" not in r]
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("", no_wrap=True)
    for r in done:
        table.add_column(r["kv"], justify="right", no_wrap=True)
    for cells in lines(done):
        table.add_row(*cells)
    why = [f"{r['kv']}: {r['reason']}" for r in rows if "reason" in r]
    present(rows, [table] if done else [], why, json_out, None, lambda _: None)
