"""Rows, tables and plots of `bench decode`, from made-up times, and time itself where there is a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from kvstack.bench import decode, own, report, timing, trial
from kvstack.bench.contender import Contender, Run
from kvstack.bench.problem import Problem
from kvstack.environment import write_results
from kvstack.errors import KVStackError

torch.set_num_threads(1)
CPU = torch.device("cpu")
TIMES = {("kvstack", "4"): 50.0, ("kvstack", "k4v2"): 40.0, ("A", "bf16"): 200.0, ("B", "bf16"): 150.0, ("C", "fp8"): 100.0}


def fake(name: str, bits: str, factor: float = 1.0, missing: str | None = None) -> Contender:
    want = torch.ones(1, 4, 8, dtype=torch.float64)
    run = Run(lambda: want.float() * factor, lambda: want, 100, "made up")
    return Contender(name, bits, 1e-2, lambda _: missing, lambda problem, device: run, lengths=(1,))


def rows(shapes: tuple[str, ...] = ("1x4096", "32x32768")) -> list[decode.Row]:
    out = []
    for i, shape in enumerate(shapes):
        p = Problem.parse(shape, 32, 8, 128)
        group = [
            decode.row(p, fake(*who), {"us": (i + 1) * us, "tb_s": 2.0, "of_copy": 0.5, "error": 1e-3}) for who, us in TIMES.items()
        ]
        out += decode.compared([*group, decode.row(p, fake("D", "4"), {"reason": "vllm is not installed"})])
    return out


def test_rows_have_one_schema_and_can_be_written(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", "kvstack bench decode", rows())
    found = json.loads((tmp_path / "r.json").read_text())
    assert torch.__version__.startswith(found["environment"]["torch"])  # of the package, which may not name its build
    keys = {"B", "N", "Hq", "Hkv", "D", "name", "bits", *decode.MEASURED}
    for row in found["rows"]:
        assert set(row) == keys | ({"reason"} if row["us"] is None else set())
        assert (row["us"] is None) == (row["name"] == "D") and (row["Hq"], row["Hkv"], row["D"]) == (32, 8, 128)


def test_ratios_are_to_the_best_peer_of_a_kind() -> None:
    by_name = {(r["N"], r["name"], r["bits"]): r for r in rows()}
    assert by_name[4096, "kvstack", "4"]["vs_bf16"] == 3 and by_name[4096, "kvstack", "4"]["vs_fp8"] == 2
    assert by_name[32768, "A", "bf16"]["vs_bf16"] == 0.75 and by_name[32768, "D", "4"]["vs_bf16"] is None
    p = Problem((1,))
    (alone,) = decode.compared([decode.row(p, fake("kvstack", "4"), {"us": 1.0})])
    assert alone["vs_bf16"] is None and alone["vs_fp8"] is None


def test_tables_are_sorted_and_say_who_did_not_run() -> None:
    console = Console(width=200, record=True)
    for table in report.tables(rows()):
        console.print(table)
    text = console.export_text()
    assert text.count("rows x tokens") == 2 and "32 x 32,768, 32 query heads, 8 KV heads of 128" in text
    assert text.index(" 40.0 ") < text.index(" 50.0 ") < text.index(" 100.0 ") < text.index(" 150.0 ") < text.index(" 200.0 ")
    assert "50%" in text and "3.75" in text and "\nD " not in text
    assert report.left_out(rows()) == ["D (4) did not run: vllm is not installed"]


@pytest.mark.parametrize("shapes", [("1x4096",), ("1x4096", "8x8192", "1x16", "2x16")])
def test_a_plot_has_a_panel_per_problem_and_a_bar_per_contender(tmp_path: Path, shapes: tuple[str, ...]) -> None:
    fig = report.figure(rows(shapes), "title")
    assert [len(ax.patches) for ax in fig.axes] == [len(TIMES)] * len(shapes)
    assert [bar.get_width() for bar in fig.axes[0].patches] == sorted(TIMES.values(), reverse=True)
    report.write_plot(rows(shapes), "title", tmp_path / "p.png")
    assert imread(tmp_path / "p.png")[..., :3].std() > 0.01


def test_a_plot_of_nothing_that_ran(tmp_path: Path) -> None:
    nothing = [r for r in rows() if r["us"] is None]
    report.write_plot(nothing, "title", tmp_path / "p.png")
    assert all(not table.row_count for table in report.tables(nothing))


def test_a_slow_peer_does_not_squeeze_the_plot() -> None:
    p = Problem.parse("1x4096", 32, 8, 128)
    slow = decode.row(p, fake("slow", "4"), {"us": 9999.0})
    ax = report.figure([*rows(("1x4096",)), slow], "title").axes[0]
    assert sorted(bar.get_width() for bar in ax.patches) == [40, 50, 100, 150, 200, 300]
    assert [bar.get_hatch() for bar in ax.patches].count("//") == 1 and " 9,999" in [t.get_text() for t in ax.texts]


def check(contender: Contender) -> decode.Row:
    return trial.check(contender, Problem((1,), 4, 2, 8), CPU)


def test_nothing_of_ours_is_timed_on_a_red_check() -> None:
    assert check(fake(own.NAME, "4")) == {"error": 0.0}
    for factor in (1.1, float("nan")):
        with pytest.raises(KVStackError, match="4 bits was not timed: its output is wrong by"):
            check(fake(own.NAME, "4", factor))


def test_a_check_is_made_once_for_problems_that_have_it_in_common() -> None:
    built: list[Problem] = []

    def build(problem: Problem, _: torch.device) -> Run:
        built.append(problem)
        return Run(lambda: torch.ones(1), lambda: torch.ones(1), 100, "made up")

    c = Contender(own.NAME, "4", 1e-2, lambda p: "it is too long" if p.tokens > 1 else None, build, lengths=(1,))
    problems = [Problem.parse(shape, 4, 2, 8) for shape in ("1x5", "8x9")]
    found = list(trial.trials(problems, [c], CPU, 1, lambda *_: None))
    assert [p for p, _ in found] == problems and built == [problems[0].like((1,))]
    assert [row for _, ((_, row),) in found] == [{"error": 0.0, "reason": "it is too long"}] * 2


def test_a_peer_that_is_wrong_or_fails_is_left_out_with_a_reason() -> None:
    assert "wrong by 1.0e-01" in check(fake("A", "bf16", 1.1))["reason"]
    assert check(fake("A", "bf16", missing="it is not installed")) == {"reason": "it is not installed"}

    def fails(*_: Any) -> Run:
        raise RuntimeError("no kernel\nand a stack")

    assert check(Contender("A", "bf16", 1e-2, lambda _: None, fails)) == {"reason": "RuntimeError: no kernel"}
    with pytest.raises(RuntimeError):  # a failure of ours is a bug, and keeps its traceback
        check(Contender(own.NAME, "4", 1e-2, lambda _: None, fails))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is one")
def test_there_must_be_a_gpu() -> None:
    with pytest.raises(KVStackError, match="Run it on a machine with one"):
        trial.gpu()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_time_on_a_gpu() -> None:
    device = trial.gpu()
    x = torch.randn(1 << 28, device=device)
    found = timing.time_calls([x.sin_, x.cos_], replays=3)
    assert found.calls % 2 == 0 and 0.3 < 2 * x.nbytes / found.us / 1e6 / timing.copy_tb_s(device) < 1.3
    assert timing.copies(x.nbytes, device) == 1 and timing.copies(1 << 20, device) > 100
