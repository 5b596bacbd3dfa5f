"""`kvstack convert`: a pretrained MHA model as LRKV or GQA, the loss that it costs, and a short distillation that wins some of it back.

Rows of `--json` are those of `eval.retrofit`. Conversion and distillation are the business of `attention.convert` and `lab.distil`.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from kvstack import artefact
from kvstack.attention import convert as conversion
from kvstack.attention.convert import METHODS, REFERENCES, Cost
from kvstack.cli.compare import command_line, print_wide
from kvstack.environment import write_results
from kvstack.errors import BadInputError
from kvstack.eval import metrics, retrofit
from kvstack.eval.retrofit import Row
from kvstack.lab.corpus import Corpus, as_tensor, judged, load_corpus, places, windows
from kvstack.lab.distil import DistilConfig, distil
from kvstack.lab.pretrain import TextLoss, cache_bytes, window_losses
from kvstack.lab.registry import folder, load

EXAMPLES = """
kvstack convert out/mha --rank 24 --corpus out/corpus.npz --out out/retrofit
kvstack convert out/mha --rank 24 --corpus out/corpus.npz --out out/retrofit --compare --json out/retrofit.json
kvstack convert out/mha --rank 24 --corpus out/corpus.npz --out out/distilled --distil-tokens 4_000_000
kvstack convert out/mha --to gqa --rank 24 --corpus out/corpus.npz --out out/gqa
"""

TARGETS = ("lrkv", "gqa")
LONGEST = 2048  # tokens of a window, or the model's context if that is less
AT_ONCE = 8192  # tokens that calibration runs at a time


def convert(
    model: Annotated[str, typer.Argument(help="A model folder or a hub name: Llama, or `lab pretrain`, with MHA.")],
    rank: Annotated[int, typer.Option(min=0, help="Numbers of a head's residual; it sets the bytes of every method.")],
    corpus_file: Annotated[Path, typer.Option("--corpus", help="Tokens of the model's own vocabulary, made by `lab corpus`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new model.")],
    to: Annotated[str, typer.Option(help=f"{' or '.join(TARGETS)}; gqa of the fewest KV heads that take no less.")] = TARGETS[0],
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens to calibrate on.")] = 262_144,
    compare: Annotated[bool, typer.Option("--compare", help="Measure the other methods too, at equal bytes.")] = False,
    distil_tokens: Annotated[int, typer.Option(min=0, help="Training tokens to distil on; 0 for none.")] = 0,
    distil_batch: Annotated[int, typer.Option(min=1, help="Tokens of a step of the distillation.")] = DistilConfig.batch,
    lr: Annotated[float, typer.Option(help="Learning rate of the distillation.")] = DistilConfig.lr,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the rows to this results file.")] = None,
) -> None:
    """Convert a pretrained MHA model to attention that caches less, and measure what that costs."""
    if to not in TARGETS:
        raise BadInputError(f"There is no target {to!r}. Choose one of {', '.join(TARGETS)}.")
    if folder(model).resolve() == out.resolve():
        raise BadInputError(f"The new model would replace {model}. Give another --out.")
    for place in (out, *([json_out.parent] if json_out else [])):
        artefact.check_folder(place)
    corpus = load_corpus(corpus_file)
    lm, tokenizer = load(model)
    conversion.check(lm, rank)
    kept, lm = lm.dtype, lm.float()
    length = min(LONGEST, lm.config.max_position_embeddings)
    _check_corpus(corpus, lm.config.vocab_size, length)
    distillation = DistilConfig(distil_tokens, distil_batch, length, lr) if distil_tokens else None
    test = judged(corpus.test, length, lm.device)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        batches = _calibration(corpus, tokens, length)
        moved = _advance(bar, "calibrating", sum(b.numel() for b in batches))
        moments = conversion.moments(lm, batches, moved)
        before = window_losses(TextLoss(lm), test)
        full = Cost(2 * lm.config.num_key_value_heads * lm.config.head_dim, 0.0, 0.0)
        rows = [_row("mha", lm.config.head_dim, lm, [full], full.numbers, test) | {"test_loss": metrics.mean(before).mean}]
        for method in (to, *(m for m in METHODS if compare and m != to)):
            made, costs = conversion.convert(lm, moments, method, rank, _advance(bar, method, len(moments)))
            losses = window_losses(TextLoss(made), test)
            rows.append(_row(method, rank, made, costs, full.numbers, test) | _loss("", losses, before))
            if method == to:
                new = made
        if distillation:
            moved = _advance(bar, "distilling", distillation.steps)
            curve = distil(new, lm, corpus.train, distillation, lambda row: moved(row["step"]))
            rows[1] |= {"distil_tokens": curve[-1]["tokens"], "lr": lr, "curve": curve}
            rows[1] |= _loss("_after", window_losses(TextLoss(new), test), before)
    new.to(kept).save_pretrained(out)
    tokenizer.save_pretrained(out)
    for table in retrofit.tables(rows):
        print_wide(table._replace(title=f"{model}, {len(test)} windows of {length} tokens").terminal())
    Console().print(retrofit.NOTE)
    if json_out:
        write_results(json_out, command_line(), rows)
    for written in (out, *([json_out] if json_out else [])):
        Console().print(f"wrote {written}", soft_wrap=True, highlight=False)


def _check_corpus(corpus: Corpus, vocabulary: int, length: int) -> None:
    """Raise BadInputError unless a model of that vocabulary can run on windows of both texts."""
    greatest = int(max(corpus.train.max(), corpus.test.max()))
    if greatest >= vocabulary:
        raise BadInputError(
            f"The corpus has token {greatest}, the model knows {vocabulary}. Give a corpus of this model's own tokenizer."
        )
    for name, text, least in (("training", corpus.train, length + 1), ("test", corpus.test, 2 * length + 1)):
        if len(text) < least:
            raise BadInputError(f"The {name} text has {len(text):,} tokens, and {least:,} are needed. Give a larger corpus.")


def _calibration(corpus: Corpus, tokens: int, length: int) -> tuple[Tensor, ...]:
    """Batches of windows of the training text, `[B, length]`, of `tokens` tokens or a little more."""
    starts = places(0, 0, -(-tokens // length), len(corpus.train), length)
    x = windows(as_tensor(corpus.train, torch.device("cpu")), starts, length)[:, :-1]
    return torch.split(x, max(1, AT_ONCE // length))


def _advance(bar: Progress, what: str, total: int) -> Any:
    """A function that moves a new bar to how much is done."""
    task = bar.add_task(what, total=total)

    def advance(done: int) -> None:
        bar.update(task, completed=done)

    return advance


def _row(method: str, rank: int, model: Any, costs: list[Cost], full: int, test: Tensor) -> Row:
    """A method's row but for its loss; full: the numbers of the model that came in."""
    return {
        "method": method, "rank": rank, "reference": method in REFERENCES, "cache_ratio": costs[0].numbers / full,
        "cache_bytes_per_token": cache_bytes(model), "windows": len(test), "length": test.shape[1] - 1,
        "lost_key": metrics.mean([c.key for c in costs]).mean, "lost_value": metrics.mean([c.value for c in costs]).mean,
    }  # fmt: skip


def _loss(when: str, losses: list[float], before: list[float]) -> Row:
    """The test loss, and how much more that is than before, with its 95 % interval over windows."""
    more, name = metrics.paired(losses, before), f"loss_increase{when}"
    return {f"test_loss{when}": metrics.mean(losses).mean, name: more.mean, f"{name}_low": more.low, f"{name}_high": more.high}
