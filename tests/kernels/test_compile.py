"""Every kernel compiles ahead of time for its targets, within the registers, spills, shared memory and loops of `budgets.json`; and
those that a server needs compile a few times, whatever its requests are."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def told_by(script: str) -> Any:
    """What a process prints, which must not be told to interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, HERE / script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_kernels_of_a_server_have_few_variants() -> None:
    """Chunks of up to 32 tokens, of up to a page and, of polar codes, of more are stored by a kernel each, and partials of several
    programs have another type. What evicts is the same for all rows that are due."""
    few = {"fold_kernel": 1, "prefill_kernel": 2, "step_kernel": 1, "linear_kernel": 1, "top_kernel": 1, "move_kernel": 1}
    assert told_by("variants.py") == {name: few | {"encode_kernel": n} for name, n in (("polar4", 3), ("k4v2", 3), ("fp8", 2))}


@pytest.mark.slow
def test_kernels_compile_within_their_budgets() -> None:
    """One process for all of them."""
    measured, budgets = told_by("ahead.py"), json.loads((HERE / "budgets.json").read_text("utf-8"))
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
