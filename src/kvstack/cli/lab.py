"""`kvstack lab train` and `kvstack lab eval`: make a small reference model from scratch, and judge one on the tasks.

Training takes minutes on one GPU; `--small` tries the loop on a CPU. How it is done is the business of `lab/`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvstack import artefact
from kvstack.attention import words
from kvstack.attention.config import NORMED
from kvstack.cli.compare import command_line, split
from kvstack.environment import write_results
from kvstack.errors import BadInputError, UnsupportedModelError
from kvstack.eval import runner
from kvstack.eval.suite import SuiteConfig
from kvstack.lab.card import write_card
from kvstack.lab.registry import folder, load
from kvstack.lab.tasks import TASKS
from kvstack.lab.text import held_out_text
from kvstack.lab.train import TrainConfig, small, train_model, write_profile

EXAMPLES = """
kvstack lab train --out out/model                # one GPU, about 13 minutes
kvstack lab train --small --out out/small        # a CPU, 2 minutes; learns little
kvstack lab train --attention "lrkv(rank=24, variant=nope)" --out out/lrkv
kvstack lab eval out/model --lengths "1024, 4096" --json out/accuracy.json
"""

Out = Annotated[Path, typer.Option(help="Folder of the new model.")]


def train(
    out: Out,
    small_model: Annotated[bool, typer.Option("--small", help="A tiny model, to try the loop without a GPU.")] = False,
    attention: Annotated[
        str,
        typer.Option(
            help="Attention of kvstack's own decoder, such as mha or lrkv(rank=24, variant=nope), with qk_norm=on unless it says off; "
            "empty for Qwen3."
        ),
    ] = "",
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Wall-clock time of the training.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of the data.")] = 0,
    muon_lr: Annotated[float | None, typer.Option(help="Learning rate of the weight matrices.")] = None,
    adam_lr: Annotated[float | None, typer.Option(help="Learning rate of everything else.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a lab model to continue from.")] = None,
) -> None:
    """Train a reference model from scratch on Python sources and long-context tasks."""
    artefact.check_folder(out)
    given: dict[str, Any] = {"minutes": minutes, "seed": seed, "muon_lr": muon_lr, "adam_lr": adam_lr}
    if attention:
        # Heads of 64, so that there are enough of them to share something, and norms as Qwen3 has, without which MHA learnt less.
        fields = words.read(attention)
        if fields["attention"] in NORMED:
            fields.setdefault("qk_norm", True)
        given |= {"attention": fields, "heads": 4 if small_model else 8, "head_dim": 32 if small_model else 64}
    cfg = replace(small() if small_model else TrainConfig(), **{k: v for k, v in given.items() if v is not None})
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading text, training the tokenizer", total=1.0)

        def report(row: dict[str, float]) -> None:
            said = f"step {row['step']:,}  length {row['length']}  loss {row['loss']:.3f}  answers {100 * row['answers']:.1f} %"
            bar.update(task, completed=row["progress"], description=said)

        train_model(cfg, out, tokenizer=resume, resume=resume, report=report)
    try:
        write_profile(out)
    except UnsupportedModelError as e:
        typer.echo(f"no profile: {e}", err=True)
    write_card(out)
    typer.echo(f"wrote {out}")


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name, or `bundled`.")],
    lengths: Annotated[str, typer.Option(help="Lengths of the samples, separated by commas.")] = "1024, 2048, 4096",
    samples: Annotated[int, typer.Option(min=1, help="Samples of every task at every length.")] = 32,
    text_sequences: Annotated[int, typer.Option(min=2, help="Windows of held-out text at every length.")] = 16,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the rows to this results file.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the accuracies into the card of the lab model.")] = False,
) -> None:
    """Judge a model, with its full bf16 cache, on the synthetic tasks and held-out text."""
    sizes = split(lengths)
    if not sizes or not all(n.isdecimal() for n in sizes):
        raise BadInputError(f"--lengths {lengths!r} are no numbers of tokens. Give whole numbers separated by commas.")
    if json_out:
        artefact.check_folder(json_out.parent)
    lm, tokenizer = load(model)
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as bar:
        for n in sizes:
            task = bar.add_task(f"{n} tokens")
            cfg = SuiteConfig(int(n), text_sequences, samples)
            scores = runner.evaluate(
                lm, tokenizer, [], cfg, held_out_text(),
                progress=lambda done, total, task=task: bar.update(task, completed=done, total=total),  # type: ignore[misc]
            )  # fmt: skip
            rows += runner.rows(scores, cfg)
    table = Table("tokens", "bits/byte", *(f"{t} %" for t in TASKS), title=f"{model}, full cache", title_justify="left")
    for row in rows:
        cells = (f"{100 * e['accuracy']:.1f} [{100 * e['low']:.0f}, {100 * e['high']:.0f}]" for e in row["tasks"].values())
        table.add_row(str(row["tokens"]), f"{row['bits_per_byte']:.4f}", *cells)
    Console().print(table)
    if json_out:
        write_results(json_out, command_line(), rows)
    if card:
        write_card(folder(model), rows)
