"""The training loop on tiny models: a clock that we turn makes a run a fixed number of steps, so time decides nothing here."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM
from typer.testing import CliRunner

from kvstack.attention import DecoderForCausalLM
from kvstack.cli.main import app
from kvstack.errors import BadInputError, UnsupportedModelError
from kvstack.lab import train
from kvstack.lab.card import write_card
from kvstack.lab.registry import bundled_model
from kvstack.lab.train import TrainConfig, learning_rate, small, train_model, weighted_loss, write_profile
from kvstack.profile import Profile

torch.set_num_threads(1)
CONFIG = replace(small(), width=64, feed_forward=128, minutes=0.4, tokens=512, text_bytes=200_000, warmup=4)
SOURCES = [(Path(train.__file__).parent / f"{name}.py").read_text("utf-8") for name in ("train", "tasks", "data", "tokenizer")]


class Clock:
    """Half a second passes whenever someone looks."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 0.5
        return self.now


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "time", Clock())
    monkeypatch.setattr(train, "training_text", lambda limit: SOURCES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, float]], Any]]:
    """A trained folder, the reported rows, and the model that was returned."""
    out, rows = tmp_path_factory.mktemp("lab") / "model", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "time", Clock())
        patch.setattr(train, "training_text", lambda limit: SOURCES)
        model = train_model(CONFIG, out, report=rows.append)
    yield out, rows, model


def facts(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "training.json").read_text("utf-8")))


def test_the_loss_falls_and_the_curve_is_kept(run: Any) -> None:
    out, rows, _ = run
    kept = facts(out)
    assert kept["curve"] == rows and len(rows) >= 3
    # A fresh model knows nothing, which costs log(4096) = 8.3 nats.
    assert 7.5 < rows[0]["loss"] < 8.7 and rows[-1]["loss"] < rows[0]["loss"] - 0.5
    for before, after in pairwise(rows):
        assert all(before[k] < after[k] for k in ("step", "seconds", "progress", "tokens"))
    assert kept["config"] == json.loads(json.dumps(asdict(CONFIG)))
    assert kept["steps"] > rows[-1]["step"] > 10
    # The first batches were made before the length was known to the workers.
    assert rows[-1]["length"] == 128 and kept["tokens"] == pytest.approx(512 * kept["steps"], rel=0.02)
    assert 24 <= kept["seconds"] < 27, "0.4 minutes, and what the last step took"


def test_the_folder_is_a_model_that_transformers_loads(run: Any) -> None:
    out, _, trained = run
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    tok = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float16 and model.num_parameters() == facts(out)["parameters"]
    assert (tok.pad_token_id, tok.bos_token_id, tok.eos_token_id) == (0, 1, 2)
    assert not trained.training
    for name, weight in trained.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name].float(), weight.cpu(), rtol=1e-3, atol=1e-4)
    ids = torch.tensor([tok.encode("def f(x):")])
    with torch.inference_mode():
        assert model.float()(ids).logits.shape == (1, ids.shape[1], 4096)


def test_a_resumed_run_goes_on_from_there(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rows, _ = run
    # Another machine has other texts, and the words of the model must stay what they are.
    monkeypatch.setattr(train, "training_text", lambda limit: ["".join(reversed(t)) for t in SOURCES])
    train_model(CONFIG, tmp_path / "more", resume=out)
    before, after = facts(out), facts(tmp_path / "more")
    assert after["curve"][: len(rows)] == rows and len(after["curve"]) > len(rows)
    first = after["curve"][len(rows)]
    assert before["steps"] < first["step"] < after["steps"]
    assert first["seconds"] > before["seconds"] and after["seconds"] > before["seconds"] + 24
    assert first["tokens"] > before["tokens"]
    assert first["loss"] < rows[0]["loss"] - 0.4, "it starts from what was learned"
    assert (tmp_path / "more" / "tokenizer.json").read_text("utf-8") == (out / "tokenizer.json").read_text("utf-8")


def test_a_resumed_run_of_no_time_changes_no_weight(run: Any, tmp_path: Path) -> None:
    out, _, _ = run
    model = train_model(replace(CONFIG, minutes=1e-9), tmp_path / "same", resume=out)
    saved = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))
    assert facts(tmp_path / "same")["steps"] == facts(out)["steps"]


def test_a_folder_that_is_no_lab_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(BadInputError, match="Leave --resume away"):
            train_model(CONFIG, tmp_path / "out", resume=folder)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_lost_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="Lower --muon-lr"):
        train_model(replace(CONFIG, adam_lr=1e30, muon_lr=1e30), tmp_path / "out", tokenizer=bundled_model())
    assert not (tmp_path / "out").exists()


def test_the_profile_of_a_lab_model_fits_it(run: Any) -> None:
    out, _, _ = run
    write_profile(out)
    profile = Profile.load(out / "profile" / "profile.safetensors")
    profile.check(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    assert profile.tokens == 8 * 256 and profile.source.startswith("tuning text ")
    assert profile.key_centre.any() and profile.forecast_fit is None, "a context of 256 tokens is too short to forecast in"


def test_the_bundled_model_has_the_default_size() -> None:
    with torch.device("meta"):
        model = TrainConfig().model()
    assert model.num_parameters() == facts(bundled_model())["parameters"]
    saved = AutoModelForCausalLM.from_pretrained(bundled_model()).config.to_dict()
    ours = model.config.to_dict()
    for key in ("head_dim", "num_key_value_heads", "rope_parameters", "max_position_embeddings", "tie_word_embeddings", "vocab_size"):
        assert saved[key] == ours[key]


@given(progress=st.floats(0, 1.5), step=st.integers(0, 1000), warmup=st.integers(1, 500), cooldown=st.floats(0.05, 1.0))
def test_learning_rate(progress: float, step: int, warmup: int, cooldown: float) -> None:
    cfg = replace(small(), warmup=warmup, cooldown=cooldown)
    rate = learning_rate(progress, step, cfg)
    assert 0.0 <= rate <= 1.0
    assert learning_rate(progress, step + 1, cfg) >= rate >= learning_rate(progress + 0.1, step, cfg)
    if progress >= 1.0:
        assert rate == 0.0
    else:
        assert rate > 0.0
    if step >= warmup - 1 and progress <= 1.0 - cooldown:
        assert rate == pytest.approx(1.0)
    assert learning_rate(0.0, 0, cfg) == pytest.approx(1.0 / warmup)
    assert learning_rate(1.0 - cooldown / 2, warmup, cfg) == pytest.approx(0.5)


def test_weighted_loss_is_a_weighted_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(6, 8, generator=generator), torch.randn(5, 8, generator=generator)
    logits = hidden @ head.T
    targets = logits.argmax(1)
    targets[1] = (targets[1] + 1) % 5
    weights = torch.tensor([1.0, 1.0, 0.5, 0.01, 1.0, 0.0])
    loss, right = weighted_loss(hidden, head, targets, weights)
    nats = torch.tensor([-logits[i].log_softmax(0)[targets[i]] for i in range(6)])
    assert loss.item() == pytest.approx(((nats * weights).sum() / 3.51).item(), rel=1e-5)
    assert right.item() == pytest.approx(2 / 3), "of the answers only, whose weight is 1"
    assert weighted_loss(hidden, head, targets, weights * 0.5)[1].item() == 0.0, "no answers, no NaN"


@pytest.mark.parametrize("variant", ["nope", "exact"])
def test_our_own_decoder(variant: str, tmp_path: Path) -> None:
    attention = {"attention": "lrkv", "rank": 8, "variant": variant, "qk_norm": True}
    model = train_model(replace(CONFIG, attention=attention, heads=4, head_dim=32, minutes=0.2), tmp_path / "model")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert type(saved) is type(model) is DecoderForCausalLM and saved.config.rank == 8 and saved.config.qk_norm
    assert saved.lm_head.weight is saved.model.embed_tokens.weight and saved.lm_head.weight.any()
    write_card(tmp_path / "model")
    assert f"`lrkv(rank=8, variant={variant}, qk_norm=on)`" in (tmp_path / "model" / "README.md").read_text("utf-8")
    if variant == "exact":
        with pytest.raises(UnsupportedModelError, match="nope"):
            write_profile(tmp_path / "model")
    else:
        write_profile(tmp_path / "model")
        assert Profile.load(tmp_path / "model" / "profile" / "profile.safetensors").query_norm.shape == (2, 4, 32)


@pytest.mark.parametrize(("attention", "normed"), [("mha", True), ("mha(qk_norm=off)", False), ("mla(latent=24, rope=8)", False)])
def test_the_command_trains_our_decoder_with_norms_unless_it_has_its_own_or_is_told(
    attention: str, normed: bool, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    result = CliRunner().invoke(app, ["lab", "train", "--small", "--attention", attention, "--minutes", "0.05", "--out", str(out)])
    assert result.exit_code == 0, result.output
    settings = json.loads((out / "training.json").read_text())["config"]["attention"]
    assert settings.get("qk_norm", False) is normed is AutoModelForCausalLM.from_pretrained(out).config.qk_norm
    assert ("no profile: " in result.stderr) is attention.startswith("mla"), "which stores no keys"
