"""What `bench error` measures: the error of one row, at every length and for all bits, and who was left out."""

from dataclasses import replace

import pytest
import torch

from kvstack.bench import error, own
from kvstack.errors import KVStackError

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the benchmark itself checks")


def test_a_row_per_length_and_contender() -> None:
    fast, absent = own.contenders("4, k4v2", 64)
    fast, absent, seen = replace(fast, missing=lambda _: None), replace(absent, missing=lambda _: "not here"), []
    rows = error.measure((5, 300), 64, [fast, absent], CPU, lambda done, total: seen.append((done, total)))
    assert [(r["N"], r["bits"], r.get("reason")) for r in rows] == [
        (5, "4", None), (5, "k4v2", "not here"), (300, "4", None), (300, "k4v2", "not here"),
    ]  # fmt: skip
    assert all(0 < r["error"] < 1e-5 for r in rows[::2]) and rows[1]["error"] is None and seen[-1] == (4, 4)


def test_what_is_wrong_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    (c,) = own.contenders("4", 64)
    monkeypatch.setattr(error, "WRONG", 1e-9)
    with pytest.raises(KVStackError, match="4 bits was not timed"):
        error.measure((300,), 64, [replace(c, missing=lambda _: None)], CPU, lambda *_: None)
