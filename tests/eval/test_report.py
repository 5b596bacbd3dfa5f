"""The comparison for people: every row and column is in the table, and a picture needs nothing but its own file."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kvstack.eval.report import figure, table, write_plots

torch.set_num_threads(1)


def row(recipe: str, nbytes: float, kl: float, delta: float, accuracy: float = 0.9375) -> dict[str, Any]:
    tasks = {name: {"accuracy": accuracy, "low": 0.7, "high": 0.99, "n": 16} for name in ("recall", "dfs")}
    return {
        "recipe": recipe, "tokens": 1024, "bytes_per_token": nbytes, "ratio": 6144 / nbytes, "tokens_per_s": 43.21,
        "bits_per_byte": 1.25 * (1 + delta / 100), "delta_pct": delta, "kl": kl, "text_sequences": 8, "tasks": tasks,
    }  # fmt: skip


ROWS = [row("bf16", 6144.0, 0.0, 0.0), row("polar4(window=128, sinks=4)", 1700.4, 0.0123, 0.68), row("k4v2", 1300.0, 0.3, 6.7, 0.5)]
NO_TEXT = [{k: v for k, v in r.items() if k not in ("kl", "delta_pct", "bits_per_byte", "text_sequences")} for r in ROWS]
NO_TASKS = [{**r, "tasks": {}} for r in ROWS]


def printed(rows: list[dict[str, Any]]) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=200).print(table(rows, "bundled, 1024 tokens"))
    return out.getvalue().splitlines()


def cells(line: str) -> list[str]:
    return [c.strip() for c in re.split("[│┃]", line)[1:-1]]


def test_the_table_has_all_rows_and_columns() -> None:
    lines = printed(ROWS)
    assert lines[0].strip() == "bundled, 1024 tokens"
    assert cells(lines[2]) == ["recipe", "bytes/token", "ratio", "bits/byte", "change %", "KL", "recall %", "dfs %", "tokens/s"]
    rows = [cells(line) for line in lines if line.startswith("│")]
    assert rows[0] == ["bf16", "6,144", "1.00x", "1.2500", "+0.00", "0.00e+00", "93.8 [70, 99]", "93.8 [70, 99]", "43.2"]
    assert rows[1][:6] == ["polar4(window=128, sinks=4)", "1,700", "3.61x", "1.2585", "+0.68", "1.23e-02"]
    assert [r[0] for r in rows] == [r["recipe"] for r in ROWS]
    assert rows[2][6] == "50.0 [70, 99]"


def test_a_run_without_text_or_without_tasks_has_a_table() -> None:
    for rows, left in ((NO_TEXT, ["recall %", "dfs %"]), (NO_TASKS, ["bits/byte", "change %", "KL"])):
        lines = printed(rows)
        assert cells(lines[2]) == ["recipe", "bytes/token", "ratio", *left, "tokens/s"]
        assert [cells(line)[0] for line in lines if line.startswith("│")] == [r["recipe"] for r in rows]


def test_paired_differences_have_a_column_of_their_own() -> None:
    kl = {"mean": 0.012, "low": 0.011, "high": 0.013}
    rows = [{**r, "against": {"recipe": "bf16", "kl": kl, "delta_pct": kl}} for r in ROWS]
    lines = printed(rows)
    assert cells(lines[2])[6] == "KL - that of bf16"
    assert cells(lines[4])[6] == "+1.2e-02 [+1.1e-02, +1.3e-02]"


def points(ax: Any) -> dict[str, tuple[float, float]]:
    return {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if not line.get_label().startswith("_")}


def test_the_picture_has_a_point_for_every_number() -> None:
    kl, change, tasks = (points(ax) for ax in figure(ROWS, "title").axes)
    assert kl == {r["recipe"]: (r["bytes_per_token"], r["kl"]) for r in ROWS[1:]}, "a logarithm has no place for the zero of bf16"
    assert change == {r["recipe"]: (r["bytes_per_token"], r["delta_pct"]) for r in ROWS}
    assert tasks["bf16"] == (6144.0, 93.75) and tasks["k4v2"] == (1300.0, 50.0)


@pytest.mark.parametrize("rows", [ROWS, NO_TEXT, NO_TASKS], ids=["all", "no text", "no tasks"])
def test_the_legend_names_every_recipe_once_and_in_order(rows: list[dict[str, Any]]) -> None:
    (legend,) = figure(rows, "title").legends
    assert [t.get_text() for t in legend.get_texts()] == [r["recipe"] for r in rows]


class Page(HTMLParser):
    """Collects the text of table cells, and everything that a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag in ("td", "th")
        if self.inside:
            self.cells.append("")
        self.fetched += [v or "" for k, v in attrs if k in ("href", "src", "xlink:href", "data") and not (v or "").startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


@pytest.mark.parametrize("rows", [ROWS, NO_TEXT, NO_TASKS], ids=["all", "no text", "no tasks"])
def test_files_that_need_nothing_else(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    written = write_plots(rows, "bundled, 1024 tokens", tmp_path / "new" / "folder" / "plot")
    assert written == [tmp_path / "new" / "folder" / f"plot.{kind}" for kind in ("png", "html")]
    assert written[0].read_bytes().startswith(b"\x89PNG\r\n") and written[0].stat().st_size > 10_000
    text = written[1].read_text("utf-8")
    page = Page(text)
    assert text.startswith("<!doctype html>") and "svg" in page.tags and "bundled, 1024 tokens" in text
    assert not page.fetched and not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    columns = 4 + len(rows[0]["tasks"]) + (3 if "kl" in rows[0] else 0)
    assert page.cells[0] == "recipe" and page.cells[columns - 1] == "tokens/s"
    assert page.cells[columns::columns] == [r["recipe"] for r in rows] and len(page.cells) == (len(rows) + 1) * columns


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "a<script>alert('1')</script>&--><b>"
    _, path = write_plots([ROWS[0], row(evil, 1000.0, 0.1, 1.0)], f"title of {evil}", tmp_path / "plot")
    text = path.read_text("utf-8")
    page = Page(text)
    assert "<script" not in text and "script" not in page.tags and "b" not in page.tags
    assert evil in page.cells
