"""`kvstack bench`: speed on this machine's GPU, beside other libraries that are installed, in one process.

`decode`: attention of a decode step. `generate`: a whole model's decode loop. The tables go to the terminal, the rows to a results
file (`environment.write_results`), the picture to a PNG. What is measured and how is the business of `bench/`.
"""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvstack import artefact
from kvstack.bench import decode as decoding
from kvstack.bench import generate as generating
from kvstack.bench import own, peers, report
from kvstack.bench.problem import Problem
from kvstack.environment import write_results
from kvstack.errors import BadInputError

EXAMPLES = """
kvstack bench decode
kvstack bench decode --shape 32x32768 --bits "4, k4v2" --peers "sdpa, flash3"
kvstack bench decode --json results/decode_h200.json --plot out/decode_h200.png
kvstack bench generate --shape qwen3-8b --context 32768
"""


def decode(
    shape: Annotated[
        list[str] | None, typer.Option(help=f"Rows x tokens; can be given several times. Default: {', '.join(decoding.SHAPES)}.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 128,
    bits: Annotated[str, typer.Option(help="Our own bits, separated by commas.")] = "4, 3, 2, k4v2, 8, 16",
    names: Annotated[str, typer.Option("--peers", help="Other libraries, separated by commas; an empty text for none.")] = ", ".join(
        peers.PEERS
    ),
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the rows to this results file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this PNG.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few repetitions: to see that it works.")] = False,
) -> None:
    """Measure attention of a decode step: ours over compressed pages, and other libraries' in bf16, FP8 and 4 bits.

    Every contender is first checked against float64. Times are medians, of CUDA graphs, over data that the cache cannot hold.
    """
    problems = [Problem.parse(text, heads, kv_heads, head_dim) for text in shape or decoding.SHAPES]
    contenders = [*own.contenders(bits, head_dim), *peers.select(names)]
    if not contenders:
        raise BadInputError('There is nothing to measure. Give some --bits, such as "4", or some --peers.')
    for path in (json_out, plot):
        if path is not None:
            artefact.check_folder(path.parent)
    device = decoding.gpu()
    with _progress() as bar:
        rows = decoding.measure(problems, contenders, device, 5 if quick else 25, bar)
    show(rows, f"Decode attention on {torch.cuda.get_device_name()}", json_out, plot)


def generate(
    shape: Annotated[
        str, typer.Option(help=f"Shape of the model: {', '.join(generating.SHAPES)}. Its weights are random.")
    ] = "qwen3-8b",
    recipe: Annotated[
        list[str] | None, typer.Option(help=f"Can be given several times. Default: {'; '.join(generating.RECIPES)}.")
    ] = None,
    context: Annotated[int, typer.Option(min=32, help="Tokens in every row of the cache.")] = 32768,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows. Default: as many as fit.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Decode steps that are timed.")] = 33,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the rows to this results file.")] = None,
) -> None:
    """Measure tokens per second of a model with random weights, each recipe at the largest batch that fits."""
    if shape not in generating.SHAPES:
        raise BadInputError(f"There is no shape {shape!r}. Give one of {', '.join(generating.SHAPES)}.")
    if json_out is not None:
        artefact.check_folder(json_out.parent)
    device = decoding.gpu()
    with _progress() as bar:
        rows = generating.measure(generating.random_model(shape, device), recipe or generating.RECIPES, context, steps, batch, bar)
    table = Table(title=f"{shape}, random weights, {context:,} tokens a row, {torch.cuda.get_device_name()}", title_justify="left")
    for i, head in enumerate(("recipe", "rows", "ms a step", "tokens/s", "x the first", "cache GB", "peak GB")):
        table.add_column(head, justify="right" if i else "left")
    for r in rows:
        speed = r["tokens_per_s"]
        numbers = f"{r['ms']:.2f}", f"{speed:,.0f}", f"{speed / rows[0]['tokens_per_s']:.2f}"
        table.add_row(r["recipe"], str(r["batch"]), *numbers, *(f"{r[key] / 1e9:.1f}" for key in ("cache_bytes", "peak_bytes")))
    console = Console()
    console.print(table)
    if json_out:
        write_results(json_out, shlex.join(["kvstack", *sys.argv[1:]]), rows)
        console.print(f"wrote {json_out}", soft_wrap=True, highlight=False)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by calls with what is done and what there is."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(rows: list[decoding.Row], title: str, json_out: Path | None, plot: Path | None) -> None:
    """Print the tables and who did not run, and write the files that were asked for."""
    console = Console()
    console.print(title, highlight=False)
    for table in report.tables(rows):
        # A table that is cut in a pipe or a narrow window helps nobody: let it be as wide as it is.
        width = console.measure(table, options=console.options.update(max_width=1000)).maximum
        Console(width=max(width, console.width)).print(table)
    for line in report.left_out(rows):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if json_out:
        write_results(json_out, shlex.join(["kvstack", *sys.argv[1:]]), rows)
    if plot:
        report.write_plot(rows, title, plot)
    for path in filter(None, (json_out, plot)):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
