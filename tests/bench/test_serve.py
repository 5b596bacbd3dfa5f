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
HELD = ["bf16", "fp8", "int4_per_token_head", "polar4", "tri(3072)+polar4"]  # engines that ran
FAILED = {"engine": "vLLM", "kv": "int4_per_token_head", "kind": "failed", "B": None, "N": None, "reason": "RuntimeError: it failed"}
FULL = {"engine": "vLLM", "kv": "bf16", "kind": "step", "B": 32, "N": 32768, "reason": "777296 tokens fit", "capacity_tokens": 777296}


def one(kv: str, kind: str, b: int | None = None) -> dict[str, Any]:
    """The row of a kind, of so many rows of 16,384 tokens if there are several."""
    (row,) = (r for r in ROWS if (r["kv"], r["kind"]) == (kv, kind) and (b is None or (r["B"], r["N"]) == (b, 16384)))
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
    found = serve_report.measured(ROWS)
    assert all(r["kind"] != "failed" for r in found) and [r["kv"] for r in found if r["kind"] == "capacity"] == HELD
    assert all(serve_report.factor(r, found) == 1 for r in found if r["kv"] == "bf16")
    for kv, kind, b in [
        ("polar4", "largest", None),
        ("polar4", "generation", None),
        ("tri(3072)+polar4", "generation", None),
        ("fp8", "step", 32),
    ]:
        r = one(kv, kind, b)
        assert serve_report.factor(r, found) == r["tokens_per_s"] / one("bf16", kind, b)["tokens_per_s"]
        assert serve_report.factor(r, [r]) is None


def test_tables_have_the_numbers_and_their_factors() -> None:
    largest, steps, prompts = cells(ROWS)
    polar, base = one("polar4", "largest"), one("bf16", "largest")
    long, short = one("polar4", "generation"), one("bf16", "generation")
    assert [line[1] for line in largest] == HELD
    assert [
        "vLLM + kvstack", "polar4", "3,038,208", f"{3038208 / 777296:.2f}",
        "92", f"{polar['tokens_per_s']:,.0f}", f"{polar['tokens_per_s'] / base['tokens_per_s']:.2f}",
        "92", f"{long['tokens_per_s']:,.0f}", f"{long['tokens_per_s'] / short['tokens_per_s']:.2f}",
    ] in largest  # fmt: skip
    assert largest[-1][:7] == ["vLLM + kvstack", "tri(3072)+polar4", "3,039,872", f"{3039872 / 777296:.2f}", "-", "-", "-"]
    step, other = one("polar4", "step", 32), one("bf16", "step", 32)
    times = f"{other['ms_per_step'] / step['ms_per_step']:.2f}"
    assert ["vLLM + kvstack", "polar4", "32 x 16,384", f"{step['ms_per_step']:.2f}", f"{step['tokens_per_s']:,.0f}", times] in steps
    assert len(steps) == sum(r["kind"] == "step" for r in ROWS)
    assert [line[2] for line in prompts] == ["4 x 16,384"] * 4 + ["2 x 32,768"] * 4


def test_what_was_not_measured_is_told() -> None:
    assert serve_report.left_out([FAILED, FULL, FULL]) == [
        "vLLM, int4_per_token_head: not measured: RuntimeError: it failed",
        "vLLM, bf16, step, 32 x 32,768: not measured: 777296 tokens fit",
    ]
    assert [line.split(":")[0] for line in serve_report.left_out(ROWS)] == ["vLLM, turboquant_4bit_nc"]
    assert serve_report.tables([FAILED]) == [] and cells([FULL]) == [[["vLLM", "bf16", "777,296", "1.00"]]]


def test_the_figure_has_a_bar_for_every_engine_and_says_who_was_not_measured() -> None:
    capacity, largest, generation, *steps = serve_report.figure(ROWS, "title").axes
    names = [t.get_text().split("\n")[0] for t in capacity.get_yticklabels()][::-1]
    assert names == [*HELD, "turboquant_4bit_nc"]
    assert capacity.get_ylim()[0] < 0 < len(names) - 1 < capacity.get_ylim()[1], "each engine has its place, also without a bar"
    texts = {ax: [t.get_text() for t in ax.texts][::-1] for ax in (capacity, largest, generation, *steps)}
    assert [sum("not measured" in t for t in some) for some in texts.values()] == [1, 2, 1, 2, 2, 2, 2, 2]
    points = "1 x 32,768", "8 x 32,768", "32 x 4,096", "32 x 16,384", "128 x 2,048"
    assert [ax.get_title(loc="left") for ax in steps] == [f"ms a step, {point} tokens (less is better)" for point in points]
    one_less = [r for r in ROWS if (r["kv"], r["kind"], r["N"]) != ("fp8", "step", 4096)]
    panels = sum(ax.axison for ax in serve_report.figure(one_less, "title").axes)
    assert panels == 7, "points at which not all engines were timed have none"

    polar, base = one("polar4", "largest"), one("bf16", "largest")
    y = HELD.index("polar4")
    assert texts[largest][y] == f" {polar['tokens_per_s']:,.0f}\n {polar['tokens_per_s'] / base['tokens_per_s']:.2f}x, 92 rows"
    (bar,) = (p for p in largest.patches if p.get_y() < len(names) - 1 - y < p.get_y() + p.get_height())
    assert bar.get_width() == polar["tokens_per_s"]
    assert texts[capacity][1] == f" 1,554,256\n {1554256 / 777296:.2f}x"


def test_a_figure_of_nothing(tmp_path: Path) -> None:
    serve_report.write_plot([FAILED], "title", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
