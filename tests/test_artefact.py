"""Saved artefacts: what is written comes back, and a file that is wrong in any way is refused with a remedy."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from kvstack import artefact
from kvstack.errors import ArtefactError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]
DTYPES += [torch.float8_e4m3fn]


def example() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = {str(d): torch.randint(0, 2, (3, 4), generator=g).to(d) for d in DTYPES}
    return {**tensors, "scalar": torch.tensor(1.5), "empty": torch.empty(0, 4)}


def write(path: Path) -> None:
    artefact.write(path, example(), "kvstack.test", 1, {"fingerprint": "abc", "n": 3})


def read(path: Path) -> tuple[dict[str, Tensor], artefact.Json]:
    return artefact.read(path, "kvstack.test", 1)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path)
    tensors, metadata = read(path)
    assert metadata == {"fingerprint": "abc", "n": 3}
    assert tensors.keys() == example().keys()
    for name, t in example().items():
        assert tensors[name].dtype == t.dtype and tensors[name].shape == t.shape
        assert torch.equal(tensors[name].float(), t.float())
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    x = torch.arange(24.0).reshape(4, 6)
    path = tmp_path / "a"
    artefact.write(path, {"t": x.T, "part": x[:, 1:3]}, "kvstack.test", 1, {})
    tensors, _ = read(path)
    assert torch.equal(tensors["t"], x.T) and torch.equal(tensors["part"], x[:, 1:3])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_flipped_bit_goes_unseen(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.safetensors"
    write(path)
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        tensors, metadata = read(path)
    except ArtefactError:
        return
    # Only white space of the header, which carries nothing, may change unseen.
    assert metadata == {"fingerprint": "abc", "n": 3}
    for name, t in example().items():
        assert tensors[name].dtype == t.dtype and torch.equal(tensors[name].float(), t.float())


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, 0.99])
def test_truncation_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a"
    write(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(ArtefactError, match="copy it again"):
        read(path)


def test_missing_foreign_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="does not exist"):
        read(tmp_path / "none")
    with pytest.raises(ArtefactError, match=r"cannot be read|damaged"):
        read(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ArtefactError, match="not written by kvstack"):
        read(tmp_path / "foreign")
    write(tmp_path / "a")
    with pytest.raises(ArtefactError, match=r"is a kvstack\.test file; a kvstack\.profile"):
        artefact.read(tmp_path / "a", "kvstack.profile", 1)
    with pytest.raises(ArtefactError, match="version 1, and this kvstack reads version 2"):
        artefact.read(tmp_path / "a", "kvstack.test", 2)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError), artefact.replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a"]


def test_an_unwritable_place_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="folder that exists"):
        write(tmp_path / "no" / "such" / "folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtefactError, match="cannot be written"):
        write(tmp_path / "folder")


def test_nan_in_metadata_is_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        artefact.write(tmp_path / "a", {}, "kvstack.test", 1, {"x": float("nan")})
