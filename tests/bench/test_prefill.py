"""`bench prefill`: what is computed, by torch and in Triton's interpreter, and rows and tables; all but time, which needs a GPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend

from kvstack.bench import own, peers, prefill, report, trial
from kvstack.bench.contender import Contender
from kvstack.bench.peers import sdpa
from kvstack.bench.problem import Problem, attention, random_queries, random_tokens
from kvstack.environment import write_results
from kvstack.errors import BadInputError, RecipeError
from kvstack.kernels.decode import Path as KernelPath

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # in Triton's interpreter
CPU = torch.device("cpu")
GPU = torch.cuda.is_available()
SMALL = Problem((3, 200), heads=4, kv_heads=2, head_dim=64, queries=5)


def test_attention_of_many_queries_is_that_of_each() -> None:
    q, (k, v) = random_queries(SMALL, CPU), random_tokens(SMALL, CPU)
    assert q.shape == (2, 4, 5, 64)
    out = attention(q, k, v, SMALL)
    for t in range(5):
        torch.testing.assert_close(out[:, :, t], attention(q[:, :, t], k, v, SMALL))


@pytest.mark.skipif(GPU, reason="on a GPU the benchmark itself checks")
@pytest.mark.parametrize("bits", ["4", "3", "2", "8", "k4v2"])
def test_our_own_runs_compute_what_they_are_checked_against(bits: str) -> None:
    (c,) = prefill.contenders(bits, 128)
    c = replace(c, lengths=(1, 127, 300))
    assert c.small(replace(SMALL, queries=2048)).queries == 333
    assert c.error(Problem((1,), 4, 2, 128, queries=9), CPU) < 1e-5


@pytest.mark.skipif(GPU, reason="on a GPU the benchmark itself checks")
@pytest.mark.parametrize("bits", ["4", "k8v3"])
def test_the_launches_in_the_interpreter(bits: str) -> None:
    pytest.importorskip("triton")

    def attend(q: torch.Tensor, body: own.Body, shape: own.Shape) -> torch.Tensor:
        return prefill.attend(q, body, shape, KernelPath("portable", "to test it"))

    (c,) = own.contenders(bits, 128, attend)
    c = replace(c, lengths=(130, 1, 257))
    assert c.error(Problem((1,), 4, 2, 128, queries=9), CPU) < 2e-3


@pytest.mark.skipif(GPU, reason="on a GPU the benchmark itself checks")
def test_sdpa_takes_many_queries() -> None:
    c = Contender("x", "bf16", 1e-2, lambda _: None, lambda p, d: sdpa._build(SDPBackend.MATH, p, d), lengths=(64, 64))
    assert 0 < c.error(SMALL, CPU) < 1e-2


def test_peers() -> None:
    found = peers.select("sdpa, flash3", peers.PREFILL)
    assert len({(c.name, c.bits) for c in found}) == len(found) and {c.bits for c in found} == {"bf16", "fp8"}
    assert "FlashAttention-3, no pages" in {c.name for c in found}
    with pytest.raises(BadInputError, match=r"no peer 'turboquant'\. Give some of: sdpa, flash3"):
        peers.select("turboquant", peers.PREFILL)
    if not GPU:
        assert {c.missing(SMALL) for c in [*found, *prefill.contenders("4", 128)]} == {"there is no CUDA GPU"}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [("16", BadInputError, "codes of 2 to 8 bits"), ("k16v4", BadInputError, "2 to 8 bits"), ("5", RecipeError, "no page format")],
)
def test_bits_that_are_not_read(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prefill.contenders(text, 128)


@pytest.mark.skipif(GPU, reason="here they may run")
def test_those_that_cannot_run_have_rows_with_reasons() -> None:
    seen: list[tuple[int, int]] = []
    problem = Problem((300,), 4, 2, 128, queries=9)
    found = prefill.measure(problem, prefill.contenders("4, 2", 128), CPU, 5, lambda *at: seen.append(at))
    assert [r["reason"] for r in found] == ["there is no CUDA GPU"] * 2 and found[0]["ms"] is None and found[0]["T"] == 9
    assert seen == [(1, 2), (2, 2)]


def rows() -> list[trial.Row]:
    problem = Problem((32768,), 32, 8, 128, queries=2048)
    times = {"SDPA flash": 5000.0, "SDPA cudnn": 4000.0}
    found = []
    for c in [*prefill.contenders("4", 128), *peers.select("sdpa, flash3", peers.PREFILL)]:
        us = 2500.0 if c.name == own.NAME else times.get(c.name)
        measured = {"us": us, "nbytes": 1, "calls": 3, "replays": 5, "error": 1e-3, "detail": "made up"}
        found.append(prefill.row(problem, c, measured if us else {"reason": "vllm is not installed"}))
    return prefill.compared(found)


def test_rows_have_one_schema_and_can_be_written(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", "kvstack bench prefill", rows())
    found = json.loads((tmp_path / "r.json").read_text())["rows"]
    for row in found:
        what = {"T", "N", "Hq", "Hkv", "D", "name", "bits", *prefill.MEASURED}
        assert set(row) == what | ({"reason"} if row["ms"] is None else set())
    ours, flash = found[0], next(r for r in found if r["name"] == "SDPA flash")
    assert (ours["T"], ours["N"], ours["Hq"], ours["Hkv"], ours["D"]) == (2048, 32768, 32, 8, 128)
    assert ours["ms"] == 2.5 and ours["vs_bf16"] == 1.6 and flash["vs_bf16"] == 0.8
    assert ours["tflops"] == pytest.approx(4 * 32 * 2048 * 32768 * 128 / 2.5e-3 / 1e12)


def test_tables() -> None:
    console = Console(width=200, record=True)
    (table,) = report.tables(rows(), prefill.LAYOUT)
    console.print(table)
    text = console.export_text()
    assert "2,048 new tokens over 32,768, 32 query heads, 8 KV heads of 128" in text and "1.60" in text and "made up" in text
    assert text.index(" 2.500 ") < text.index(" 4.000 ") < text.index(" 5.000 ")
    assert len(report.left_out(rows())) == 6
