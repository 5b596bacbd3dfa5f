"""How much is still right when few tokens stay: recipes over budgets on the task samples, and how they differ, sample by sample.

In a recipe the word BUDGET stands for every budget in turn: whole tokens, or a share of the length of a sample. A recipe without it is
measured once, and bf16 always is. Samples run teacher-forced through a real cache in strict mode, so that tokens leave as they would
when decoding one by one.

An item counts when it begins in the second half of its sample: those are the same items at every budget, and they are asked after
evictions have begun. The value of a sample is the share of its counted items that are right; a sample without such items uses all.
`rows` are those of results files, one per recipe, budget and task, and one for the task "mean", whose i-th sample is the mean of the
i-th samples of all tasks:

    scorer         the recipe's word on the selection axis, or "full"
    budget         tokens; null where the recipe names none. In "mean" what it is at the asked length, whatever lengths tasks have
    length         tokens of a sample: as asked for, or the longest sample where that is longer or the task has a length of its own
    accuracy       with low and high, its 95 % interval, over the n values in `samples`
    ratio          bf16 bytes of all tokens that were read over the measured bytes held at the end (sliding layers: of what they hold)
    peak_bytes     the greatest `cache.nbytes` seen after a chunk, over the rows of its batch; inside a chunk it can be more
    working_set    tokens of a sample that any solver must keep, mean
    against        the paired difference to a rival at the same budget, where one was named

Nothing here prints or plots; see `curves`.
"""

import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvstack.errors import BadInputError, RecipeError
from kvstack.eval import metrics
from kvstack.eval.future import futures
from kvstack.eval.runner import REFERENCE
from kvstack.eval.suite import DFS_PUBLIC, Batch, SuiteConfig, task_batches
from kvstack.hf import models
from kvstack.hf.cache import Cache, CompressedLayer
from kvstack.lab.registry import load
from kvstack.profile import Profile
from kvstack.recipe import Recipe
from kvstack.scorers.base import Future

Row = dict[str, Any]
Budget = float  # tokens, or below 1 a share of the length
PLACE = re.compile(r"\bBUDGET\b")
CHUNK = 128  # tokens that are read at once, at most
MEAN = "mean"


def parse_budgets(parts: Sequence[str], length: int) -> list[Budget]:
    """Budgets such as 512 and 1/10.7, each once: of two that are as many tokens at `length`, the first. Raises BadInputError."""
    found: dict[int, Budget] = {}
    if not parts:
        raise BadInputError('There are no budgets. Give some, such as --budgets "1/4, 512".')
    for part in parts:
        if not re.fullmatch(r"[1-9]\d*|1/\d+(\.\d+)?", part) or (part.startswith("1/") and float(part[2:]) <= 1):
            raise BadInputError(f"{part!r} is no budget. Give whole tokens such as 512, or parts of the length such as 1/8.")
        budget = 1 / float(part[2:]) if "/" in part else float(part)
        found.setdefault(in_tokens(budget, length), budget)
    return list(found.values())


def in_tokens(budget: Budget, length: int) -> int:
    """The tokens that a budget is at `length`."""
    return int(budget) if budget >= 1 else max(1, round(budget * length))


@dataclass(frozen=True)
class Stack:
    """A recipe as text, maybe with BUDGET in it."""

    text: str

    @property
    def open(self) -> bool:
        """Whether it has a place for a budget."""
        return PLACE.search(self.text) is not None

    def at(self, tokens: int | None) -> Recipe:
        """The recipe at a budget. Raises RecipeError."""
        return Recipe.parse(PLACE.sub(str(tokens), self.text))


@dataclass
class Measured:
    """What one recipe did on the batches of one task. values: per sample; read, held: bytes; peak: bytes of a row."""

    values: list[float] = field(default_factory=list)
    read: int = 0
    held: int = 0
    peak: float = 0.0


@dataclass(frozen=True)
class Cell:
    """A stack at one budget; None for a stack without."""

    stack: Stack
    budget: Budget | None

    def tokens(self, length: int) -> int | None:
        """The budget in tokens."""
        return None if self.budget is None else in_tokens(self.budget, length)

    def recipe(self, length: int) -> Recipe:
        """The recipe for samples of `length` tokens. Raises RecipeError."""
        return self.stack.at(self.tokens(length))


@torch.inference_mode()
def read(
    model: Any, recipe: Recipe, batch: Batch, profile: Profile | None = None, future: Mapping[int, Future] | None = None
) -> tuple[Tensor, Cache, int]:
    """Read a batch through a cache of `recipe`, in chunks of at most 128 tokens.

    Returns the first choices `[B, T]` at every position (on the CPU), the cache, and the most bytes that it held after a chunk.
    """
    cache = Cache(model, recipe, profile=profile, prefill="strict")
    for layer in cache.layers:
        if future is not None and isinstance(layer, CompressedLayer):
            layer.future = future[layer.index]
    chunk = CHUNK if recipe.selection is None else min(CHUNK, recipe.selection.interval)  # as strict prefill asks
    real = torch.arange(batch.tokens.shape[1]) < torch.tensor(batch.lengths)[:, None]
    choices, peak = [], 0
    for start in range(0, batch.tokens.shape[1], chunk):
        tokens, mask = batch.tokens[:, start : start + chunk].to(model.device), real[:, : start + chunk]
        padding = None if mask.all() else mask.long().to(model.device)
        out = model(input_ids=tokens, attention_mask=padding, past_key_values=cache, use_cache=True)
        choices.append(out.logits.argmax(-1).cpu())
        peak = max(peak, cache.nbytes)
    return torch.cat(choices, 1), cache, peak


def share_right(choices: Tensor, tokens: Tensor, items: Sequence[tuple[int, int]], length: int) -> float:
    """The value of a sample: `choices` and `tokens [T]`, of which `length` are its own; see the module."""
    counted = [(a, b) for a, b in items if 2 * a >= length] or items
    # The token at position p is predicted at position p - 1.
    right = [torch.equal(choices[a - 1 : b - 1], tokens[a:b]) for a, b in counted]
    return sum(right) / len(right)


def _no_progress(done: int, total: int) -> None:
    pass


def evaluate(
    model: Any,
    name: str,
    tokenizer: Any,
    recipes: Sequence[str],
    budgets: Sequence[Budget],
    cfg: SuiteConfig,
    text: str,
    profiles: Mapping[str, Profile | None],
    against: str | None = None,
    progress: Callable[[int, int], None] = _no_progress,
    workers: int = 0,
) -> list[Row]:
    """The rows of `recipes` of the model `name` at `budgets`, on the tasks of `cfg`.

    text: to quote from. profiles: of each task. against: the rival, one of the recipes. workers: processes that share the work, each
    with the model `name` of its own (a small model leaves a GPU idle); 0 for this one alone. Raises BadInputError for samples that do
    not fit the model or that are too few for an interval, and RecipeError for a recipe that does not parse or leaves none to select.
    """
    cells = _cells([REFERENCE, *recipes], budgets, cfg.length)
    rival = None if against is None else _rival(against, cells, budgets, cfg.length)
    if cfg.task_samples < 2 or not cfg.tasks:
        raise BadInputError("A mean of fewer than two samples has no interval. Ask for a task and for two samples or more.")
    batches = task_batches(tokenizer, text, cfg)
    lengths = {task: _length(task, [b for b in batches if b.kind == task], cfg) for task in cfg.tasks}
    models.check_context(model, max(lengths.values()), "Ask for shorter sequences.")
    for task, length in lengths.items():
        for cell in cells:  # one that does not fit is refused before the long work
            try:
                Cache(model, cell.recipe(length), profile=profiles[task])
            except RecipeError as e:
                raise RecipeError(f"{e}\nThis is the task {task} with samples of {length} tokens.") from e
    jobs = [(cell, task) for task in cfg.tasks for cell in cells]
    works = [(cell.recipe(lengths[task]), task) for cell, task in jobs]
    measured = {}
    with _workers(workers, model, name, batches, profiles) as results:
        for i, (job, found) in enumerate(zip(jobs, results(works), strict=True)):
            measured[job] = found
            progress(i + 1, len(jobs))
    needed = {task: float(np.mean([w for b in batches if b.kind == task for w in b.working_sets])) for task in cfg.tasks}
    if len(cfg.tasks) > 1:
        lengths[MEAN], needed[MEAN] = cfg.length, float(np.mean(list(needed.values())))
        for cell in cells:
            measured[cell, MEAN] = _mean([measured[cell, task] for task in cfg.tasks])
    return [_row(name, cell, task, lengths[task], needed[task], measured, rival) for cell in cells for task in lengths]


def _cells(recipes: Sequence[str], budgets: Sequence[Budget], length: int) -> list[Cell]:
    """Every stack at every budget, in order and each once."""
    found: dict[tuple[bool, str], Cell] = {}
    for stack in map(Stack, recipes):
        for budget in budgets if stack.open else [None]:
            cell = Cell(stack, budget)
            found.setdefault((stack.open, str(cell.recipe(length))), cell)
    return list(found.values())


def _rival(against: str, cells: Sequence[Cell], budgets: Sequence[Budget], length: int) -> Stack:
    """The stack that `against` names."""
    wanted = _cells([against], budgets, length)[0]
    for cell in cells:
        if (cell.budget, cell.recipe(length)) == (wanted.budget, wanted.recipe(length)):
            return cell.stack
    raise BadInputError(f"--against {against} is none of the recipes. Name one that is measured.")


def _length(task: str, batches: Sequence[Batch], cfg: SuiteConfig) -> int:
    longest = max(n for b in batches for n in b.lengths)
    return longest if task == DFS_PUBLIC else max(cfg.length, longest)


Work = tuple[Recipe, str]  # on a task


def _measure(model: Any, batches: Sequence[Batch], profiles: Mapping[str, Profile | None], work: Work) -> Measured:
    """What one recipe does on one task."""
    recipe, task = work
    out = Measured()
    for batch in (b for b in batches if b.kind == task):
        future = None
        if recipe.selection is not None and "future" in recipe.selection.needs:
            future = futures(model, batch.tokens, batch.lengths)
        choices, cache, peak = read(model, recipe, batch, profiles[task], future)
        for row in zip(choices, batch.tokens, batch.items, batch.lengths, strict=True):
            out.values.append(share_right(*row))
        out.read += cache.bf16_nbytes
        out.held += cache.nbytes
        out.peak = max(out.peak, peak / len(batch.tokens))
    return out


@contextmanager
def _workers(
    count: int, model: Any, name: str, batches: Sequence[Batch], profiles: Mapping[str, Profile | None]
) -> Iterator[Callable[[Sequence[Work]], Iterable[Measured]]]:
    """A function that measures works in order: here, or in `count` processes."""
    if not count:
        yield lambda works: (_measure(model, batches, profiles, work) for work in works)
        return
    fresh = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU
    with ProcessPoolExecutor(count, fresh, _begin, (name, batches, profiles)) as pool:
        yield lambda works: pool.map(_work, works)


_held: dict[str, Any] = {}  # of a worker


def _begin(name: str, batches: Sequence[Batch], profiles: Mapping[str, Profile | None]) -> None:
    _held.update(model=load(name)[0], batches=batches, profiles=profiles)


def _work(work: Work) -> Measured:
    return _measure(_held["model"], _held["batches"], _held["profiles"], work)


def _mean(tasks: Sequence[Measured]) -> Measured:
    values = np.mean([m.values for m in tasks], 0).tolist()
    return Measured(values, sum(m.read for m in tasks), sum(m.held for m in tasks), max(m.peak for m in tasks))


def _row(
    name: str,
    cell: Cell,
    task: str,
    length: int,
    needed: float,
    measured: Mapping[tuple[Cell, str], Measured],
    rival: Stack | None,
) -> Row:
    m, recipe = measured[cell, task], str(cell.recipe(length))
    e = metrics.mean(m.values) if task == MEAN else metrics.proportion(m.values)
    row: Row = {
        "model": name, "scorer": recipe.partition("(")[0] if cell.recipe(length).selection else "full", "recipe": recipe,
        "budget": cell.tokens(length), "length": length, "task": task, "accuracy": e.mean, "low": e.low, "high": e.high, "n": e.n,
        "ratio": m.read / m.held, "peak_bytes": round(m.peak), "working_set": needed, "samples": m.values,
    }  # fmt: skip
    if rival is not None:
        other = Cell(rival, cell.budget if rival.open else None)
        if (other, task) in measured:
            e = metrics.paired(m.values, measured[other, task].values)
            row["against"] = {"recipe": str(other.recipe(length)), "mean": e.mean, "low": e.low, "high": e.high}
    return row
