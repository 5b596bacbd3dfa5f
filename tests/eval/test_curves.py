"""Rows over budgets for people: every number in a table, a line for every stack, and pages that need nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvstack.eval.curves import compact, figures, stack, tables, write_plots
from kvstack.eval.report import markdown


def row(recipe: str, budget: int | None, task: str, accuracy: float, length: int = 1024, **more: Any) -> dict[str, Any]:
    scorer = "full" if budget is None and "(" not in recipe else recipe.partition("(")[0]
    return {
        "model": "bundled", "scorer": scorer, "recipe": recipe, "budget": budget, "length": length, "task": task, "accuracy": accuracy,
        "low": accuracy - 0.1, "high": accuracy + 0.1, "n": 2, "ratio": 4.0, "peak_bytes": 3 * 2**20, "working_set": 64.0,
        "samples": [accuracy, accuracy], **more,
    }  # fmt: skip


ROWS = [
    row(recipe.replace("#", str(budget)), budget, task, accuracy + 0.0001 * (budget or 0), 160 if task == "dfs_public" else 1024)
    for recipe, whole, accuracy in (
        ("bf16", True, 0.8), ("tri(#, interval=16)+polar4", False, 0.5), ("oracle(#)", False, 0.7), ("knorm(64)", True, 0.3),
    )
    for task in ("recall", "dfs_public", "mean")
    for budget in ([None] if whole else [20, 80] if task == "dfs_public" else [128, 512])
]  # fmt: skip
STACKS = ["bf16", "tri(BUDGET, interval=16)+polar4", "oracle(BUDGET)", "knorm(64)"]


def test_a_stack_is_a_recipe_without_its_budget() -> None:
    assert list(dict.fromkeys(map(stack, ROWS))) == STACKS
    assert stack(row("tri(16, interval=16)", 16, "recall", 1.0)) == "tri(BUDGET, interval=16)"


def test_tables_have_a_column_for_every_budget() -> None:
    recall, public, mean, memory = tables(ROWS)
    assert recall.head == mean.head == ("recipe", "128", "512", "no budget") and public.head == ("recipe", "20", "80", "no budget")
    assert [line[0] for line in recall.cells] == STACKS and "160 tokens" in public.title
    assert recall.cells[0][1:] == ("", "", "80.0 [70, 90]") and recall.cells[1][1:] == ("51.3 [41, 61]", "55.1 [45, 65]", "")
    assert memory.cells[2] == ("oracle(BUDGET)", "4.00x, 3.00 MiB", "4.00x, 3.00 MiB", "")
    rival = {"recipe": "oracle(128)", "mean": -0.2, "low": -0.31, "high": -0.1}
    compared = tables([row("tri(128)", 128, "recall", 0.5, against=rival)])[1]
    assert compared.title == "recall, points above oracle(BUDGET)" and compared.cells == [("tri(BUDGET)", "-20.0 [-31.0, -10.0]")]


def test_pictures_have_a_line_for_every_stack_or_task() -> None:
    budget, working_set = figures(ROWS, "title").values()
    assert [ax.get_title(loc="left").split(",")[0] for ax in budget.axes] == ["recall", "dfs_public", "mean"]
    lines = {line.get_label(): line for line in budget.axes[0].lines}
    assert list(lines) == STACKS
    assert list(lines["oracle(BUDGET)"].get_xdata()) == [128, 512]
    assert list(lines["oracle(BUDGET)"].get_ydata()) == pytest.approx([71.28, 75.12])
    assert (lines["oracle(BUDGET)"].get_color(), lines["oracle(BUDGET)"].get_linestyle()) == ("black", "--")
    assert lines["bf16"].get_color() == "0.6" and set(lines["bf16"].get_ydata()) == {80}
    assert budget.axes[0].get_xscale() == "log"
    assert [ax.get_title(loc="left").replace("\n", " ") for ax in working_set.axes] == STACKS[1:3]
    drawn = {line.get_label(): list(line.get_xdata()) for line in working_set.axes[0].lines if not line.get_label().startswith("_")}
    assert drawn == {"recall": [2, 8], "dfs_public": [20 / 64, 80 / 64]}
    assert list(figures([r for r in ROWS if r["budget"] is None], "title")) == [""]


def test_files(tmp_path: Path) -> None:
    written = write_plots(ROWS, "a <title>", tmp_path / "new" / "c")
    assert [p.name for p in written] == ["c.png", "c-working-set.png", "c.html"]
    text = written[-1].read_text("utf-8")
    assert text.count("<svg") == 2 and text.count("<table>") == 4 and "a &lt;title&gt;" in text and "<title>a <" not in text


def test_results_show_tasks_by_budgets_for_every_stack(tmp_path: Path) -> None:
    assert [t.title.partition(" tokens")[0] for t in compact(ROWS)][:3] == ["bf16, 1,024", "bf16, 160", f"{STACKS[1]}, 1,024"]
    path = tmp_path / "r.json"
    environment = {"gpu": None, "cpu": "a CPU", "torch": "2", "date": "2026-01-01"}
    path.write_text(json.dumps({"command": "kvstack compare", "environment": environment, "rows": ROWS}))
    lines = markdown([path]).splitlines()
    assert "| task | 128 | 512 |" in lines and "| recall | 51.3 [41, 61] | 55.1 [45, 65] |" in lines
    assert "`oracle(BUDGET), 160 tokens, accuracy %`" in lines and "| dfs_public | 70.2 [60, 80] | 70.8 [61, 81] |" in lines
