"""Low-rank decode measured: what runs compute and how many bytes they are, and rows of made-up times; time itself needs a GPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstack.bench import lowrank, trial
from kvstack.bench.contender import NAME, Contender, Run
from kvstack.bench.problem import Problem
from kvstack.environment import write_results
from kvstack.errors import KVStackError

torch.set_num_threads(1)
CPU = torch.device("cpu")
GPU = torch.cuda.is_available()
KEYS = {"kernel", "variant", "B", "N", "H", "D", "rank", "bytes", "us", "tb_per_s", "speedup_over_best_mha", "error", "detail"}
SMALL = Problem((40, 7), heads=4, kv_heads=4, head_dim=64)


def fake(name: str, bits: str, factor: float = 1.0) -> Contender:
    run = Run(lambda: factor * torch.ones(8), lambda: torch.ones(8, dtype=torch.float64), 100, "made up")
    return Contender(name, bits, 1e-2, lambda _: None, lambda problem, device: run)


@pytest.mark.skipif(GPU, reason="on a GPU the benchmark itself checks")
@pytest.mark.parametrize("variant", lowrank.VARIANTS)
def test_runs_compute_what_they_are_checked_against(variant: str) -> None:
    (c,) = lowrank.contenders((variant,), (12,))
    assert replace(c, lengths=SMALL.lengths).error(SMALL, CPU) < 1e-6
    out = c.build(SMALL, CPU).call()
    assert out.shape == (2, 4, 64) and out.isfinite().all()


@pytest.mark.parametrize(("rank", "share"), [(56, 0.46875), (60, 0.5), (64, 0.53125)])
def test_bytes_are_one_part_of_h_and_the_rank(rank: int, share: float) -> None:
    (c,) = lowrank.contenders(("nope",), (rank,))
    p = Problem((9,), heads=32, kv_heads=32, head_dim=128)
    assert c.build(p, CPU).nbytes == share * 9 * 2 * 32 * 128 * 2 and share == 1 / 32 + rank / 128


def test_rows_compare_with_the_fastest_peer(tmp_path: Path) -> None:
    group = [
        (fake("A", "bf16"), {"us": 100.0, "nbytes": 200_000_000, "error": 1e-3, "detail": "a"}),
        (fake("B", "bf16"), {"us": 90.0, "nbytes": 200_000_000, "error": 1e-3, "detail": "b"}),
        (fake("C", "bf16"), {"reason": "it is not installed"}),
        (fake(NAME, "nope 60"), {"us": 45.0, "nbytes": 100_000_000, "error": 1e-3, "detail": "ours"}),
    ]
    rows = lowrank.rows(Problem((32768,) * 32, 32, 32, 128), group)
    write_results(tmp_path / "r.json", "made up", rows)
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == rows
    assert all(set(r) == KEYS | ({"reason"} if r["us"] is None else set()) for r in rows)
    assert [(r["kernel"], r["variant"], r["rank"]) for r in rows] == [*((x, "mha", None) for x in "ABC"), (NAME, "nope", 60)]
    assert [r["speedup_over_best_mha"] for r in rows] == [0.9, 1.0, None, 2.0]
    assert rows[3]["tb_per_s"] == pytest.approx(100 / 45) and (rows[3]["B"], rows[3]["N"], rows[3]["H"]) == (32, 32768, 32)


def test_a_wrong_kernel_is_not_timed() -> None:
    with pytest.raises(KVStackError, match="nope 60 bits was not timed"):
        trial.check(fake(NAME, "nope 60", 1.1), SMALL, CPU)
    with pytest.raises(AssertionError, match="keys of its own"):
        lowrank.measure([Problem((9,), 8, 2)], [], CPU, 1, lambda *_: None)


@pytest.mark.skipif(GPU, reason="here they may run")
def test_who_takes_part_and_why_they_cannot_run() -> None:
    found = [*lowrank.contenders(), *lowrank.mha()]
    assert {c.bits for c in found} == {"bf16", *(f"{v} {r}" for v in lowrank.VARIANTS for r in lowrank.RANKS)}
    assert len(lowrank.mha()) >= 5 and all(c.missing(SMALL) == "there is no CUDA GPU" for c in found)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_times() -> None:
    p = Problem((2048, 2048), heads=8, kv_heads=8, head_dim=128)
    found = lowrank.measure([p], [*lowrank.contenders(ranks=(60,)), *lowrank.mha()], trial.gpu(), 3, lambda *_: None)
    assert all(r["us"] or "reason" in r for r in found) and any(r["variant"] == "mha" and r["us"] for r in found)
