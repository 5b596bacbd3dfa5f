"""TriAttention's files of query statistics: there and back, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import SIZES, make, tokens

from kvstack.calibrate import calibrate, read_upstream, write_upstream
from kvstack.errors import ArtefactError, UnsupportedModelError

torch.set_num_threads(1)


def test_there_and_back(tmp_path: Path) -> None:
    for model, style in ((make("qwen3-128"), "half"), (hf.CohereForCausalLM(hf.CohereConfig(**SIZES)), "interleaved")):
        profile, path = calibrate(model, [tokens(1, 20)]), tmp_path / f"{style}.pt"
        write_upstream(profile, path, model)
        about = torch.load(path, weights_only=True)["metadata"]
        assert about["rope_style"] == style and len(about["sampled_heads"]) == 8
        found = read_upstream(path, model)
        for name in ("query_mean_real", "query_mean_imag", "query_norm", "rope_frequency"):
            assert torch.equal(getattr(found, name), getattr(profile, name))
        assert not found.key_centre.any() and found.key_centre.shape == profile.key_centre.shape
        assert "centres of keys and values are zero" in found.source and found.tokens == 0
        found.check(model)
        found.save(tmp_path / "p")


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["stats"].pop("layer01_head02"), "Use complete statistics"),
        (lambda f: f["metadata"]["sampled_heads"].pop(), "7 of the 2 x 4 heads"),
        (lambda f: f["metadata"]["sampled_heads"].append([2, 0]), "1 that it has not"),
        (lambda f: f["metadata"].update(head_dim=64), "head_dim 64, and the model 128"),
        (lambda f: f["metadata"].update(rope_style="interleaved"), "rope_style 'interleaved', and the model 'half'"),
        (lambda f: f["stats"]["layer00_head00"].pop("q_abs_mean"), r"`q_abs_mean` of some head.*\[64\]"),
        (lambda f: f["stats"]["layer00_head00"].update(q_mean_real=torch.zeros(32)), "`q_mean_real` of some head"),
        (lambda f: f["stats"]["layer00_head00"].update(q_mean_real=torch.full((64,), torch.nan)), "NaN or Inf"),
        (lambda f: f.pop("stats"), "no file of TriAttention statistics"),
    ],
)
def test_what_does_not_fit_is_refused(change: Change, message: str, tmp_path: Path) -> None:
    model, path = make("qwen3-128"), tmp_path / "x.pt"
    write_upstream(calibrate(model, [tokens(1, 8)]), path, model)
    file = torch.load(path, weights_only=True)
    change(file)
    torch.save(file, path)
    with pytest.raises(ArtefactError, match=message):
        read_upstream(path, model)


def test_files_that_are_none(tmp_path: Path) -> None:
    model, path = make("qwen3-128"), tmp_path / "x.pt"
    with pytest.raises(ArtefactError, match=r"cannot be read.*Check the path"):
        read_upstream(path, model)
    for content in (b"", b"no pickle at all", b"PK\x03\x04 no archive"):
        path.write_bytes(content)
        with pytest.raises(ArtefactError, match="no file of TriAttention statistics"):
            read_upstream(path, model)
    torch.save(torch.nn.Linear(2, 2), path)  # code, which weights_only does not run
    with pytest.raises(ArtefactError, match="no file of TriAttention statistics"):
        read_upstream(path, model)


def test_models_that_it_cannot_describe(tmp_path: Path) -> None:
    parameters = {"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    model = hf.PhiForCausalLM(hf.PhiConfig(**SIZES, rope_parameters=parameters))
    profile = calibrate(model, [tokens(1, 8)])
    with pytest.raises(UnsupportedModelError, match="does not turn, which the format cannot say"):
        write_upstream(profile, tmp_path / "x.pt", model)
    with pytest.raises(ArtefactError, match="Calibrate one on your model"):
        write_upstream(profile, tmp_path / "x.pt", make("qwen3-128"))
    assert not list(tmp_path.iterdir())
