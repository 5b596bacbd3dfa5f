"""The comparison of architectures, on runs written by hand: rows worked out on paper, who is compared, and what is refused."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from kvstack.attention import words
from kvstack.errors import BadInputError
from kvstack.eval.architectures import (
    are_mine,
    cache_figure,
    comparisons,
    curve_figure,
    curve_rows,
    pareto,
    read_runs,
    run_rows,
    steps_to,
    tables,
    write_plots,
)
from kvstack.eval.report import markdown

torch.set_num_threads(1)
LOSS = {"mha": 2.0, "gqa(kv_heads=4)": 2.1, "mqa": 2.4, "lrkv(rank=24)": 1.9, "lrkv(rank=4, variant=nope)": 2.2}
NUMBERS = {"mha": 1024, "gqa(kv_heads=4)": 512, "mqa": 128, "lrkv(rank=24)": 512, "lrkv(rank=4, variant=nope)": 192}
CONFIG = {
    "width": 512, "layers": 8, "heads": 8, "head_dim": 64, "feed_forward": 1376, "rope_theta": 1e5, "tokens": 4000, "batch": 1000,
    "lengths": [[0.8, 2048], [1.0, 8192]], "looks": 4, "matrix_lr": 0.03, "per_head": True,
    "data_seed": 0,
}  # fmt: skip
DECODING = {"bfloat16": 5e-3, "bfloat16_stored": 2e-3, "bfloat16_forward": 6e-3, "bfloat16_loss": -1e-4}


def facts(arm: str, seed: int = 0, loss: float | None = None, **changed: Any) -> dict[str, Any]:
    """What a run leaves. Windows differ much from each other, and little between arms: what pairing is for."""
    own = LOSS[arm] + 0.01 * seed if loss is None else loss
    hard = np.random.default_rng(7).normal(0, 0.5, 16)
    noise = np.random.default_rng([seed, NUMBERS[arm]]).normal(0, 0.001, 16)
    losses = own + (hard - hard.mean()) + (noise - noise.mean())
    steps = (1, 2, 3, 4)
    curve = [
        {"step": s, "tokens": 1000 * s, "loss": own, "ms": 10.0 * s, "tuning": own, "test": own + 1 - s / 4, "seconds": 2.0 * s}
        for s in steps
    ]  # fmt: skip
    return {
        "config": {**CONFIG, "attention": words.read(arm), "seed": seed, **changed},
        "corpus": {"digest": "abc", "bytes_per_token": 4.0},
        "curve": curve,
        "seconds": 9.0,
        "test_losses": {"2048": losses.tolist(), "4096": [own - 0.1, own + 0.1], "8192": [own + 0.5, own + 0.7]},
        "parameters": 1_000_000 + NUMBERS[arm],
        "cache_bytes_per_token": 16.0 * NUMBERS[arm],
        "decoding": DECODING | {"float32": 1e-7 * (1 + seed)},
        "environment": {"gpu": {"name": "NVIDIA H200"} if seed else None},
    }


def folders(root: Path, *runs: dict[str, Any]) -> list[Path]:
    out = []
    for i, run in enumerate(runs):
        out.append(root / f"run{i}")
        out[-1].mkdir()
        (out[-1] / "pretrain.json").write_text(json.dumps(run))
    return out


@pytest.fixture
def runs(tmp_path: Path) -> list[dict[str, Any]]:
    return read_runs(folders(tmp_path, *(facts(arm, seed) for seed in (0, 1) for arm in LOSS)))


def test_a_row_says_what_the_run_did(runs: list[dict[str, Any]]) -> None:
    rows = run_rows(runs)
    assert [r["arm"] for r in rows[::2]] == ["mha", "gqa(kv_heads=4)", "lrkv(rank=24)", "lrkv(rank=4, variant=nope)", "mqa"]
    row = next(r for r in rows if r["arm"] == "lrkv(rank=24)" and r["seed"] == 1)
    assert row == {
        "arm": "lrkv(rank=24)", "attention": "lrkv", "rank": 24, "variant": "exact", "seed": 1, "params": 1_000_512,
        "cache_bytes_per_token": 8192.0, "cache_ratio": 0.5, "formula_ratio": 0.5, "tokens": 4000, "matrix_lr": 0.03,
        "per_head": True, "train_seconds": 9.0, "step_ms": 25.0, "gpu": "NVIDIA H200",
        "test_loss": pytest.approx(1.91), "test_loss_4096": pytest.approx(1.91), "test_loss_8192": pytest.approx(2.51),
        "bits_per_byte": pytest.approx(1.91 / math.log(2) / 4), "steps_to_mha": pytest.approx(0.9),
        "decoding": DECODING | {"float32": 2e-7},
    }  # fmt: skip
    assert {r["arm"]: r["steps_to_mha"] for r in rows if r["arm"] in ("mha", "mqa")} == {"mha": 1.0, "mqa": None}
    nope = next(r for r in rows if r["variant"] == "nope")
    assert nope["formula_ratio"] == pytest.approx(1 / 8 + 4 / 64) and (rows[0]["rank"], rows[0]["variant"]) == (None, None)


def test_steps_are_counted_to_the_first_crossing() -> None:
    curve = [{"step": s, "test": t} for s, t in ((10, 4.0), (20, 3.0), (30, 2.0), (40, 2.5), (50, 1.0))]
    wanted = {5.0: 10, 4.0: 10, 3.5: 15, 3.0: 20, 2.25: 27.5, 2.0: 30, 1.75: 45, 1.0: 50, 0.9: None}
    assert {loss: steps_to(curve, loss) for loss in wanted} == wanted


def test_rivals_are_other_architectures_with_as_many_bytes(runs: list[dict[str, Any]]) -> None:
    found = {(r["arm"], r["against"]): r for r in comparisons(runs)}
    small, half = "lrkv(rank=4, variant=nope)", "lrkv(rank=24)"
    assert list(found) == [(half, "mha"), (half, "gqa(kv_heads=4)"), (small, "mha"), (small, "gqa(kv_heads=4)")]
    assert all(r["seeds"] == 2 for r in found.values())
    for (a, b), r in found.items():
        assert r["difference"] == pytest.approx(LOSS[a] - LOSS[b]) and r["low"] < r["difference"] < r["high"]
        # Windows differ by 0.5, and differences of the same windows by 0.001.
        assert 0 < r["over_windows"][1] - r["over_windows"][0] < 0.003


def test_the_wider_interval_decides() -> None:
    def compared(*losses: float) -> dict[str, Any]:
        pairs = [(facts("mha", s, 2.0), facts("lrkv(rank=24)", s, loss)) for s, loss in enumerate(losses)]
        (row,) = comparisons([run for pair in pairs for run in pair])
        return row

    one, alike, unlike = compared(1.9), compared(1.9, 1.9, 1.9), compared(1.8, 1.9, 2.0)
    assert one["over_seeds"] is None and [one["low"], one["high"]] == one["over_windows"]
    assert [alike["low"], alike["high"]] == alike["over_windows"] and alike["over_seeds"] == pytest.approx([-0.1, -0.1])
    half = 4.303 * 0.1 / math.sqrt(3)
    assert [unlike["low"], unlike["high"]] == unlike["over_seeds"] == pytest.approx([-0.1 - half, -0.1 + half])
    assert unlike["difference"] == pytest.approx(-0.1) and unlike["seeds"] == 3


def test_seeds_that_one_side_lacks_are_left_out() -> None:
    (row,) = comparisons([facts("mha", 0), facts("mha", 1), facts("lrkv(rank=24)", 1, 1.0)])
    assert row["seeds"] == 1 and row["difference"] == pytest.approx(1.0 - 2.01)
    assert not comparisons([facts("mha", 0), facts("lrkv(rank=24)", 1)])


BAD = {
    "other text": (lambda r: r["corpus"].update(digest="xyz"), "run0 and .*run1 differ in corpus"),
    "other size": (lambda r: r["config"].update(width=256, layers=4), "differ in width, layers. Compare runs that share them"),
    "other tokens": (lambda r: r["config"].update(tokens=8000), "differ in tokens"),
    "other order": (lambda r: r["config"].update(data_seed=1), "differ in data_seed"),
    "twice": (lambda r: r["config"].update(attention={"attention": "mha"}), "are both mha of seed 0"),
    "unfinished": (lambda r: r.pop("test_losses"), "run1 is not finished. Go on with --resume"),
    "one window": (lambda r: r["test_losses"].update({"2048": [1.0]}), "run1 has one test window"),
    "no rival": (lambda r: r["config"].update(seed=5), "no MHA run of seed 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_runs_that_do_not_compare_are_refused(case: str, tmp_path: Path) -> None:
    change, message = BAD[case]
    run = facts("lrkv(rank=24)")
    change(run)
    with pytest.raises(BadInputError, match=message):
        read_runs(folders(tmp_path, facts("mha"), run))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for text in (None, "{"):
        if text:
            (tmp_path / "pretrain.json").write_text(text)
        with pytest.raises(BadInputError, match="is not the folder of a run"):
            read_runs([tmp_path])


def test_other_seeds_may_have_another_order(tmp_path: Path) -> None:
    pairs = [(arm, seed) for seed in (0, 1) for arm in ("mha", "mqa")]
    assert len(read_runs(folders(tmp_path, *(facts(arm, seed, data_seed=seed) for arm, seed in pairs)))) == 4


def test_tables_have_a_line_for_every_arm_and_comparison(runs: list[dict[str, Any]]) -> None:
    rows = run_rows(runs) + comparisons(runs)
    arms, decoding, compared = tables(rows)
    assert [c[0] for c in arms.cells] == list(dict.fromkeys(r["arm"] for r in run_rows(runs))) and len(compared.cells) == 4
    line = dict(zip(arms.head, arms.cells[2], strict=True))
    half = 12.706 * 0.01 / 2
    assert line == {
        "arm": "lrkv(rank=24)", "cache %": "50.0", "formula %": "50.0", "bytes/token": "8,192", "parameters": "1,000,512", "seeds": "2",
        "loss": f"1.9050 [{1.905 - half:.4f}, {1.905 + half:.4f}]", "at 4,096": "1.9050", "at 8,192": "2.5050",
        "bits/byte": f"{1.905 / math.log(2) / 4:.4f}", "steps %": "90.0", "ms a step": "25.0", "on": "CPU, H200",
    }  # fmt: skip
    assert arms.cells[-1][10] == "never" and compared.cells[0][:3] == ("lrkv(rank=24)", "mha", "2")
    assert compared.cells[0][3].startswith("-0.1000 [-0.1")
    alone = tables(run_rows(runs[:5]) + comparisons(runs[:5]))
    assert alone[0].cells[0][6] == "2.0000" and alone[2].cells[0][5] == "-", "one seed has no interval"
    assert decoding.cells[2] == ("lrkv(rank=24)", "2.0e-07", "5.0e-03", "2.0e-03", "6.0e-03", "-1.0e-04"), "the larger of two seeds"
    assert len(tables(run_rows([facts("mha")]))) == 2
    out = io.StringIO()
    Console(file=out, width=220).print(arms.terminal(), decoding.terminal(), compared.terminal())
    assert "…" not in out.getvalue()


def test_pareto_keeps_what_nothing_beats() -> None:
    assert pareto([(8, 2.0), (4, 2.1), (4, 2.2), (2, 2.5), (1, 2.4), (16, 2.0)]) == [(1, 2.4), (4, 2.1), (8, 2.0)]


def test_pictures_show_every_arm_and_the_best_of_every_kind(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    rows, curves = run_rows(runs) + comparisons(runs), curve_rows([*runs, facts("lrkv(rank=4, variant=nope)", 0, 9.0)])
    (ax,) = cache_figure(rows, "title").axes
    assert {t.get_text() for t in ax.texts} == set(LOSS)
    tokens, seconds, less = curve_figure(rows, curves, "title").axes
    assert (tokens.get_xlabel(), seconds.get_xlabel()) == ("million tokens", "seconds, with looks and compilation")
    assert len(tokens.lines) == 11 and [t.get_text() for t in tokens.get_legend().get_texts()] == [r["arm"] for r in rows[:10:2]]
    assert list(tokens.lines[0].get_xdata()) == [0.002, 0.003, 0.004] and list(seconds.lines[0].get_xdata()) == [4, 6, 8]
    assert all(not line.get_ydata().any() for line in less.lines[:2]), "MHA less itself, of both seeds"
    assert max(line.get_ydata()[-1] for line in less.lines) == pytest.approx(9.0 - LOSS["mha"])
    best = run_rows([facts("mha"), facts("lrkv(rank=24)"), facts("lrkv(rank=4, variant=nope)")])
    best[1]["variant"] = "nope"
    assert len(curve_figure(best, curve_rows([facts(r["arm"]) for r in best]), "title").axes[0].lines) == 2
    written = write_plots(rows, curves, "title", tmp_path / "new" / "a")
    assert [p.name for p in written] == ["a.png", "a-curves.png", "a.html"]
    assert written[2].read_text("utf-8").count("<svg") == 2 and all(name in written[2].read_text("utf-8") for name in LOSS)


def test_the_page_of_results_knows_the_rows_and_leaves_out_the_curves(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    environment = {"gpu": None, "cpu": "a CPU", "torch": "2", "date": "2026-01-01"}
    files = {"a.json": run_rows(runs) + comparisons(runs), "a_curves.json": curve_rows(runs)}
    for name, rows in files.items():
        (tmp_path / name).write_text(json.dumps({"command": "kvstack lab architectures", "environment": environment, "rows": rows}))
    text = markdown([tmp_path / name for name in files])
    assert "## a\n" in text and "a_curves" not in text
    assert "| lrkv(rank=24) | 50.0 | 50.0 | 8,192 |" in text and "| lrkv(rank=24) | gqa(kv_heads=4) | 2 | -0.2000 [" in text
    assert are_mine(files["a.json"]) and not are_mine(files["a_curves.json"])
