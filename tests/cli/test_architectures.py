"""`kvstack lab architectures` on runs of `kvstack lab pretrain`, tiny ones: from folders to tables, files and pictures."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner

from kvstack.attention import words
from kvstack.cli.main import app
from kvstack.eval.report import markdown
from kvstack.lab.corpus import Corpus
from kvstack.lab.parallel import World
from kvstack.lab.pretrain import pretrain, small

torch.set_num_threads(1)
ARMS = ("mha", "gqa(kv_heads=2)", "lrkv(rank=4)", "lrkv(rank=2, variant=nope)")
TEXT = np.random.default_rng(0).integers(3, 67, 3000).astype(np.uint16)
CORPUS, ALONE = Corpus(TEXT[:2000], TEXT[2000:2400], TEXT[2400:], "noise", 3.0), World(0, 1, torch.device("cpu"))
CONFIG = replace(small(), width=32, feed_forward=64, tokens=2048, batch=256, lengths=((0.8, 32), (1.0, 64)), warmup=2, every=2)


def test_from_runs_to_results(tmp_path: Path) -> None:
    folders = [tmp_path / f"run{i}" for i in range(len(ARMS))]
    for folder, arm in zip(folders, ARMS, strict=True):
        folder.mkdir()
        pretrain(replace(CONFIG, attention=words.read(arm)), CORPUS, folder, ALONE, report=lambda row: None)
    json_out, plot = tmp_path / "new" / "a.json", tmp_path / "plots" / "a"
    args = ["lab", "architectures", *map(str, folders), "--json", str(json_out), "--plot", str(plot)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert all(arm in result.stdout for arm in ARMS) and "a_curves.json" in result.stdout
    rows = json.loads(json_out.read_text("utf-8"))["rows"]
    runs = [r for r in rows if "against" not in r]
    assert {r["arm"] for r in runs} == set(ARMS) and len(rows) == len(ARMS) + 4
    assert all(r["cache_ratio"] == r["formula_ratio"] for r in runs), "measured bytes are those of the formula"
    held = json.loads(json_out.with_name("a_curves.json").read_text("utf-8"))
    assert held.keys() == {"command", "environment", "rows"} and [r["arm"] for r in held["rows"]] == list(ARMS)
    assert held["rows"][0]["curve"]["step"] == [2, 4, 6, 8]
    assert {p.name for p in plot.parent.iterdir()} == {"a.png", "a-curves.png", "a.html"}

    pretrain(replace(CONFIG, seed=1), CORPUS, folders[0], ALONE, stop=4, report=lambda row: None)
    refused = CliRunner().invoke(app, args)
    assert refused.exit_code == 2 and "run0 is not finished" in refused.stderr


def test_rates_say_which_is_best_for_which_arm(tmp_path: Path) -> None:
    settings = [("mha", 1e-2, 2048), ("mha", 1e-4, 2048), ("mha", 3e-2, 1024), ("mqa", 1e-4, 2048)]
    folders = [tmp_path / f"run{i}" for i in range(len(settings))]
    for folder, (arm, rate, tokens) in zip(folders, settings, strict=True):
        folder.mkdir()
        cfg = replace(CONFIG, attention=words.read(arm), matrix_lr=rate, tokens=tokens, per_head=arm == "mha")
        pretrain(cfg, CORPUS, folder, ALONE, report=lambda row: None)
    json_out = tmp_path / "rates.json"
    args = ["lab", "rates", *map(str, folders), "--json", str(json_out)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    rows = json.loads(json_out.read_text("utf-8"))["rows"]
    losses = {(r["arm"], r["matrix_lr"]): r["tuning_loss"] for r in rows}
    first = min((1e-2, 1e-4), key=lambda rate: losses["mha", rate])
    best = {(r["arm"], r["matrix_lr"]) for r in rows if r["best"]}
    assert best == {("mha", first), ("mqa", 1e-4)}, "a shorter run is never the best"
    assert [r["tokens"] for r in rows] == [1024, 2048, 2048, 2048]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert any(f"{losses['mqa', 1e-4]:.4f}*" in line for line in lines) and "0.0001 whole" in result.stdout
    assert "tuning loss by learning rate" in markdown([json_out])

    pretrain(replace(CONFIG, width=64), CORPUS, folders[3], ALONE, report=lambda row: None)
    refused = CliRunner().invoke(app, args)
    assert refused.exit_code == 2 and "run0" in refused.stderr and "differ in width" in refused.stderr
