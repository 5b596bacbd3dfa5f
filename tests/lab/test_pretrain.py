"""Pretraining on a small text of our own: every architecture learns, is saved as it is, and goes on after a stop bit for bit."""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvstack.attention import DecoderForCausalLM
from kvstack.errors import BadInputError
from kvstack.lab.corpus import Corpus, judged
from kvstack.lab.optim import OPTIMIZERS
from kvstack.lab.parallel import World
from kvstack.lab.pretrain import FLOOR, PretrainConfig, TextLoss, pretrain, small, window_losses

torch.set_num_threads(1)
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def markov(tokens: int, seed: int) -> NDArray[np.uint16]:
    """A text in which every one of 64 words has two successors, equally often: log 2 nats a token for who knows them."""
    after = np.random.default_rng(0).integers(3, 67, (67, 2))
    text = [3]
    for choice in np.random.default_rng(seed).integers(0, 2, tokens - 1):
        text.append(int(after[text[-1], choice]))
    return np.array(text, np.uint16)


CORPUS = Corpus(markov(20_000, 1), markov(400, 2), markov(600, 3), digest="markov", bytes_per_token=3.0)
CONFIG = replace(
    small(), width=32, heads=2, feed_forward=64, tokens=16 * 256, batch=256, lengths=((0.8, 32), (1.0, 64)), warmup=2, every=4,
    other_lr=1e-2,
)  # fmt: skip
POOLED: dict[str, Any] = {"pool": 4, "window": 8, "rope_dim": 8}
KINDS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 1},
    "mqa": {},
    "mla": {"latent_dim": 24, "rope_dim": 8},
    "lrkv": {"rank": 3},
    "lrkv-nope": {"rank": 3, "variant": "nope"},
    "lrkv-0": {"rank": 0},
    "csa": {**POOLED, "entries": 4, "index_heads": 2, "index_dim": 8},
    "hca": POOLED,
}


def run(out: Path, cfg: PretrainConfig = CONFIG, **options: Any) -> dict[str, Any]:
    """What `pretrain.json` holds after a run into the folder `out`."""
    out.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    facts = pretrain(cfg, CORPUS, out, ALONE, report=rows.append, **options)
    held = json.loads((out / "pretrain.json").read_text("utf-8"))
    assert held == json.loads(json.dumps(facts)) and held["curve"][len(held["curve"]) - len(rows) :] == rows
    return dict(held)


def untimed(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts without what a clock says."""
    curve = [{k: v for k, v in row.items() if k not in ("ms", "seconds")} for row in facts["curve"]]
    return {**{k: v for k, v in facts.items() if k not in ("seconds", "environment")}, "curve": curve}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(out / "checkpoint.pt", weights_only=True)["model"])


@pytest.mark.parametrize("name", KINDS)
def test_every_attention_learns_and_is_saved_as_it_is(name: str, tmp_path: Path) -> None:
    cfg = replace(CONFIG, attention={"attention": name.partition("-")[0], **KINDS[name]})
    facts = run(tmp_path, cfg)
    curve = facts["curve"]
    assert [r["step"] for r in curve] == [4, 8, 12, 16]
    assert [r["tokens"] for r in curve] == [256 * r["step"] for r in curve]
    assert all(r["ms"] > 0 for r in curve) and all(a["seconds"] < b["seconds"] for a, b in pairwise(curve))
    # A fresh model knows nothing, which costs log(4096) = 8.3 nats; then it learns which 64 words there are.
    assert 7 < curve[0]["loss"] < 9 and all(a["test"] > b["test"] for a, b in pairwise(curve)) and curve[-1]["tuning"] < 6
    assert {n: len(losses) for n, losses in facts["test_losses"].items()} == {"32": 18, "64": 9}
    assert fmean(facts["test_losses"]["32"][:4]) == pytest.approx(curve[-1]["test"], rel=1e-6)
    assert facts["config"] == json.loads(json.dumps(asdict(cfg))) and facts["corpus"]["digest"] == "markov"
    assert facts["environment"]["torch"] == torch.__version__ and facts["environment"]["gpu"] is None

    trained = DecoderForCausalLM(cfg.model()).eval()
    trained.load_state_dict({k.removeprefix("model."): v for k, v in weights(tmp_path).items()})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded.num_parameters() == facts["parameters"] and AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 2
    x = judged(CORPUS.test, 64, CPU, 2)[:, :-1]
    with torch.no_grad():
        ours, theirs = trained(x).logits, loaded(x).logits
    assert (ours - theirs).norm() < 1e-3 * ours.norm(), "float16 has eleven bits"
    decoding = facts["decoding"]
    assert decoding["float32"] < 1e-5 and decoding["bfloat16"] < 3 * decoding["bfloat16_forward"] < 0.1
    assert abs(decoding["bfloat16_loss"]) < 0.01
    assert facts["cache_bytes_per_token"] == 2 * cfg.layers * cfg.model().cache_numbers, "two bytes a number"


def test_long_windows_come_evenly() -> None:
    cfg = PretrainConfig()
    long = [cfg.length(step) == 8192 for step in range(cfg.steps)]
    for steps in (50, 400, cfg.steps):  # how many there are, after any number of steps, is a fifth to within two
        assert max(abs(sum(long[i : i + steps]) - steps / 5) for i in range(cfg.steps - steps + 1)) <= 2
    assert {cfg.length(step) for step in range(5)} == {2048, 8192}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    cfg = replace(CONFIG, optimizer=optimizer, attention={"attention": "lrkv", "rank": 3})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    facts = untimed(run(whole, cfg))
    for i, stop in enumerate((6, 13)):  # between two looks
        torch.manual_seed(i)  # what a process did before must not matter
        found = run(parts, cfg, resume=i > 0, stop=stop)
        assert found["step"] == stop and "test_losses" not in found
    assert untimed(run(parts, cfg, resume=True)) == facts
    a, b = weights(whole), weights(parts)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert untimed(run(parts, cfg, resume=True)) == facts, "nothing is left to do"


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    cfg = replace(CONFIG, save=3)  # not where it looks
    facts = untimed(run(tmp_path / "whole", cfg))

    def die(row: dict[str, Any]) -> None:
        if row["step"] >= 2 * cfg.every:
            raise KeyboardInterrupt

    (tmp_path / "killed").mkdir()
    with pytest.raises(KeyboardInterrupt):
        pretrain(cfg, CORPUS, tmp_path / "killed", World(0, 1, CPU), report=die)
    assert not (tmp_path / "killed" / "pretrain.json").exists()
    assert untimed(run(tmp_path / "killed", cfg, resume=True)) == facts


def test_seeds_do_what_their_names_say(tmp_path: Path) -> None:
    first, again, other_data, other_weights = (
        run(tmp_path, replace(CONFIG, tokens=512, **seeds)) for seeds in ({}, {}, {"data_seed": 1}, {"seed": 1})
    )
    assert untimed(first) == untimed(again)
    losses = {f["curve"][0]["test"] for f in (first, other_data, other_weights)}
    assert len(losses) == 3


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"matrix_lr": 1e-3}, "matrix_lr"),
        ({"attention": {"attention": "lrkv", "rank": 2}}, "attention"),
        ({"seed": 1, "data_seed": 1}, "seed, data_seed"),
        ({"lengths": ((0.5, 32), (1.0, 64))}, "lengths"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    cfg = replace(CONFIG, attention={"attention": "lrkv", "rank": 3})
    run(tmp_path, cfg, stop=1)
    with pytest.raises(BadInputError, match=f"other settings: {named}. Give the same, or another --out"):
        run(tmp_path, replace(cfg, **changed), resume=True)
    run(tmp_path, replace(cfg, checkpointing=True), resume=True, stop=2)  # how the work is done may change


def test_bad_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="Leave --resume away"):
        run(tmp_path, resume=True)
    with pytest.raises(BadInputError, match="0 windows of 64 tokens do not spread over 1 processes"):
        run(tmp_path, replace(CONFIG, batch=32))
    with pytest.raises(BadInputError, match="12 windows of 32 tokens do not spread over 8 processes"):
        pretrain(replace(CONFIG, batch=384), CORPUS, tmp_path, World(0, 8, CPU))
    with pytest.raises(BadInputError, match="Lower --matrix-lr and --other-lr"):
        run(tmp_path, replace(CONFIG, other_lr=1e30, matrix_lr=1e30))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mha", "mla", "lrkv", "lrkv-nope", "csa"])
def test_recomputed_activations_change_nothing(name: str, tmp_path: Path) -> None:
    cfg = replace(CONFIG, tokens=1024, attention={"attention": name.partition("-")[0], **KINDS[name]})
    plain, saving = (run(tmp_path, replace(cfg, checkpointing=on))["curve"][0] for on in (False, True))
    for key in ("loss", "tuning", "test"):
        assert plain[key] == pytest.approx(saving[key], rel=1e-6)


def test_the_loss_is_what_transformers_says() -> None:
    torch.manual_seed(0)
    model = DecoderForCausalLM(CONFIG.model())
    torch.nn.init.normal_(model.lm_head.weight)
    x, text_loss = judged(CORPUS.test, 32, CPU, 3), TextLoss(model)
    wanted = [model(row[None], labels=row[None]).loss.item() for row in x]
    assert text_loss(x).item() == pytest.approx(fmean(wanted), rel=1e-5)
    for tokens in (1, 70, 10_000):
        assert window_losses(text_loss, x, tokens) == pytest.approx(wanted, rel=1e-5)
    assert text_loss.training and min(wanted) > 1.2 * math.log(4096), "wrong, and sure of it"


def test_the_learning_rate_warms_up_and_falls() -> None:
    cfg = replace(CONFIG, tokens=1000 * 256, warmup=10)
    factors = [cfg.factor(step) for step in range(cfg.steps)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[9]
    assert all(a > b for a, b in pairwise(factors[9:])) and factors[-1] == pytest.approx(FLOOR, rel=1e-3)
    assert factors[500] == pytest.approx((1 + FLOOR) / 2)
