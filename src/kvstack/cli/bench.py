"""`kvstack bench`: speed on this machine's GPU, beside other libraries that are installed, in one process.

`decode`: attention of a decode step. `prefill`: of a chunk of new tokens over a compressed past. `encode`: new tokens into pages.
`lowrank`: attention of a decode step over low-rank records. `generate`: a whole model's decode loop. `long`: the same over a long
generation, with eviction. `error`: how exact decode attention is. The tables go to the terminal, the rows to a results file
(`environment.write_results`), the picture to a PNG. What is measured and how is the business of `bench/`.
"""

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
from kvstack.bench import encode as encoding
from kvstack.bench import error as erring
from kvstack.bench import generate as generating
from kvstack.bench import long as lasting
from kvstack.bench import lowrank as thinning
from kvstack.bench import own, peers, report
from kvstack.bench import prefill as prefilling
from kvstack.bench.contender import NAME, Contender
from kvstack.bench.problem import Problem
from kvstack.bench.trial import Row, gpu
from kvstack.cli.compare import command_line, print_wide
from kvstack.environment import write_results
from kvstack.errors import BadInputError
from kvstack.recipe import Recipe

EXAMPLES = """
kvstack bench decode
kvstack bench decode --shape 32x32768 --bits "4, k4v2" --peers "sdpa, flash3"
kvstack bench decode --json results/decode_h200.json --plot out/decode_h200.png
kvstack bench prefill --chunk 2048 --past 131072 --json out/prefill.json
kvstack bench encode --shape 1x32768 --shape 32x1 --bits "4, 4+search" --quick
kvstack bench lowrank --batch 32 --tokens 32768 --ranks "56, 64" --variants nope
kvstack bench generate --shape qwen3-8b --context 32768
kvstack bench long --recipe bf16 --recipe "tri(1024)+polar4" --generated 32768
kvstack bench error --tokens 4096 --tokens 1048576
"""

QueryHeads = Annotated[int, typer.Option(min=1, help="Query heads.")]
KvHeads = Annotated[int, typer.Option(min=1, help="KV heads.")]
HeadDim = Annotated[int, typer.Option(min=1, help="Size of a head.")]
JsonOut = Annotated[Path | None, typer.Option("--json", help="Write the rows to this results file.")]
Quick = Annotated[bool, typer.Option("--quick", help="Few repetitions: to see that it works.")]


def decode(
    shape: Annotated[
        list[str] | None, typer.Option(help=f"Rows x tokens; can be given several times. Default: {', '.join(decoding.SHAPES)}.")
    ] = None,
    heads: QueryHeads = 32,
    kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    bits: Annotated[str, typer.Option(help="Our own bits, separated by commas.")] = "4, 3, 2, k4v2, 8, 16",
    names: Annotated[str, typer.Option("--peers", help="Other libraries, separated by commas; an empty text for none.")] = ", ".join(
        peers.PEERS
    ),
    json_out: JsonOut = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this PNG.")] = None,
    quick: Quick = False,
) -> None:
    """Measure attention of a decode step: ours over compressed pages, and other libraries' in bf16, FP8 and 4 bits.

    Every contender is first checked against float64. Times are medians, of CUDA graphs, over data that the cache cannot hold.
    """
    problems = [Problem.parse(text, heads, kv_heads, head_dim) for text in shape or decoding.SHAPES]
    contenders = _some([*own.contenders(bits, head_dim), *peers.select(names)])
    device = ready(json_out, plot)
    with _progress() as bar:
        rows = decoding.measure(problems, contenders, device, 5 if quick else 25, bar)
    show(rows, f"Decode attention on {torch.cuda.get_device_name()}", json_out, plot)


def prefill(
    chunk: Annotated[int, typer.Option(min=1, help="New tokens, which see all of the past.")] = 2048,
    past: Annotated[int, typer.Option(min=1, help="Tokens of the past: ours compressed, those of others in bf16 or FP8.")] = 32768,
    heads: QueryHeads = 32,
    kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    bits: Annotated[str, typer.Option(help="Our own bits, separated by commas.")] = "4, 3, 2, 8",
    names: Annotated[str, typer.Option("--peers", help="Other libraries, separated by commas; an empty text for none.")] = ", ".join(
        peers.PREFILL
    ),
    json_out: JsonOut = None,
    quick: Quick = False,
) -> None:
    """Measure attention of a chunk of new tokens over a long past: ours over compressed pages, other libraries' in bf16 and FP8.

    Ours is all of it, from the queries to the output in bf16: rotation, attention, rotation back. What the new tokens see of each other
    is exact in every cache and not measured, so nobody has a mask. Every contender is first checked against float64 on a small problem,
    ours with rows that end inside of pages. Times are medians, of CUDA graphs; "x best bf16" above 1 is faster than every bf16 peer.
    """
    problem = Problem((past,), heads, kv_heads, head_dim, queries=chunk)
    contenders = _some([*prefilling.contenders(bits, head_dim), *peers.select(names, peers.PREFILL)])
    device = ready(json_out)
    with _progress() as bar:
        rows = prefilling.measure(problem, contenders, device, 5 if quick else 25, bar)
    show(rows, f"Prefill over a past on {torch.cuda.get_device_name()}", json_out, None, prefilling.LAYOUT)


def encode(
    shape: Annotated[
        list[str] | None,
        typer.Option(help=f"Rows x new tokens; can be given several times. Default: {', '.join(encoding.SHAPES)}."),
    ] = None,
    kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    bits: Annotated[
        str, typer.Option(help="Bits of the pages, separated by commas; 4+search tries nine scales a vector.")
    ] = encoding.BITS,
    json_out: JsonOut = None,
    quick: Quick = False,
) -> None:
    """Measure how fast K and V of new tokens become codes in pages: of a prompt (1x32768) and of decode steps (32x1).

    The kernel is first checked against the codecs in torch: less than 1 code in 1000 may differ, by one level, since it lies on an edge
    but for rounding; and the tokens next to new ones must stay as they are. Times are medians, of CUDA graphs, over data that the cache
    cannot hold. TB/s counts the bytes of the tokens in 16 bits and of their codes and scales, so a copy's speed is the most there is.
    """
    problems = [Problem.parse(text, kv_heads, kv_heads, head_dim) for text in shape or encoding.SHAPES]
    contenders = _some(encoding.contenders(bits, head_dim))
    device = ready(json_out)
    with _progress() as bar:
        rows = encoding.measure(problems, contenders, device, 5 if quick else 25, bar)
    show(rows, f"Encoding on {torch.cuda.get_device_name()}", json_out, None, encoding.LAYOUT)


def error(
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help=f"Tokens of the row; can be given several times. Default: {', '.join(map(str, erring.TOKENS))}."),
    ] = None,
    head_dim: HeadDim = 128,
    bits: Annotated[str, typer.Option(help="Our own bits, separated by commas.")] = "4, 3, 2, k4v2, 8, 16",
    json_out: JsonOut = None,
) -> None:
    """Measure how far decode attention is from float64 over what the same codes stand for, up to a million tokens.

    It is the kernel's own error, relative to the output. What the codes cost is measured by `kvstack compare`.
    """
    contenders = _some(own.contenders(bits, head_dim))
    device = ready(json_out)
    with _progress() as bar:
        rows = erring.measure(tokens or erring.TOKENS, head_dim, contenders, device, bar)
    show(rows, f"Errors on {torch.cuda.get_device_name()}", json_out, None, erring.LAYOUT)


def lowrank(
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of every row.")] = 32768,
    heads: Annotated[int, typer.Option(min=1, help="Heads, which share one part of K and of V.")] = 32,
    head_dim: HeadDim = 128,
    ranks: Annotated[str, typer.Option(help="Ranks of the heads' residuals, separated by commas.")] = ", ".join(
        map(str, thinning.RANKS)
    ),
    variants: Annotated[str, typer.Option(help="Residuals without position (nope), with RoPE (exact), or both.")] = ", ".join(
        thinning.VARIANTS
    ),
    json_out: JsonOut = None,
) -> None:
    """Measure attention of a decode step over low-rank records (LRKV), beside multi-head attention in bf16 of the same heads.

    Ours is all of it, from the query to the output of every head, both products with up-projections included, and is first checked
    against torch. Times are medians, of CUDA graphs; "x best MHA" above 1 is faster than every library here that reads K and V in bf16.
    """
    if head_dim not in (64, 128, 256):
        raise BadInputError(f"There is no low-rank kernel for heads of {head_dim}. Give a size of 64, 128 or 256.")
    kinds, numbers = own.words(variants), own.words(ranks)
    for kind in kinds:
        if kind not in thinning.VARIANTS:
            raise BadInputError(f"There is no variant {kind!r}. Give some of {', '.join(thinning.VARIANTS)}.")
    for number in numbers:
        if not number.isdecimal() or not 1 <= int(number) <= head_dim:
            raise BadInputError(f"{number!r} is no rank. Give numbers from 1 to the size of a head, {head_dim}.")
    if not kinds or not numbers:
        raise BadInputError('There is nothing to measure. Give some --variants and --ranks, such as "nope" and "60".')
    problem = Problem((tokens,) * batch, heads, heads, head_dim)
    device = ready(json_out)
    with _progress() as bar:
        contenders = [*thinning.contenders(kinds, [int(n) for n in numbers]), *thinning.mha()]
        rows = thinning.measure([problem], contenders, device, 25, bar)
    show_lowrank(rows, f"Low-rank decode attention on {torch.cuda.get_device_name()}", json_out)


def show_lowrank(rows: list[Row], title: str, json_out: Path | None) -> None:
    """Print the rows of `bench.lowrank`, the fastest first, and who did not run, and write the file that was asked for."""
    first = rows[0]
    about = f"{title}, {first['B']} x {first['N']:,} tokens, {first['H']} heads of {first['D']}"
    table = Table(title=about, title_justify="left", min_width=len(about))
    for i, head in enumerate(("kernel", "variant", "rank", "GB", "µs", "TB/s", "x best MHA", "error")):
        table.add_column(head, justify="right" if i > 1 else "left", no_wrap=True)
    for r in sorted((r for r in rows if r["us"]), key=lambda r: r["us"]):
        numbers = f"{r['bytes'] / 1e9:.2f}", f"{r['us']:,.1f}", f"{r['tb_per_s']:.2f}", report.ratio(r["speedup_over_best_mha"])
        style = "bold" if r["kernel"] == NAME else None
        table.add_row(r["kernel"], r["variant"], str(r["rank"] or "-"), *numbers, f"{r['error']:.1e}", style=style)
    console = Console()
    print_wide(table)
    for r in rows:
        if "reason" in r:
            console.print(f"{r['kernel']} ({r['variant']}) did not run: {r['reason']}", soft_wrap=True, highlight=False, markup=False)
    if json_out:
        write_results(json_out, command_line(), rows)
        console.print(f"wrote {json_out}", soft_wrap=True, highlight=False)


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
    json_out: JsonOut = None,
) -> None:
    """Measure tokens per second of a model with random weights, each recipe at the largest batch that fits."""
    if shape not in generating.SHAPES:
        raise BadInputError(f"There is no shape {shape!r}. Give one of {', '.join(generating.SHAPES)}.")
    for text in recipe or ():
        Recipe.parse(text)  # before minutes of work
    device = ready(json_out)
    with _progress() as bar:
        rows = generating.measure(generating.random_model(shape, device), recipe or generating.RECIPES, context, steps, batch, bar)
    table = Table(title=f"{shape}, random weights, {context:,} tokens a row, {torch.cuda.get_device_name()}", title_justify="left")
    for i, head in enumerate(("recipe", "rows", "ms a step", "tokens/s", "x the first", "cache GB", "peak GB")):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for r in rows:
        speed = r["tokens_per_s"]
        numbers = f"{r['ms']:.2f}", f"{speed:,.0f}", f"{speed / rows[0]['tokens_per_s']:.2f}"
        table.add_row(r["recipe"], str(r["batch"]), *numbers, *(f"{r[key] / 1e9:.1f}" for key in ("cache_bytes", "peak_bytes")))
    console = Console()
    print_wide(table)
    if json_out:
        write_results(json_out, command_line(), rows)
        console.print(f"wrote {json_out}", soft_wrap=True, highlight=False)


def long(
    shape: Annotated[
        str, typer.Option(help=f"Shape of the model: {', '.join(generating.SHAPES)}. Its weights are random.")
    ] = "qwen3-8b",
    recipe: Annotated[
        list[str] | None, typer.Option(help=f"Can be given several times. Default: {'; '.join(lasting.RECIPES)}.")
    ] = None,
    generated: Annotated[int, typer.Option(min=256, help="Tokens that every row generates.")] = 32768,
    points: Annotated[int, typer.Option(min=1, help="Lengths at which steps are timed.")] = 4,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows. Default: as many as fit.")] = None,
    every_step: Annotated[bool, typer.Option("--every-step", help="Make every step, and note the memory on the way.")] = False,
    json_out: JsonOut = None,
) -> None:
    """Measure a long generation with random weights: tokens per second at each recipe's largest batch, and memory."""
    if shape not in generating.SHAPES:
        raise BadInputError(f"There is no shape {shape!r}. Give one of {', '.join(generating.SHAPES)}.")
    recipes = recipe or lasting.RECIPES
    for text in recipes:
        Recipe.parse(text)  # before minutes of work
    model = generating.random_model(shape, ready(json_out))
    with _progress() as bar:
        run = lasting.endure if every_step else lasting.measure
        rows = run(model, recipes, generated, points, batch, bar)
    heads = ("recipe", "rows", "generated", "ms a step", "ms an eviction", "tokens/s", "x the first", "cache GB", "peak GB")
    table = Table(title=f"{shape}, random weights, {generated:,} tokens, {torch.cuda.get_device_name()}", title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for r in rows:
        times = (
            f"{r['ms']:.2f}",
            f"{r['evict_ms']:.1f}" if "evict_ms" in r else "-",
            f"{r['tokens_per_s']:,.0f}",
            f"{r['tokens_per_s'] / rows[0]['tokens_per_s']:.2f}",
        )
        sizes = (f"{r[key] / 1e9:.2f}" for key in ("cache_bytes", "peak_bytes"))
        table.add_row(r["recipe"], str(r["batch"]), f"{r['generated']:,}", *times, *sizes)
    console = Console()
    print_wide(table)
    if json_out:
        write_results(json_out, command_line(), rows)
        console.print(f"wrote {json_out}", soft_wrap=True, highlight=False)


def _some(contenders: list[Contender]) -> list[Contender]:
    if not contenders:
        raise BadInputError('There is nothing to measure. Give some --bits, such as "4".')
    return contenders


def ready(*paths: Path | None) -> torch.device:
    """The GPU, once it is clear that the files can be written."""
    for path in paths:
        if path is not None:
            artefact.check_folder(path.parent)
    return gpu()


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by calls with what is done and what there is."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(rows: list[Row], title: str, json_out: Path | None, plot: Path | None, layout: report.Layout = report.DECODE) -> None:
    """Print the tables and who did not run, and write the files that were asked for."""
    Console().print(title, highlight=False)
    present(rows, report.tables(rows, layout), report.left_out(rows), json_out, plot, lambda to: report.write_plot(rows, title, to))


def present(
    rows: list[Row], tables: list[Table], left_out: list[str], json_out: Path | None, plot: Path | None, draw: Callable[[Path], None]
) -> None:
    """Print tables and lines of what is not in them, and write the files that were asked for."""
    console = Console()
    for table in tables:
        print_wide(table)
    for line in left_out:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if json_out:
        write_results(json_out, command_line(), rows)
    if plot:
        draw(plot)
    for path in filter(None, (json_out, plot)):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
