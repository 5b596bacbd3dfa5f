"""`kvstack convert` on a tiny model: what a user sees, what files appear, and what bad input says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kvstack.attention import DecoderConfig, DecoderForCausalLM
from kvstack.attention.convert import METHODS, REFERENCES
from kvstack.cli.main import app
from kvstack.lab.corpus import Corpus, judged, save_corpus
from kvstack.lab.pretrain import TextLoss, window_losses
from kvstack.lab.registry import bundled_model, load
from kvstack.lab.tokenizer import load_tokenizer

torch.set_num_threads(1)
runner = CliRunner()
H, D, LAYERS, LENGTH = 4, 8, 2, 32
COMMON = ["--tokens", "2000"]


def invoke(*args: str, code: int = 0) -> Any:
    result = runner.invoke(app, list(args))
    assert result.exit_code == code, result.output
    return result


def random_text(tokens: int, seed: int, vocabulary: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, tokens).astype(np.uint16)


def corpus(path: Path, train: int = 9000, test: int = 20 * LENGTH + 1, vocabulary: int = 90) -> Path:
    save_corpus(Corpus(random_text(train, 0, vocabulary), random_text(100, 1), random_text(test, 2), "0" * 16, 3.5), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model `mha` in float16 and a `corpus.npz`."""
    folder = tmp_path_factory.mktemp("convert")
    torch.manual_seed(0)
    cfg = DecoderConfig(
        vocab_size=100, hidden_size=64, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=H, head_dim=D,
        initializer_range=0.2, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = DecoderForCausalLM(cfg)
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    model.half().save_pretrained(folder / "mha")
    load_tokenizer(bundled_model()).save_pretrained(folder / "mha")
    corpus(folder / "corpus.npz")
    return folder


def convert(folder: Path, *args: str, code: int = 0, out: str = "new", text: str = "corpus.npz") -> Any:
    given = ["--corpus", str(folder / text), "--out", str(folder / out)]
    return invoke("convert", str(folder / "mha"), *given, *COMMON, *args, code=code)


def test_compare_measures_all_methods_and_distils_the_chosen_one(folder: Path) -> None:
    path = folder / "rows" / "retrofit.json"
    args = ["--compare", "--distil-tokens", "4096", "--distil-batch", "256", "--lr", "1e-3", "--json", str(path)]
    result = convert(folder, "--rank", "2", *args)
    assert (
        "joint*" in result.stdout
        and "lrkv-mean" in result.stdout
        and "not smaller" in result.stdout
        and result.stdout.count("wrote") == 2
    )
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["mha", "lrkv", *(m for m in METHODS if m != "lrkv")]
    full = LAYERS * 2 * H * D * 2
    for method, row in rows.items():
        assert row["reference"] == (method in REFERENCES) and row["windows"] == 20 and row["length"] == LENGTH
        # What is not a reference caches what its structure says.
        assert row["cache_bytes_per_token"] == full * (1 if row["reference"] else row["cache_ratio"])
        if method != "mha":
            assert row["loss_increase"] == pytest.approx(row["test_loss"] - rows["mha"]["test_loss"])
            assert row["loss_increase_low"] < row["loss_increase"] < row["loss_increase_high"]
            assert ("distil_tokens" in row) == (method == "lrkv")
    assert rows["lrkv"]["cache_ratio"] == 1 / H + 2 / D == rows["per-head"]["cache_ratio"] == rows["gqa"]["cache_ratio"]
    assert rows["mha"]["lost_key"] == 0 < rows["joint"]["lost_key"] < rows["lrkv"]["lost_key"] < rows["lrkv-mean"]["lost_key"] < 1
    ours = rows["lrkv"]
    assert ours["distil_tokens"] == 4096 and ours["curve"][-1]["kl"] < ours["curve"][0]["kl"]
    assert ours["loss_increase_after"] == pytest.approx(ours["test_loss_after"] - rows["mha"]["test_loss"])

    model, tokenizer = load(str(folder / "new"), device="cpu")
    assert model.config.attention == "lrkv" and model.config.rank == 2 and model.dtype == torch.float16 and len(tokenizer) == 4096
    test = judged(random_text(20 * LENGTH + 1, 2), LENGTH, torch.device("cpu"))
    losses = window_losses(TextLoss(model.float()), test)
    assert np.mean(losses) == pytest.approx(ours["test_loss_after"], abs=2e-3)


def test_gqa_is_converted_to_too(folder: Path) -> None:
    result = convert(folder, "--to", "gqa", "--rank", "2", out="gqa")
    assert "lrkv" not in result.stdout and "distilled" not in result.stdout
    model, _ = load(str(folder / "gqa"), device="cpu")
    assert model.config.attention == "gqa" and model.config.num_key_value_heads == 2
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 7)


@pytest.mark.parametrize(
    ("args", "text", "message"),
    [
        (["--rank", "9"], {}, "Give a whole number from 0 to the head size, 8"),
        (["--rank", "2", "--to", "mla"], {}, "There is no target 'mla'. Choose one of lrkv, gqa"),
        (["--rank", "2"], {"vocabulary": 4096}, "Give a corpus of this model's own tokenizer"),
        (["--rank", "2"], {"test": 64}, "The test text has 64 tokens, and 65 are needed"),
        (["--rank", "2"], {"train": 32}, "The training text has 32 tokens, and 33 are needed"),
        (["--rank", "2", "--distil-tokens", "100"], {}, "make no step. Give more tokens"),
    ],
)
def test_convert_refuses(args: list[str], text: dict[str, int], message: str, folder: Path) -> None:
    corpus(folder / "other.npz", **text)
    assert message in convert(folder, *args, code=2, text="other.npz").stderr


def test_convert_refuses_other_models_and_to_replace_its_own(folder: Path) -> None:
    args = ["--rank", "2", "--corpus", str(folder / "corpus.npz"), "--out"]
    assert "Give a model without QK-norm" in invoke("convert", "bundled", *args, str(folder / "x"), code=2).stderr
    assert "would replace" in convert(folder, "--rank", "2", code=2, out="mha").stderr
    assert "is no corpus" in convert(folder, "--rank", "2", code=2, text="mha/config.json").stderr
