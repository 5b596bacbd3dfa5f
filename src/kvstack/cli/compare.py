"""`kvstack compare`: measure recipes side by side on one model: bytes, quality, speed.

Every recipe runs the same text windows and task samples through a real cache. The table goes to the terminal, the raw rows to a results
file (`environment.write_results`), the picture to a PNG and an HTML page. What is measured and how is the business of `eval/`.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kvstack import artefact
from kvstack.environment import write_results
from kvstack.errors import BadInputError
from kvstack.eval import report, runner
from kvstack.eval.suite import SuiteConfig
from kvstack.lab.registry import load, load_profile
from kvstack.lab.tasks import TASKS
from kvstack.lab.text import held_out_text, tuning_text
from kvstack.profile import Profile
from kvstack.recipe import Recipe

EXAMPLES = """
kvstack compare bundled --recipes "fp8, polar4, polar3(window=128, sinks=4)" --json out/compare.json
kvstack compare bundled --recipes "polar4, int4" --tasks "recall, dfs" --length 4096 --samples 32
kvstack compare Qwen/Qwen3-0.6B --recipes "polar4, k4v2" --text book.txt --tasks "" --plot out/book
"""


def compare(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name, or `bundled`.")],
    recipes: Annotated[str, typer.Option(help="Recipes, separated by commas. bf16 is always measured, as the reference.")],
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas; an empty text for none.")] = ", ".join(TASKS),
    length: Annotated[int, typer.Option(min=128, help="Tokens of every text window and task sample.")] = 1024,
    text: Annotated[
        Path | None,
        typer.Option(help="A text file to read instead of the held-out Python sources; `tuning`: those that settings are chosen on."),
    ] = None,
    text_sequences: Annotated[int, typer.Option(min=0, help="Windows of text.")] = 16,
    samples: Annotated[int, typer.Option(min=1, help="Samples of every task.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that run together.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the task samples.")] = 0,
    profile: Annotated[Path | None, typer.Option(help="A calibrated profile of this model; bundled models bring theirs.")] = None,
    ratio_at: Annotated[str, typer.Option(help="Lengths at which the ratio is measured too, e.g. 4096, 65536.")] = "",
    against: Annotated[str | None, typer.Option(help="One of the recipes, to which the others' paired differences are given.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the rows to this results file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot: this path with .png and .html.")] = None,
) -> None:
    """Measure recipes side by side: bytes, quality, speed."""
    stacks = [Recipe.parse(r) for r in split(recipes)]
    if not stacks:
        raise BadInputError('There are no recipes to compare. Give some, such as --recipes "polar4, int4".')
    for path in (json_out, plot):
        if path is not None:
            artefact.check_folder(path.parent)
    cfg = SuiteConfig(length, text_sequences, samples, tuple(split(tasks)), batch, seed)
    lengths = [_number(n) for n in split(ratio_at)]
    rival = None if against is None else str(Recipe.parse(against))
    if rival not in (None, runner.REFERENCE, *map(str, stacks)):
        raise BadInputError(f"--against {against} is none of the recipes. Name one that is measured.")
    lm, tokenizer = load(model)
    calibrated = Profile.load(profile) if profile else load_profile(model)
    rows = measure(lm, tokenizer, stacks, cfg, read_text(text), calibrated, lengths, rival)
    show(rows, f"{model}, {length} tokens", json_out, plot)


def measure(
    model: Any,
    tokenizer: Any,
    recipes: Sequence[Recipe],
    cfg: SuiteConfig,
    text: str,
    profile: Profile | None,
    ratio_at: Sequence[int] = (),
    against: str | None = None,
) -> list[report.Row]:
    """The compare rows, with a progress bar on standard error."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring")
        scores = runner.evaluate(
            model, tokenizer, recipes, cfg, text,
            profile=profile, progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
        rows = runner.rows(scores, cfg, against)
        for row in rows if ratio_at else ():
            row["ratios"] = {str(n): runner.ratio_of_random(model, Recipe.parse(row["recipe"]), n, profile) for n in ratio_at}
    return rows


def show(rows: Sequence[report.Row], title: str, json_out: Path | None, plot: Path | None) -> None:
    """Print the table, and write the results file and the plots that were asked for."""
    console, table = Console(), report.table(rows, title)
    # A table that is cut in a pipe or a narrow window helps nobody: let it be as wide as it is.
    width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    Console(width=max(width, console.width)).print(table)
    if json_out:
        write_results(json_out, command_line(), rows)
    written = [*([json_out] if json_out else []), *(report.write_plots(rows, title, plot) if plot else [])]
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)


def command_line() -> str:
    """The command that is running, as one would type it."""
    return shlex.join(["kvstack", *sys.argv[1:]])


def split(text: str) -> list[str]:
    """Parts between commas that stand outside parentheses."""
    parts, depth = [""], 0
    for c in text:
        depth += (c == "(") - (c == ")")
        if c == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts if p.strip()]


def read_text(path: Path | None) -> str:
    """The text in a file, the tuning text, or the held-out text."""
    if path is None or path == Path("tuning"):
        return held_out_text() if path is None else tuning_text()
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BadInputError(f"{path} cannot be read: {e}. Give a text file in UTF-8.") from e


def _number(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise BadInputError(f"{text!r} is no number of tokens. Give whole numbers separated by commas.")
    return int(text)
