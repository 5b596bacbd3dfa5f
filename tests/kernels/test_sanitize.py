"""What is taken from the logs of compute-sanitizer."""

import pytest
from sanitize import parsed

HAZARD = """========= Error: Potential RAW hazard detected at __shared__ 0x348da in block (2,2,0) :
=========     Write Thread (31,0,0) at prefill_kernel+0x14020 in prefill_hopper.py:399
=========     Read Thread (192,0,0) at prefill_kernel+0x100 in prefill_hopper.py:399
=========     Current Value : 0
"""
INVALID = """========= Invalid __global__ read of size 4 bytes
=========     at step_kernel+0x14020 in encode_step.py:60
=========     by thread (31,0,0) in block (0,0,0)
"""


def test_reports_are_counted_by_kernel() -> None:
    end = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    assert parsed("encode 4 {}\n" + HAZARD + HAZARD + end) == (2, {"prefill_kernel prefill_hopper.py:399": 2})
    assert parsed(INVALID + "========= ERROR SUMMARY: 1 error\n") == (1, {"step_kernel encode_step.py:60": 1})
    assert parsed("========= ERROR SUMMARY: 0 errors\n") == (0, {})


def test_a_log_without_an_end_is_no_result() -> None:
    with pytest.raises(ValueError, match="did not come to its end"):
        parsed(HAZARD)
