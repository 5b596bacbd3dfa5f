"""`kvstack compare`: measure recipes side by side on one model: bytes, quality, speed.

Every recipe runs the same text windows and task samples through a real cache. The table goes to the terminal, the raw rows to a results
file (`environment.write_results`), the picture to a PNG and an HTML page. What is measured and how is the business of `eval/`.
With `--budgets` it is the tasks alone, over budgets of tokens (`eval.selection`).
"""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvstack import artefact
from kvstack.environment import write_results
from kvstack.errors import BadInputError
from kvstack.eval import curves, report, runner, selection
from kvstack.eval.suite import OPTIONS, SuiteConfig, check_task
from kvstack.lab.registry import load, load_profile
from kvstack.lab.tasks import TASKS
from kvstack.lab.text import held_out_text, tuning_text
from kvstack.profile import Profile
from kvstack.recipe import Recipe

EXAMPLES = """
kvstack compare bundled --recipes "fp8, polar4, polar3(window=128, sinks=4)" --json out/compare.json
kvstack compare bundled --recipes "polar4, int4" --tasks "recall, dfs" --length 4096 --samples 32
kvstack compare Qwen/Qwen3-0.6B --recipes "polar4, k4v2" --text book.txt --tasks "" --plot out/book
kvstack compare bundled --recipes "tri(BUDGET), snapkv(BUDGET)+polar4" --budgets "1/2, 1/4, 1/10.7, 512" --length 4096 --plot out/tri
kvstack compare bundled --recipes "tri(BUDGET)" --budgets "1/8" --tasks "chain, dfs_public" --task-options "chain.variables=26"
"""


def compare(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name, or `bundled`.")],
    recipes: Annotated[str, typer.Option(help="Recipes, separated by commas. bf16 is always measured, as the reference.")],
    budgets: Annotated[
        str,
        typer.Option(help="Budgets for which BUDGET stands in recipes: tokens, or parts of the length such as 1/8. No text is read."),
    ] = "",
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas; an empty text for none.")] = ", ".join(TASKS),
    task_options: Annotated[str, typer.Option(help="Options of tasks, e.g. chain.variables=26, dfs_public.depth=20.")] = "",
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
    profile_for: Annotated[str, typer.Option(help="Other profiles for single tasks, with --budgets: recall=out/other, ...")] = "",
    ratio_at: Annotated[str, typer.Option(help="Lengths at which the ratio is measured too, e.g. 4096, 65536.")] = "",
    against: Annotated[str | None, typer.Option(help="One of the recipes, to which the others' paired differences are given.")] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="With --budgets: processes that share the work, each with the model in its memory.")
    ] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the rows to this results file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot: this path with .png and .html.")] = None,
) -> None:
    """Measure recipes side by side: bytes, quality, speed."""
    if not split(recipes):
        raise BadInputError('There are no recipes to compare. Give some, such as --recipes "polar4, int4".')
    for path in (json_out, plot):
        if path is not None:
            artefact.check_folder(path.parent)
    chosen = tuple(split(tasks))
    cfg = SuiteConfig(length, text_sequences, samples, chosen, batch, seed, read_options(task_options))
    if budgets:
        shares = selection.parse_budgets(split(budgets), length)
        if ratio_at:
            raise BadInputError("--ratio-at is not measured over budgets. Leave it out, or leave out --budgets.")
        lm, tokenizer = load(model)
        profiles = dict.fromkeys(chosen, Profile.load(profile) if profile else load_profile(model)) | _profiles(profile_for)
        with _progress() as progress:
            found = selection.evaluate(
                lm, model, tokenizer, split(recipes), shares, cfg, read_text(text), profiles, against, progress, workers
            )
        _show_budgets(found, f"{model}, tasks of {length} tokens, {samples} samples each", json_out, plot)
        return
    if profile_for:
        raise BadInputError("--profile-for goes with --budgets. Give these too, or use --profile.")
    if any(selection.Stack(r).open for r in split(recipes)):
        raise BadInputError('BUDGET stands for budgets, and there are none. Give some, such as --budgets "1/4, 512".')
    stacks = [Recipe.parse(r) for r in split(recipes)]
    if any(r.selection and "future" in r.selection.needs for r in stacks):
        raise BadInputError("The oracle knows the future over budgets only. Use --budgets, or another scorer.")
    if ratio_at and any(r.selection for r in stacks):
        raise BadInputError(
            "--ratio-at stores tokens without attention, from which nothing is evicted. Leave it out, or the selections."
        )
    lengths = [number(n) for n in split(ratio_at)]
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
    with _progress() as progress:
        scores = runner.evaluate(model, tokenizer, recipes, cfg, text, profile=profile, progress=progress)
        rows = runner.rows(scores, cfg, against)
        for row in rows if ratio_at else ():
            row["ratios"] = {str(n): runner.ratio_of_random(model, Recipe.parse(row["recipe"]), n, profile) for n in ratio_at}
    return rows


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, moved by what it gives: how much is done, of how much."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(rows: Sequence[report.Row], title: str, json_out: Path | None, plot: Path | None) -> None:
    """Print the table, and write the results file and the plots that were asked for."""
    print_wide(report.table(rows, title))
    _write(rows, json_out, lambda: report.write_plots(rows, title, plot) if plot else [])


def _show_budgets(rows: Sequence[selection.Row], title: str, json_out: Path | None, plot: Path | None) -> None:
    """As `show`, for rows over budgets."""
    for table in curves.tables(rows):
        print_wide(table.terminal())
    _write(rows, json_out, lambda: curves.write_plots(rows, title, plot) if plot else [])


def print_wide(table: Table) -> None:
    """Print a table as wide as it is: one that is cut in a pipe or a narrow window helps nobody."""
    console = Console()
    width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    Console(width=max(width, console.width)).print(table)


def _write(rows: Sequence[report.Row], json_out: Path | None, plots: Callable[[], list[Path]]) -> None:
    """Write the results file, then the plots, and say so."""
    if json_out:
        write_results(json_out, command_line(), rows)
    for path in [*([json_out] if json_out else []), *plots()]:
        Console().print(f"wrote {path}", soft_wrap=True, highlight=False)


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


def number(text: str) -> int:
    """A number of tokens."""
    if not text.isdecimal() or not int(text):
        raise BadInputError(f"{text!r} is no number of tokens. Give whole numbers separated by commas.")
    return int(text)


def read_options(text: str) -> dict[str, dict[str, Any]]:
    """Options of tasks as `SuiteConfig` takes them."""
    found: dict[str, dict[str, Any]] = {}
    for part in split(text):
        name, _, value = part.partition("=")
        task, _, option = (x.strip() for x in name.partition("."))
        if option not in OPTIONS.get(task, {}):
            known = ", ".join(f"{t}.{o}" for t, options in OPTIONS.items() for o in options)
            raise BadInputError(f"There is no option {name.strip()!r} of a task. Choose from: {known}.")
        low, high = OPTIONS[task][option]
        try:
            number = type(low)(value)
        except ValueError:
            number = high + 1
        if not low <= number <= high:
            kind = "whole number" if isinstance(low, int) else "number"
            raise BadInputError(f"{name.strip()} cannot be {value.strip()!r}. Give a {kind} from {low} to {high}.")
        found.setdefault(task, {})[option] = number
    return found


def _profiles(text: str) -> dict[str, Profile]:
    """Profiles of single tasks."""
    found = {}
    for part in split(text):
        task, _, path = (x.strip() for x in part.partition("="))
        check_task(task)
        found[task] = Profile.load(path)
    return found
