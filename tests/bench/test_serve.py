"""What `bench serve` asks of its engines and makes of their rows, as far as a machine without a GPU and without vLLM can tell."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstack.bench import serve, serve_report
from kvstack.bench.engine_process import PEERS
from kvstack.bench.generate import SHAPES
from kvstack.bench.problem import pair
from kvstack.bench.serve import Arguments, Points
from kvstack.errors import BadInputError
from kvstack.recipe import Recipe

torch.set_num_threads(1)
ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "results" / "serving_h200.json").read_text("utf-8"))["rows"]
FAILED = {"engine": "vLLM", "kv": "int4_per_token_head", "kind": "failed", "B": None, "N": None, "reason": "RuntimeError: it failed"}
FULL = {"engine": "vLLM", "kv": "bf16", "kind": "step", "B": 32, "N": 32768, "reason": "777296 tokens fit", "capacity_tokens": 777296}


def one(kv: str, kind: str, run: int, b: int | None = None) -> dict[str, Any]:
    """The row of a kind in a run, of so many rows of 16,384 tokens if there are several."""
    (row,) = (r for r in ROWS if (r["kv"], r["kind"], r["run"]) == (kv, kind, run) and (b is None or (r["B"], r["N"]) == (b, 16384)))
    return row


def cells(rows: list[dict[str, Any]]) -> list[list[list[str]]]:
    """The text of all tables, line by line."""
    return [[list(map(str, line)) for line in zip(*(c.cells for c in t.columns), strict=True)] for t in serve_report.tables(rows)]


def test_texts_of_two_numbers() -> None:
    assert pair(" 32 x16384", "such") == (32, 16384)
    for text in ("0x4", "4x0", "x4", "4", "4x4x4", "-4x4", "4.0x4"):
        with pytest.raises(BadInputError, match=r"is no shape\. Give such"):
            pair(text, "such")


def test_neither_the_benchmark_nor_its_report_needs_vllm() -> None:
    """The engine alone may take the GPU's memory, and vLLM is not needed to look at rows."""
    code = "import sys, kvstack.cli.bench_serve; sys.exit(any(m.partition('.')[0] == 'vllm' for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("model", ["qwen3-8b", "a/folder"])
def test_engines_differ_in_nothing_but_the_cache(model: str) -> None:
    how = Arguments(rows=100, extra={"tensor_parallel_size": 2})
    made = {kv: serve._arguments(kv, Points(steps=((70, 100),)), model in SHAPES, how) for kv in (*PEERS, *serve.OWN)}
    assert [a.pop("kv_cache_dtype") for a in made.values()] == ["auto", *PEERS[1:], "auto", "auto"]
    first = made["bf16"]
    assert all(a == first for a in made.values())
    sizes = first["compilation_config"]["cudagraph_capture_sizes"]
    assert sizes == sorted(set(sizes)) and 70 in sizes and max(sizes) <= 100
    assert first["load_format"] == ("dummy" if model in SHAPES else "auto") and first["tensor_parallel_size"] == 2


def test_what_is_measured_is_known_before() -> None:
    found = serve.check("qwen3-8b", PEERS + serve.OWN, Points(), Arguments())
    assert found == dict.fromkeys(PEERS) | {kv: Recipe.parse(kv) for kv in serve.OWN}
    with pytest.raises(BadInputError, match="nothing to measure"):
        next(serve.measure("qwen3-8b", [], Points(), Arguments()))


def test_factors_are_over_bf16_of_the_same_kind_and_point() -> None:
    """Of the same run where it has them, else of one that allowed as many rows at once."""
    found = serve_report.measured([*ROWS, FAILED])
    assert FAILED not in found
    for r in found:
        times, same = serve_report.factor(r, found) or (0.0, False)
        assert r["kv"] != "bf16" or (times == 1 and same)
        both = r["run"] == 1 and (r["kind"] != "step" or (r["B"], r["N"]) in [(32, 16384), (1, 32768)])
        assert same == (r["kv"] == "bf16" or both)
    for r, base in [
        (one("polar4", "largest", 1), one("bf16", "largest", 1)),
        (one("polar4", "largest", 3), one("bf16", "largest", 1)),
        (one("polar4", "generation", 1), one("bf16", "generation", 1)),
        (one("tri(3072)+polar4", "generation", 2), one("bf16", "generation", 0)),
        (one("fp8", "step", 3, 32), one("bf16", "step", 1, 32)),
    ]:
        assert serve_report.factor(r, found) == (r["tokens_per_s"] / base["tokens_per_s"], r["run"] == base["run"])
        assert serve_report.factor(r, [r]) is None


def test_tables_have_the_numbers_and_their_factors() -> None:
    largest, steps, prompts = cells(ROWS)
    polar, fp8, base = one("polar4", "largest", 1), one("fp8", "largest", 3), one("bf16", "largest", 1)
    long, short = one("polar4", "generation", 1), one("bf16", "generation", 1)
    assert [
        "vLLM + kvstack", "polar4", "1", "3,064,704", f"{3064704 / 789328:.2f}",
        "93", f"{polar['tokens_per_s']:,.0f}", f"{polar['tokens_per_s'] / base['tokens_per_s']:.2f}",
        "93", f"{long['tokens_per_s']:,.0f}", f"{long['tokens_per_s'] / short['tokens_per_s']:.2f}",
    ] in largest  # fmt: skip
    assert [
        "vLLM", "fp8", "3", "1,578,672", f"{1578672 / 789328:.2f}*",
        "48", f"{fp8['tokens_per_s']:,.0f}", f"{fp8['tokens_per_s'] / base['tokens_per_s']:.2f}*", "-", "-", "-",
    ] in largest  # fmt: skip
    assert [line[:2] for line in largest[:2]] == [["vLLM", "bf16"]] * 2 and len(largest) == 6
    step, other = one("polar4", "step", 1, 32), one("bf16", "step", 1, 32)
    times = f"{other['ms_per_step'] / step['ms_per_step']:.2f}"
    assert [
        "vLLM + kvstack",
        "polar4",
        "1",
        "32 x 16,384",
        f"{step['ms_per_step']:.2f}",
        f"{step['tokens_per_s']:,.0f}",
        times,
    ] in steps
    assert len(steps) == sum(r["kind"] == "step" for r in ROWS)
    assert [line[3] for line in prompts] == ["4 x 16,384"] * 4 + ["2 x 32,768"] * 3


def test_a_star_says_that_another_run_has_the_bf16() -> None:
    alone = [{k: v for k, v in r.items() if k not in ("run", "most_rows")} for r in ROWS if r["run"] == 1]
    for rows, several in ((ROWS, True), (alone, False)):
        tables = serve_report.tables(rows)
        assert {t.caption for t in tables} == {"*: over bf16 of another run" if several else None}
        assert all(("run" in [c.header for c in t.columns]) == several for t in tables)
        assert any("*" in cell for table in cells(rows) for line in table for cell in line) == several


def test_what_was_not_measured_is_told() -> None:
    assert serve_report.left_out([*ROWS, FAILED, FULL, FULL]) == [
        "vLLM, int4_per_token_head: not measured: RuntimeError: it failed",
        "vLLM, bf16, step, 32 x 32,768: not measured: 777296 tokens fit",
    ]
    assert serve_report.left_out(ROWS) == [] and serve_report.tables([FAILED]) == []
    assert cells([FULL]) == [[["vLLM", "bf16", "777,296", "1.00"]]]


def test_the_figure_has_a_bar_for_every_engine_and_says_who_was_not_measured() -> None:
    capacity, largest, generation, step = serve_report.figure([*ROWS, FAILED], "title").axes
    names = [t.get_text().split("\n")[0] for t in capacity.get_yticklabels()][::-1]
    assert names == ["bf16", "fp8", "polar4", "tri(3072)+polar4", "int4_per_token_head"]
    texts = {ax: [t.get_text() for t in ax.texts][::-1] for ax in (capacity, largest, generation, step)}
    assert [sum("not measured" in t for t in some) for some in texts.values()] == [1, 2, 2, 2]
    assert step.get_title(loc="left").startswith("ms a step, 32 x 16,384"), "at no other point all engines were timed"

    speeds, base = [one("polar4", "largest", run)["tokens_per_s"] for run in (1, 3)], one("bf16", "largest", 1)["tokens_per_s"]
    low, high = sorted(speeds)
    assert texts[largest][2] == f" {low:,.0f} to {high:,.0f}\n {low / base:.2f} to {high / base:.2f}x, 93 rows"
    (bar,) = (p for p in largest.patches if p.get_y() < 2 < p.get_y() + p.get_height())
    assert bar.get_width() == pytest.approx(sum(speeds) / 2)
    tri, plain = (one(kv, "generation", run)["tokens_per_s"] for kv, run in (("tri(3072)+polar4", 2), ("bf16", 0)))
    assert texts[generation][3] == f" {tri:,.0f}\n {tri / plain:.2f}x, 914 rows"
    assert texts[capacity][1] == f" 1,578,672\n {1578672 / 789328:.2f}x"


def test_a_figure_of_nothing(tmp_path: Path) -> None:
    serve_report.write_plot([FAILED], "title", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
