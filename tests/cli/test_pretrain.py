"""`kvstack lab pretrain` on a small corpus of our own: what a user sees, what the folder holds, and what bad input says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kvstack.cli import pretrain as module
from kvstack.cli.main import app
from kvstack.lab.corpus import Corpus, save_corpus

torch.set_num_threads(1)
runner = CliRunner()
SMALL = ["--small", "--tokens", "4096", "--batch", "512"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "c.npz"
    text = np.random.default_rng(0).integers(3, 67, 4000).astype(np.uint16)
    save_corpus(Corpus(text[:3000], text[3000:3300], text[3300:], digest="noise", bytes_per_token=3.0), path)
    return path


def invoke(*args: str, code: int = 0) -> Any:
    result = runner.invoke(app, ["lab", *args])
    assert result.exit_code == code, result.output
    return result


def test_a_run_in_two_parts(tmp_path: Path, corpus: Path) -> None:
    args = ["pretrain", *SMALL, "--attention", "lrkv(rank=2, variant=nope)", "--corpus", str(corpus)]
    out = tmp_path / "new" / "run"
    first = invoke(*args, "--out", str(out), "--stop", "5", "--matrix-lr", "0.01", "--seed", "3")
    assert "at step 5 of 8" in first.stdout and "test_losses" not in json.loads((out / "pretrain.json").read_text())
    assert "other settings: matrix_lr, seed" in invoke(*args, "--out", str(out), "--resume", code=2).stderr
    assert "at step 8 of 8" in invoke(*args, "--out", str(out), "--resume", "--matrix-lr", "0.01", "--seed", "3").stdout
    facts = json.loads((out / "pretrain.json").read_text())
    config = facts["config"]
    assert config["attention"] == {"attention": "lrkv", "rank": 2, "variant": "nope"}
    assert (config["matrix_lr"], config["seed"], config["tokens"], config["batch"]) == (0.01, 3, 4096, 512)
    assert [row["step"] for row in facts["curve"]] == [8] and facts["corpus"]["digest"] == "noise"
    assert {"checkpoint.pt", "config.json", "model.safetensors", "tokenizer.json", "pretrain.json"} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize(
    ("args", "attention"),
    [
        (["--attention", "gqa(kv_heads=2)"], {"attention": "gqa", "num_key_value_heads": 2}),
        (["--attention", "mla(latent=24, rope=8)"], {"attention": "mla", "latent_dim": 24, "rope_dim": 8}),
        (["--attention", "mqa", "--whole"], {"attention": "mqa"}),
        (["--checkpointing", "--optimizer", "adamw"], {"attention": "mha"}),
    ],
)
def test_options_reach_the_model(args: list[str], attention: dict[str, Any], tmp_path: Path, corpus: Path) -> None:
    invoke("pretrain", *SMALL, *args, "--corpus", str(corpus), "--out", str(tmp_path), "--stop", "1")
    config = json.loads((tmp_path / "pretrain.json").read_text())["config"]
    assert config["attention"] == attention and config["per_head"] == ("--whole" not in args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--attention", "linear"], "linear"),
        (["--optimizer", "sgd"], "Choose one of muon, adamw"),
        (["--parallel", "zero"], "Choose one of ddp, fsdp"),
        (["--attention", "lrkv(rank=17)"], "Give 0 to 16"),
        (["--attention", "lrkv(rank=2, variant=half)"], "There is no LRKV variant 'half'"),
        (["--resume"], "Leave --resume away"),
        (["--batch", "128"], "0 windows of 256 tokens do not spread"),
    ],
)
def test_pretrain_refuses(args: list[str], message: str, tmp_path: Path, corpus: Path) -> None:
    assert message in invoke("pretrain", "--small", *args, "--corpus", str(corpus), "--out", str(tmp_path), code=2).stderr
    assert not list(tmp_path.iterdir())


def test_corpus_files(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "none.npz").write_text("no corpus")
    refused = invoke("pretrain", "--small", "--corpus", str(tmp_path / "none.npz"), "--out", str(tmp_path), code=2)
    assert "Make one with `kvstack lab corpus" in refused.stderr
    made = module.load_corpus(corpus)
    monkeypatch.setattr(module, "make_corpus", lambda max_bytes, progress: made)
    said = invoke("corpus", str(tmp_path / "new" / "c.npz"), "--bytes", "100000").stdout
    assert "3,000 tokens to train on, 700 to report on" in said
    assert (tmp_path / "new" / "c.npz").read_bytes() == corpus.read_bytes()
