"""Models by name: the bundled one, folders, and what is said when there is none."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvstack.errors import BadInputError
from kvstack.lab import registry
from kvstack.lab.registry import bundled_model, load, load_profile

torch.set_num_threads(1)


def test_the_bundled_model_loads_with_its_tokenizer_and_profile() -> None:
    model, tok = load("bundled", device="cpu")
    assert model.dtype == torch.float32 and not model.training and model.device.type == "cpu"
    assert len(tok) == model.config.vocab_size == 4096
    profile = load_profile("bundled")
    assert profile is not None
    profile.check(model)
    assert load("bundled", torch.bfloat16, "cpu")[0].dtype == torch.bfloat16


def test_the_bundled_model_writes_python() -> None:
    model, tok = load("bundled", device="cpu")
    ids = torch.tensor([[tok.bos_token_id, *tok.encode("    for i in", add_special_tokens=False)]])
    with torch.inference_mode():
        new = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]
    assert tok.decode(new) == " range"


def test_a_folder_keeps_the_type_of_its_checkpoint_and_may_have_no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(bundled_model(), tmp_path / "mine")
    (tmp_path / "mine" / "profile" / "profile.safetensors").unlink()
    assert load(str(tmp_path / "mine"), device="cpu")[0].dtype == torch.float16
    assert load_profile(str(tmp_path / "mine")) is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/mine", device="cpu")[0].dtype == torch.float16


def test_a_missing_bundled_model_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTACK_MODELS", str(tmp_path))
    for call in (bundled_model, lambda: load("bundled"), lambda: load_profile("bundled")):
        with pytest.raises(BadInputError, match="set KVSTACK_MODELS to its models folder, or train one with `kvstack lab train`"):
            call()
    monkeypatch.undo()
    found = bundled_model()
    monkeypatch.setenv("KVSTACK_MODELS", str(found.parent))
    assert bundled_model() == found


def test_a_path_without_a_model_is_refused_and_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path), "./nothing", "empty", "~/nothing", "/nothing"):
        with pytest.raises(BadInputError, match=r"no config\.json\. Give a folder, a hub name, or `bundled`"):
            load(name)


@pytest.mark.parametrize("config", ["{}", "no json", '{"model_type": "abacus"}', '{"model_type": "qwen3"}'])
def test_a_folder_that_transformers_cannot_load_is_refused(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadInputError, match=r"Could not load .*\. Give a folder, a hub name, or `bundled`\."):
        load(str(tmp_path))


def test_other_names_are_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, bool]] = []

    def absent(name: Any, *, local_files_only: bool, **_: Any) -> None:
        asked.append((name, local_files_only))
        raise OSError("there is no such model.\nlong advice")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", absent)
    with pytest.raises(BadInputError, match=r"^Could not load some/model: there is no such model\. Give a folder"):
        load("some/model")
    assert asked == [("some/model", False)]
    assert registry.folder("some/model") == Path("some/model")
