"""`kvstack lab pretrain` and `kvstack lab corpus`: train a decoder of a chosen attention on text, on one GPU or on several by torchrun.

How it is done is the business of `lab.pretrain`; `kvstack lab architectures` compares runs.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kvstack import artefact
from kvstack.attention import words
from kvstack.errors import BadInputError
from kvstack.lab.corpus import corpus_facts, load_corpus, make_corpus, save_corpus
from kvstack.lab.optim import OPTIMIZERS
from kvstack.lab.parallel import SPREADS, joined
from kvstack.lab.pretrain import PretrainConfig, pretrain, small

EXAMPLES = """
kvstack lab corpus out/corpus.npz --bytes 1_000_000_000
kvstack lab pretrain --attention "lrkv(rank=24)" --corpus out/corpus.npz --out out/lrkv24
kvstack lab pretrain --attention "mla(latent=480, rope=32)" --corpus out/corpus.npz --out out/mla
kvstack lab pretrain --small --attention "lrkv(rank=6, variant=nope)" --out out/try
torchrun --nproc-per-node 4 -m kvstack.cli.main lab pretrain --attention "lrkv(24)" --parallel fsdp --out out/lrkv24
"""

COLUMNS = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()


def corpus(
    out: Annotated[Path, typer.Argument(help="The file to write, .npz.")],
    max_bytes: Annotated[int, typer.Option("--bytes", min=100_000, help="Text to read at most.")] = 1_000_000_000,
) -> None:
    """Tokenise the Python sources of this machine once, for several runs."""
    artefact.check_folder(out.parent)
    with Progress(*COLUMNS, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading and tokenising", total=1.0)
        made = make_corpus(max_bytes, lambda share: bar.update(task, completed=share))
    save_corpus(made, out)
    facts = corpus_facts(made)
    typer.echo(f"wrote {out}: {facts['train_tokens']:,} tokens to train on, {facts['test_tokens']:,} to report on")


def pretraining(
    out: Annotated[Path, typer.Option(help="Folder of the run and its model.")],
    attention: Annotated[str, typer.Option(help=f"One of {', '.join(words.WORDS)}, with arguments as in lrkv(rank=24).")] = "mha",
    corpus_file: Annotated[Path | None, typer.Option("--corpus", help="Tokens made by `lab corpus`; else they are made anew.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the whole run.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Tokens of a step, over all processes.")] = None,
    optimizer: Annotated[str | None, typer.Option(help=f"{' or '.join(OPTIMIZERS)}, for the matrices.")] = None,
    matrix_lr: Annotated[float | None, typer.Option(help="Learning rate of the matrices.")] = None,
    other_lr: Annotated[float | None, typer.Option(help="Learning rate of everything else.")] = None,
    per_head: Annotated[bool, typer.Option("--per-head/--whole", help="Muon takes projections head by head, or whole.")] = True,
    seed: Annotated[int | None, typer.Option(help="Of the weights.")] = None,
    data_seed: Annotated[int | None, typer.Option(help="Of the order of the tokens.")] = None,
    parallel: Annotated[str, typer.Option(help=f"Under torchrun: {' or '.join(SPREADS)}.")] = SPREADS[0],
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations, to save memory.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")] = False,
    stop: Annotated[int | None, typer.Option(min=1, help="Leave after this step, with a checkpoint.")] = None,
    small_run: Annotated[bool, typer.Option("--small", help="A tiny model and run, to try the loop without a GPU.")] = False,
) -> None:
    """Pretrain a decoder whose attention you choose, on the Python sources of this machine."""
    for value, known in ((parallel, SPREADS), (optimizer or OPTIMIZERS[0], OPTIMIZERS)):
        if value not in known:
            raise BadInputError(f"There is no {value!r} here. Choose one of {', '.join(known)}.")
    given = {
        "tokens": tokens, "batch": batch, "optimizer": optimizer, "matrix_lr": matrix_lr, "other_lr": other_lr,
        "seed": seed, "data_seed": data_seed,
    }  # fmt: skip
    cfg = replace(
        small() if small_run else PretrainConfig(),
        attention=words.read(attention),
        parallel=parallel,
        checkpointing=checkpointing,
        per_head=per_head,
        **{k: v for k, v in given.items() if v is not None},  # type: ignore[arg-type]
    )
    artefact.check_folder(out)
    with joined() as world:
        text = load_corpus(corpus_file) if corpus_file else make_corpus(2_000_000 if small_run else 1_000_000_000)
        bar = Progress(*COLUMNS, console=Console(stderr=True)) if world.first else None
        with bar or nullcontext():
            task = bar.add_task("compiling", total=cfg.steps) if bar else None

            def report(row: dict[str, Any]) -> None:
                assert bar is not None and task is not None
                said = f"step {row['step']:,}  loss {row['loss']:.3f}  tuning {row['tuning']:.4f}  {row['ms']:.0f} ms a step"
                bar.update(task, completed=row["step"], description=said)

            facts = pretrain(cfg, text, out, world, resume=resume, stop=stop, report=report)
        if world.first:
            typer.echo(f"wrote {out} at step {facts['step']:,} of {cfg.steps:,}")
