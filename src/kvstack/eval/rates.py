"""Runs of `lab.pretrain` that differ in how they learn: which learning rate suits which architecture.

Rows: arm, seed, tokens, optimizer, per_head, matrix_lr, tuning_loss (nats a token, when the run ended), best. Of an arm's runs over
most tokens the one of the least tuning loss is the best; shorter ones are first looks. All runs have one seed, which should not be one
that is reported. The test text plays no part.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstack.errors import BadInputError
from kvstack.eval.architectures import Row, arm, read_run
from kvstack.eval.page import Table
from kvstack.lab.optim import MUON

SHARED = ("width", "layers", "heads", "head_dim", "feed_forward", "batch", "lengths", "looks", "other_lr", "seed", "data_seed")


def rate_rows(folders: Sequence[Path]) -> list[Row]:
    """A row for every run in `folders`, arm by arm. Raises BadInputError when one is no finished run, or differs in more."""
    runs = [read_run(folder) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        differing = [key for key in SHARED if run["config"][key] != runs[0]["config"][key]]
        differing += ["corpus"] * (run["corpus"] != runs[0]["corpus"])
        if differing:
            raise BadInputError(f"The runs {folders[0]} and {folder} differ in {', '.join(differing)}. Compare runs that share them.")
    rows = sorted(map(_row, runs), key=lambda r: (r["arm"], r["tokens"], _setting(r)))
    for row in rows:
        rivals = [r for r in rows if r["arm"] == row["arm"] and r["tokens"] >= row["tokens"]]
        row["best"] = row is min(rivals, key=lambda r: (-r["tokens"], r["tuning_loss"]))
    return rows


def _row(run: dict[str, Any]) -> Row:
    cfg = run["config"]
    own = {key: cfg[key] for key in ("seed", "tokens", "optimizer", "per_head", "matrix_lr")}
    return {"arm": arm(run), **own, "tuning_loss": run["curve"][-1]["tuning"]}


def _setting(row: Row) -> tuple[str, float]:
    """How a run learnt, as a word (none for Muon head by head), and its rate."""
    return ("" if row["per_head"] else "whole") if row["optimizer"] == MUON else row["optimizer"], row["matrix_lr"]


def are_mine(rows: Sequence[Row]) -> bool:
    """Whether these are rows of this module."""
    return {"matrix_lr", "tuning_loss", "best"} <= rows[0].keys()


def tables(rows: Sequence[Row]) -> list[Table]:
    """A line for every arm and number of tokens, a column for every setting; a star at the best."""
    found = {(r["arm"], r["tokens"], _setting(r)): f"{r['tuning_loss']:.4f}{'*' if r['best'] else ''}" for r in rows}
    settings = sorted({setting for *_, setting in found})
    lines = sorted({(name, tokens) for name, tokens, _ in found})
    cells = [(name, f"{tokens:,}", *(found.get((name, tokens, s), "") for s in settings)) for name, tokens in lines]
    head = ("arm", "tokens", *(f"{rate:g} {how}".strip() for how, rate in settings))
    return [Table("tuning loss by learning rate", head, cells)]
