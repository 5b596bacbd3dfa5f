"""Every kernel compiles ahead of time for its targets, within the registers, spills, shared memory and loops of `budgets.json`."""

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
    bad = []
    for kernel, targets in measured.items():
        for target, resources in targets.items():
            allowed = budgets[kernel][target]
            assert set(resources) == set(allowed), f"{kernel}, {target}"
            for what, found in resources.items():
                if found != allowed[what] if isinstance(found, str) else found > allowed[what]:
                    bad.append(f"{kernel}, {target}: {what} {found}, but {allowed[what]} allowed")
    assert not bad
