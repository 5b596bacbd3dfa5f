"""`kvstack lab architectures` and `kvstack lab rates`: compare runs of `kvstack lab pretrain`, by attention or by learning rate.

The tables go to the terminal, the rows to a results file; of architectures the curves go to a second one beside it, and the pictures to
PNG files and an HTML page. What is compared and how is the business of `eval.architectures` and `eval.rates`.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvstack import artefact
from kvstack.cli.compare import command_line
from kvstack.environment import environment, write_results
from kvstack.eval import architectures as study
from kvstack.eval import rates as rate_study
from kvstack.eval.page import Table

EXAMPLES = """
kvstack lab architectures out/mha out/gqa4 out/lrkv24
kvstack lab architectures out/runs/* --json results/architectures.json --plot docs/architectures
kvstack lab rates out/rates/* --json results/rates.json
"""

TITLE = "Architectures of attention, trained from scratch on the same tokens"


def architectures(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs; one of MHA for every seed.")],
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the rows to this results file, and the curves beside it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write plots: this path with .png and .html.")] = None,
) -> None:
    """Compare pretrained decoders: cache bytes, loss, paired differences, speed of learning."""
    for path in (json_out, plot):
        if path is not None:
            artefact.check_folder(path.parent)
    found = study.read_runs(runs)
    rows, curves, written = study.run_rows(found) + study.comparisons(found), study.curve_rows(found), []
    if json_out:
        beside = json_out.with_name(f"{json_out.stem}_curves.json")
        write_results(json_out, command_line(), rows)
        with artefact.replacing(beside) as temporary:  # in one line: nobody reads so many numbers
            held = {"command": command_line(), "environment": environment(), "rows": curves}
            temporary.write_text(json.dumps(held, allow_nan=False) + "\n", "utf-8")
        written += [json_out, beside]
    if plot:
        written += study.write_plots(rows, curves, TITLE, plot)
    _show(study.tables(rows), written)


def rates(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, that differ in attention, rate, seed or tokens.")],
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the rows to this results file.")] = None,
) -> None:
    """Compare the learning rates of pretrained decoders by their loss on the tuning text."""
    if json_out:
        artefact.check_folder(json_out.parent)
    rows = rate_study.rate_rows(runs)
    if json_out:
        write_results(json_out, command_line(), rows)
    _show(rate_study.tables(rows), [json_out] if json_out else [])


def _show(tables: list[Table], written: list[Path]) -> None:
    console = Console(width=220)  # wider than any table: one that is cut in a pipe or a narrow window helps nobody
    for table in tables:
        console.print(table.terminal())
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
