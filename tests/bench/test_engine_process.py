"""Processes of engines: the models they get, what they are asked of us, and how it is told that they fail."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from kvstack.bench.engine_process import LIMIT, Served, recipe_of, run
from kvstack.bench.generate import SHAPES
from kvstack.profile import Profile
from kvstack.vllm.settings import VARIABLE

FINE = """
import json, sys
task = json.load(open(sys.argv[1]))
print("half", flush=True)
open(sys.argv[2], "w").write(json.dumps([task["a"] + 1]))
print("whole")
"""


@pytest.mark.parametrize("shape", SHAPES)
def test_a_random_model_has_a_config_and_a_profile(shape: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(Served.of(shape, None, tmp_path).path)
    name, wanted = SHAPES[shape]
    assert config.architectures == [f"{name}ForCausalLM"] and config.max_position_embeddings == LIMIT
    assert config.dtype == torch.bfloat16
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size"):
        assert getattr(config, key) == wanted[key]
    profile = Profile.load(tmp_path / "model" / "profile" / "profile.safetensors")
    layers, heads, kv_heads = (wanted[f"num_{key}"] for key in ("hidden_layers", "attention_heads", "key_value_heads"))
    assert profile.query_norm.shape == (layers, heads, wanted["head_dim"] // 2)
    assert profile.key_centre.shape == (layers, kv_heads, wanted["head_dim"]) and float(profile.concentration().max()) < 0.7
    assert not list((tmp_path / "model").glob("*.safetensors")), "vLLM reads those as weights"


def test_what_a_process_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "polar3")
    monkeypatch.chdir(tmp_path)
    served = Served.of("a/hub-name", Path("p.safetensors"), tmp_path)
    assert (served.path, served.random) == ("a/hub-name", False)
    assert VARIABLE not in served.environment("bf16", None, tmp_path)
    for kv, wanted in (("polar4", {}), ("tri(256)+polar4", {"profile": str(tmp_path / "p.safetensors")})):
        asked = served.environment(kv, recipe_of(kv), tmp_path)[VARIABLE]
        assert json.loads(Path(asked).read_text("utf-8")) == {"recipe": kv} | wanted


def test_a_process_tells_as_it_goes_and_gives_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fine.py").write_text(FINE)
    (tmp_path / "broken.py").write_text(FINE + "print('ValueError: this [one]')\nprint('the end')\nsys.exit(3)")
    (tmp_path / "above.py").write_text(
        "print('KeyError: 1\\nraise RuntimeError(\\nRuntimeError: it failed. See root cause above.')\nexit(1)"
    )
    (tmp_path / "silent.py").write_text("import sys; sys.exit(4)")
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    found = [
        run(name, name, {"a": 1}, tmp_path, dict(os.environ), tmp_path / "log", lines.append)
        for name in ("fine", "broken", "above", "silent")
    ]
    whys = None, "ValueError: this [one]", "KeyError: 1", "exit code 4 and no output"
    assert found == list(zip(([2], [2], None, None), whys, strict=True))
    assert lines[:2] == ["half\n", "whole\n"]
    assert (tmp_path / "log").read_text("utf-8").splitlines()[:4] == ["=== fine", "half", "whole", "=== broken"]
