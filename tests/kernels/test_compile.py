"""Every kernel compiles ahead of time for every target, within the registers, spills and shared memory of `budgets.json`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_kernels_compile_within_their_budgets() -> None:
    """One process for all of them, which must not be told to interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, HERE / "ahead.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    measured, budgets = json.loads(done.stdout), json.loads((HERE / "budgets.json").read_text("utf-8"))
    assert {k: set(targets) for k, targets in measured.items()} == {k: set(targets) for k, targets in budgets.items()}
    over = [
        f"{kernel}, {target}: {taken} {what}, {budgets[kernel][target][what]} allowed"
        for kernel, targets in measured.items()
        for target, resources in targets.items()
        for what, taken in resources.items()
        if taken > budgets[kernel][target][what]
    ]
    assert not over
