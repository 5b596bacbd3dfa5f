"""`kvstack qjl`: the post-mortem of TurboQuant's sign sketch, measured again on this machine.

The tables go to the terminal, the rows to `qjl.json`, and the picture to `qjl.png` and, with the tables, to `qjl.html`. With `--json`
the rows are printed instead of the tables. What is measured is the business of `eval/qjl.py`; `docs/qjl.md` tells the story.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kvstack.cli.compare import command_line
from kvstack.environment import write_results
from kvstack.errors import BadInputError
from kvstack.eval import page
from kvstack.eval import qjl as study
from kvstack.eval.suite import SuiteConfig
from kvstack.lab.registry import load
from kvstack.lab.text import held_out_text

EXAMPLES = """
kvstack qjl
kvstack qjl --no-model --seeds 4
kvstack qjl --text-sequences 16 --task-samples 8 --out out/long
"""

TITLE = "QJL does not pay"


def qjl(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name, or `bundled`.")] = "bundled",
    length: Annotated[int, typer.Option(min=128, help="Tokens of every text window and task sample.")] = 1024,
    text_sequences: Annotated[int, typer.Option(min=2, help="Windows of held-out text.")] = 8,
    task_samples: Annotated[int, typer.Option(min=1, help="Samples of every task.")] = 2,
    seeds: Annotated[int, typer.Option(min=2, help="Draws of random vectors, rotations and sketches.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for qjl.json, qjl.png and qjl.html.")] = Path("out/qjl"),
    no_model: Annotated[bool, typer.Option("--no-model", help="Random vectors only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON instead of tables.")] = False,
) -> None:
    """Show why a sign sketch of the residual does not pay: its error, and what that does to attention and to a model."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInputError(f"--out {out} cannot be a folder: {e.strerror}. Give another folder.") from e
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def progress(what: str) -> study.Progress:
            task = bar.add_task(what, total=None)
            return lambda done, total: bar.update(task, completed=done, total=total)

        of_model = []
        if not no_model:  # first, because it is the only part that can refuse its input
            cfg = SuiteConfig(length, text_sequences, task_samples)
            of_model = study.model(*load(model), held_out_text(), cfg, progress=progress("the model"))
        rows = study.inner(seeds, progress=progress("inner products"))
        rows += study.softmax(seeds, progress=progress("attention weights")) + of_model
    write_results(out / "qjl.json", command_line(), rows)
    written = [
        out / "qjl.json",
        *page.write(out / "qjl", TITLE, {"": study.figure(rows)}, study.tables(rows), "Brackets are 95 % intervals."),
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    console = Console(width=200)  # wider than any table: one that is cut in a pipe or a narrow window helps nobody
    for table in study.tables(rows):
        console.print(table.terminal())
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
