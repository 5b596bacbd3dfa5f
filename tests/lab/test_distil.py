"""Distillation: the divergence falls, the same run gives the same weights, and the learning rate goes as it should."""

import math
from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvstack.attention import DecoderConfig, DecoderForCausalLM
from kvstack.attention.convert import convert, moments
from kvstack.errors import BadInputError
from kvstack.lab.corpus import as_tensor, judged
from kvstack.lab.distil import DistilConfig, distil, divergence

torch.set_num_threads(1)
CPU = torch.device("cpu")
CFG = DistilConfig(tokens=30 * 256, batch=256, length=32, lr=2e-3, every=7)
TEXT = np.random.default_rng(0).integers(0, 50, 20_000).astype(np.uint16)


@pytest.fixture(scope="module")
def teacher() -> Any:
    torch.manual_seed(0)
    cfg = DecoderConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        initializer_range=0.2,
    )
    model = DecoderForCausalLM(cfg).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def student(teacher: Any) -> Any:
    """To be copied."""
    return convert(teacher, moments(teacher, [judged(TEXT, 32, CPU, 8)]), "lrkv", 0)[0]


def quiet(row: dict[str, Any]) -> None: ...


def test_the_divergence_falls_on_other_text_and_the_teacher_stays(teacher: Any, student: Any) -> None:
    before, learner = deepcopy(teacher.state_dict()), deepcopy(student)
    other = judged(np.random.default_rng(1).integers(0, 50, 2000).astype(np.uint16), 32, CPU)
    rows: list[dict[str, Any]] = []
    curve = distil(learner, teacher, TEXT, CFG, rows.append)
    assert curve == rows and [r["step"] for r in curve] == [7, 14, 21, 28, 30] and curve[-1]["tokens"] == CFG.tokens
    assert all(b["kl"] < a["kl"] for a, b in pairwise(curve))
    with torch.no_grad():
        start, end = (divergence(s, teacher, other).item() for s in (student, learner))
    assert end < 0.6 * start and curve[-1]["kl"] == pytest.approx(end, rel=0.2)
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    assert all(p.grad is None for p in (*learner.parameters(), *teacher.parameters()))
    changed = [not torch.equal(a, b) for a, b in zip(learner.parameters(), student.parameters(), strict=True) if a.numel()]
    assert all(changed), "every parameter learns"


def test_a_run_can_be_repeated_and_a_seed_changes_it(teacher: Any, student: Any) -> None:
    def run(seed: int) -> tuple[list[float], list[Tensor]]:
        learner = deepcopy(student)
        cfg = DistilConfig(tokens=3 * 128, batch=128, length=32, every=1, seed=seed)
        return [r["kl"] for r in distil(learner, teacher, TEXT, cfg, quiet)], list(learner.parameters())

    (one, weights), (two, again), (other, _) = run(0), run(0), run(1)
    assert one == two and all(torch.equal(a, b) for a, b in zip(weights, again, strict=True)) and one[0] != other[0]


def test_parts_of_a_step_add_up_to_the_step(teacher: Any, student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = DistilConfig(tokens=7 * 32, batch=7 * 32, length=32)
    whole, parts = deepcopy(student), deepcopy(student)
    one = distil(whole, teacher, TEXT, cfg, quiet)
    monkeypatch.setattr("kvstack.lab.distil.AT_ONCE", 64)
    two = distil(parts, teacher, TEXT, cfg, quiet)
    assert one[0]["kl"] == pytest.approx(two[0]["kl"], rel=1e-5)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_divergence_is_that_of_its_definition(teacher: Any, student: Any) -> None:
    x = as_tensor(TEXT[:64], CPU).long().view(2, 32)
    with torch.no_grad():
        p, q = (model(x).logits.double().softmax(-1) for model in (teacher, student))
        assert divergence(student, teacher, x).item() == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
        assert divergence(teacher, teacher, x).item() == pytest.approx(0, abs=1e-6)


def test_the_learning_rate_warms_up_stays_and_falls_as_one_minus_a_root() -> None:
    cfg = DistilConfig(tokens=600, batch=1, length=1)
    factors = [cfg.factor(step) for step in range(600)]
    assert factors[0] == 1 / 60 and factors[29] == 0.5 and set(factors[59:501]) == {1.0}
    assert all(b < a for a, b in pairwise(factors[500:]))
    assert factors[525] == pytest.approx(1 - math.sqrt(0.25)) and 0 < factors[599] < 0.01
    assert [DistilConfig(tokens=1, batch=1, length=1).factor(0)] == [1.0]


def test_bad_input_is_refused(teacher: Any, student: Any) -> None:
    for sizes in ({"tokens": 100}, {"tokens": 10_000, "batch": 100, "length": 128}):
        with pytest.raises(BadInputError, match="make no step"):
            DistilConfig(**sizes)
    with pytest.raises(BadInputError, match="32 tokens, too few for a window of 32"):
        distil(deepcopy(student), teacher, TEXT[:32], CFG)
    with pytest.raises(BadInputError, match="Lower the learning rate"):
        distil(deepcopy(student), teacher, TEXT, DistilConfig(tokens=512, batch=256, length=32, lr=float("inf")), quiet)
