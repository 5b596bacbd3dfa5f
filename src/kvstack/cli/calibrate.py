"""`kvstack calibrate`: run a model over text and keep what codecs and scorers want to know of it in `profile.safetensors`.

It can also train the forecast, of lab models on samples of their tasks too, and read or write TriAttention's own file of query
statistics. What is calibrated and how is the business of `calibrate/`.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from kvstack import artefact
from kvstack.calibrate import add_forecast, read_upstream, write_upstream
from kvstack.calibrate import calibrate as run
from kvstack.calibrate.run import Batch
from kvstack.cli.compare import read_options, read_text, split
from kvstack.errors import BadInputError
from kvstack.eval.suite import SuiteConfig, text_batches
from kvstack.hf.models import check_context
from kvstack.lab.calibration import LENGTH, SAMPLES, calibration_batches
from kvstack.lab.registry import folder, load
from kvstack.lab.tasks import TASKS
from kvstack.lab.text import digest
from kvstack.profile import Profile

EXAMPLES = """
kvstack calibrate Qwen/Qwen3-0.6B -o out/qwen3
kvstack calibrate bundled --data book.txt --tokens 100000 --covariance -o out/book
kvstack calibrate bundled --forecast --tasks "recall, dfs" -o out/forecast
kvstack calibrate bundled --forecast --task-options "chain.variables=26" --samples 64 -o out/reasoning
kvstack calibrate Qwen/Qwen3-8B --from-upstream qwen3_8b_stats.pt -o out/qwen3-8b
"""


def calibrate(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name, or `bundled`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for profile.safetensors.")],
    data: Annotated[
        Path, typer.Option(help="A text file to run on; `tuning`: Python sources that are in no training and no result.")
    ] = Path("tuning"),
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of text to run on, in whole windows.")] = 32768,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of a window; 4096, or the model's context if that is less.")] = None,
    covariance: Annotated[
        bool, typer.Option("--covariance", help="Keep the covariance of queries too, for expected attention.")
    ] = False,
    forecast: Annotated[
        bool, typer.Option("--forecast", help="Train the forecast too, of lab models on samples of their tasks as well as the text.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Which tasks, separated by commas; an empty text for none. Without this option, all.")
    ] = None,
    task_options: Annotated[str | None, typer.Option(help="Options of tasks, e.g. chain.variables=26.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help=f"Windows of text, and samples of each task, for the forecast; {SAMPLES} by default."),
    ] = None,
    upstream: Annotated[Path | None, typer.Option(help="Write the query statistics to this TriAttention file as well.")] = None,
    from_upstream: Annotated[Path | None, typer.Option(help="Read them from a TriAttention file instead of running the model.")] = None,
) -> None:
    """Calibrate a profile of a model: centres of keys and values, statistics of queries before RoPE, and a forecast of attention."""
    for place in (out, *([upstream.parent] if upstream else [])):
        artefact.check_folder(place)
    lab = (folder(model) / "training.json").is_file()
    for option, given in {"tasks": tasks, "task-options": task_options, "samples": samples}.items():
        if given is not None and not (forecast and lab):
            raise BadInputError(
                f"--{option} is for the forecast of a lab model. Give --forecast and such a model, or leave --{option} away."
            )
    text = read_text(data) if forecast or not from_upstream else ""
    lm, tokenizer = load(model)
    began = time.perf_counter()
    name = "tuning text" if data == Path("tuning") else data.name
    chosen = (list(TASKS) if tasks is None else split(tasks)) if lab else []
    windows = _windows(lm, tokenizer, text, tokens, length) if text else []
    batches: Sequence[Batch] = windows
    if forecast and lab:
        longest = min(LENGTH, lm.config.max_position_embeddings)
        batches = calibration_batches(tokenizer, text, longest, samples or SAMPLES, chosen, read_options(task_options or ""))
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        if from_upstream:
            profile = read_upstream(from_upstream, lm)
        else:
            first = bar.add_task("calibrating", total=sum(w.numel() for w in windows))
            profile = run(lm, windows, lambda done: bar.update(first, completed=done), f"{name} {digest(text)}", covariance)
        if forecast:
            second = bar.add_task("forecast")
            profile = add_forecast(
                profile, lm, batches, ", ".join([name, *chosen, *split(task_options or "")]),
                progress=lambda done, total: bar.update(second, completed=done, total=total),
            )  # fmt: skip
    seconds = time.perf_counter() - began
    path = out / "profile.safetensors"
    profile.save(path)
    if upstream:
        write_upstream(profile, upstream, lm)
    _show(profile, path, seconds, upstream)


def _windows(model: Any, tokenizer: Any, text: str, tokens: int, length: int | None) -> list[Tensor]:
    """Windows `[1, length]` of `text`, `tokens` tokens in all or a little less."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 4096)
    length = length or min(4096, context, tokens)
    check_context(model, length, "Give a smaller --length.")
    if tokens < length:
        raise BadInputError(f"--tokens {tokens} are not one window of {length} tokens. Give more --tokens, or a smaller --length.")
    return [b.tokens for b in text_batches(tokenizer, text, SuiteConfig(length, text_sequences=tokens // length, batch=1))]


def _show(profile: Profile, path: Path, seconds: float, upstream: Path | None) -> None:
    """Print what was found and where it is."""
    concentration, norm = profile.concentration(), profile.query_norm
    found = norm.flatten(1).any(1)  # layers that were calibrated
    dominant = concentration.gather(-1, norm.argmax(-1, keepdim=True))
    mean, at_dominant = float(concentration[found].mean()), float(dominant[found].mean())
    table = Table(show_header=False, box=None)
    for name, value in {
        "tokens": f"{profile.tokens:,}",
        "megabytes": f"{path.stat().st_size / 1e6:.2f}",
        "seconds": f"{seconds:.1f}",
        "layers": f"{int(found.sum())} of {len(found)}",
        "mean concentration": f"{mean:.3f} over all bands, {at_dominant:.3f} at each head's dominant band",
    }.items():
        table.add_row(name, value)
    if profile.forecast_fit is not None:
        correlation, loss = profile.forecast_fit[found].flatten(0, 1).mean(0).tolist()
        table.add_row(
            "forecast", f"rank correlation {correlation:.3f}, cross-entropy {loss:.4f} on samples held out, mean over KV heads"
        )
    console = Console(width=max(Console().width, 120))
    console.print(table, highlight=False)
    for written in (path, *([upstream] if upstream else [])):
        console.print(f"wrote {written}", soft_wrap=True, highlight=False)
