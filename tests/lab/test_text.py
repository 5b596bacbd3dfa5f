"""Training text and held-out text: no module that is judged on is trained on, whatever the machine has installed."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from kvstack.errors import BadInputError
from kvstack.lab import text as lab_text
from kvstack.lab.text import HELD_OUT, TUNING, digest, held_out_text, training_text, tuning_text

torch.set_num_threads(1)


def put(root: Path, name: str, say: str, lines: int = 60) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{say} = {i}  # a line\n" for i in range(lines)), "utf-8")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of our own, and no packages."""
    monkeypatch.setattr(lab_text, "_stdlib", lambda: tmp_path)
    monkeypatch.setattr(lab_text, "PACKAGES", ())
    for name in ("argparse", "csv", "pdb", "ast", "io", "json/decoder", "test/test_csv", "xml/dom/csv", "backports/tarfile/__init__"):
        put(tmp_path, f"{name}.py", name.replace("/", "_"))
    put(tmp_path, "site-packages/thing.py", "thing")
    put(tmp_path, "tiny.py", "tiny", 3)
    put(tmp_path, "huge.py", "huge", 40_000)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n" * 100)
    put(tmp_path, "same.py", "io")
    return tmp_path


def names(texts: list[str]) -> set[str]:
    return {t.split(" =")[0] for t in texts}


def test_what_is_trained_on(library: Path) -> None:
    texts = training_text(10**9)
    assert names(texts) == {"ast", "io", "json_decoder", "test_test_csv"}
    assert len(texts) == 4, "equal files count once"


def test_packages_are_read_too(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("__init__", "core", "_vendor/shlex", "cmd/__init__"):
        put(tmp_path / "elsewhere" / "madeup", f"{name}.py", "madeup_" + name.replace("/", "_"))
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    monkeypatch.setattr(lab_text, "PACKAGES", ("madeup", "not_installed_anywhere"))
    monkeypatch.setattr(lab_text, "_stdlib", lambda: tmp_path / "json")
    assert names(training_text(10**9)) == {"json_decoder", "madeup___init__", "madeup_core"}


def test_training_text_is_the_same_each_time_and_limited_in_bytes(library: Path) -> None:
    everything = training_text(10**9)
    sizes = [len(t.encode()) for t in everything]
    for limit in (0, sizes[0] - 1, sizes[0], sum(sizes[:3]), sum(sizes[:3]) - 1, sum(sizes)):
        part = training_text(limit)
        assert part == everything[: len(part)] == training_text(limit)
        assert sum(sizes[: len(part)]) <= limit < sum(sizes[: len(part) + 1]) or part == everything


def test_where_a_file_lies_does_not_matter(library: Path) -> None:
    before = training_text(10**9)
    (library / "ast.py").rename(library / "xml" / "renamed.py")
    assert training_text(10**9) == before


def test_the_splits(library: Path) -> None:
    assert names(held_out_text().split("\n\n")) == {"argparse", "csv"}
    assert names(tuning_text().split("\n\n")) == {"pdb"}
    for name in ("argparse", "csv"):
        (library / f"{name}.py").unlink()
    with pytest.raises(BadInputError, match="pass your own file with --text"):
        held_out_text()


def test_the_splits_are_apart() -> None:
    assert not set(HELD_OUT) & set(TUNING)
    assert len(held_out_text()) > 400_000 and len(tuning_text()) > 100_000


def test_no_copy_of_a_judged_module_is_trained_on_here() -> None:
    """On this machine, with all its packages: neither the file nor one that says most of the same, as vendored copies do."""
    judged = {n: t for n in (*HELD_OUT, *TUNING) if (t := lab_text._read(lab_text._stdlib() / f"{n}.py")) is not None}
    owner = {line: name for name, text in judged.items() for line in text.splitlines() if len(line.strip()) > 25}
    lines = Counter(owner.values())
    texts = training_text(10**9)
    assert len(texts) > 1000 and not set(texts) & set(judged.values())
    for text in texts:
        for name, n in Counter(owner[line] for line in owner.keys() & set(text.splitlines())).items():
            assert n < 0.5 * lines[name], f"{name} is copied in {text[:200]!r}"


def test_a_digest_is_sixteen_digits_of_sha256() -> None:
    assert digest("abc") == "ba7816bf8f01cfea"
    assert digest("") != digest(" ")
