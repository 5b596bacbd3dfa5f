"""Results files carry what may change a number, say nothing of whose machine it was, and hold no NaN."""

import json
import os
import platform
from pathlib import Path

import pytest
import torch

from kvstack import environment
from kvstack.errors import ArtefactError


def test_the_stamp() -> None:
    stamp = environment.environment()
    assert stamp["torch"] == torch.__version__
    assert stamp["python"] == platform.python_version() and stamp["cores"] == os.cpu_count()
    assert (stamp["gpu"] is None) == (not torch.cuda.is_available())
    assert stamp["date"].endswith("Z") and len(stamp["date"]) == 20
    text = json.dumps(stamp, allow_nan=False)
    assert platform.node() not in text.split('"')
    for folder in (Path.home(), Path(environment.__file__).parent, Path.cwd()):
        assert str(folder) not in text


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    environment.write_results(path, "kvstack compare", [{"recipe": "polar4", "ratio": 3.8}])
    before = path.read_text("utf-8")
    results = json.loads(before)
    assert results["command"] == "kvstack compare" and results["rows"] == [{"recipe": "polar4", "ratio": 3.8}]
    assert results["environment"].keys() == environment.environment().keys()
    with pytest.raises(ValueError, match="not JSON compliant"):
        environment.write_results(path, "x", [{"kl": float("nan")}])
    assert path.read_text("utf-8") == before and os.listdir(tmp_path) == ["r.json"]
    with pytest.raises(ArtefactError, match="folder that exists"):
        environment.write_results(tmp_path / "none" / "r.json", "x", [])


def test_no_commit_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "lib" / "kvstack" / "environment.py"))
    assert environment.environment()["commit"] is None
