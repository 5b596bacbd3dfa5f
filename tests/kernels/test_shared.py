"""Kernels on a GPU that two processes share."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("shared.py")


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_results_do_not_depend_on_who_else_uses_the_gpu() -> None:
    """A kernel that is stopped in the middle and goes on later gives the same bits."""

    def run(processes: int) -> list[dict[str, list[str]]]:
        started = [subprocess.Popen([sys.executable, SCRIPT], stdout=subprocess.PIPE, text=True) for _ in range(processes)]
        return [json.loads(p.communicate()[0]) for p in started]

    (alone,) = run(1)
    assert all(len(found) == 1 for found in alone.values())
    assert run(2) == [alone, alone]
