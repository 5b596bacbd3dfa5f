"""Two processes by torchrun, with DDP and with FSDP, against one: losses, weights, and checkpoints that any of them can go on from.

This file is also the program that the two processes run: one start for all cases, since it takes longer than they do.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvstack.errors import BadInputError
from kvstack.lab.corpus import Corpus
from kvstack.lab.optim import OPTIMIZERS
from kvstack.lab.parallel import SPREADS, World, joined
from kvstack.lab.pretrain import PretrainConfig, pretrain, small

torch.set_num_threads(1)
pytestmark = pytest.mark.slow
TEXT = np.random.default_rng(0).integers(3, 67, 4000).cumsum().astype(np.uint16) % 64 + 3
CORPUS = Corpus(TEXT[:3000], TEXT[3000:3400], TEXT[3400:], digest="sums", bytes_per_token=3.0)
# An odd width and rank: slices of matrices are not all alike. Rank 0 has empty ones.
CONFIG = replace(
    small(), width=33, heads=3, feed_forward=65, tokens=12 * 256, batch=256, lengths=((0.8, 32), (1.0, 64)), warmup=4, every=4,
    matrix_lr=3e-3, other_lr=3e-3, attention={"attention": "lrkv", "rank": 5},
)  # fmt: skip
CASES = {
    f"{spread}-{optimizer}": replace(CONFIG, parallel=spread, optimizer=optimizer) for spread in SPREADS for optimizer in OPTIMIZERS
}
CASES |= {f"{spread}-empty": replace(CONFIG, parallel=spread, attention={"attention": "lrkv", "rank": 0}) for spread in SPREADS}
CASES |= {f"{spread}-saving": replace(CONFIG, parallel=spread, checkpointing=True) for spread in SPREADS}
STOP = 6
ALONE = World(0, 1, torch.device("cpu"))


def run(cfg: PretrainConfig, out: Path, world: World = ALONE, **options: Any) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    return pretrain(cfg, CORPUS, out, world, report=lambda row: None, **options)


def main(out: Path) -> None:
    """What the two processes do: every case to its end, one part of it, and the rest of a part that one process began."""
    with joined() as world:
        assert world.size == 2
        for name, cfg in CASES.items():
            run(cfg, out / name / "whole", world)
            run(cfg, out / name / "begun", world, stop=STOP)
            run(cfg, out / name / "ended", world, resume=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, cfg in CASES.items():
        run(cfg, folder / name / "alone")
        run(cfg, folder / name / "ended", stop=STOP)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def facts(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "pretrain.json").read_text("utf-8")))


def check(folder: Path, alone: Path) -> None:
    """The losses of a run are those of the run of one process."""
    found, wanted = facts(folder), facts(alone)
    for a, b in zip(found["curve"], wanted["curve"], strict=True):
        for key in ("loss", "tuning", "test"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    for n, losses in wanted["test_losses"].items():
        assert found["test_losses"][n] == pytest.approx(losses, rel=2e-3)
    for key in ("parameters", "cache_bytes_per_token", "step"):
        assert found[key] == wanted[key]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_learns(name: str, out: Path) -> None:
    check(out / name / "whole", out / name / "alone")
    assert facts(out / name / "whole")["processes"] == 2
    curve = facts(out / name / "alone")["curve"]
    assert curve[0]["loss"] - curve[-1]["loss"] > 0.5, "a model that stands still would agree with anything"


@pytest.mark.parametrize("name", CASES)
def test_two_go_on_where_one_stopped(name: str, out: Path) -> None:
    check(out / name / "ended", out / name / "alone")


@pytest.mark.parametrize("name", CASES)
def test_one_goes_on_where_two_stopped(name: str, out: Path) -> None:
    run(CASES[name], out / name / "begun", resume=True)
    check(out / name / "begun", out / name / "alone")


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as world:
        assert world.first and world.size == 1 and world.mean(torch.tensor(3.0)) == 3.0


def test_windows_must_spread(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="do not spread over 3 processes"):
        pretrain(CONFIG, CORPUS, tmp_path, World(0, 3, torch.device("cpu")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # threads of gloo may live longer than the interpreter, which then aborts
