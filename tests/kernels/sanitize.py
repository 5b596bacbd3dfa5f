"""Every kernel under compute-sanitizer, as a results file: `python tests/kernels/sanitize.py memcheck|racecheck [FILE]`.

    {tool, part, reports, kernels, wrong}

`every.py` runs in parts, side by side. reports: that the tool counted. kernels: how many are about which kernel and line; what Triton
adds has the line of the kernel's `def` or of its call of `warp_specialize`. wrong: what `every.py` says of results that are wrong under
the tool, None if they are right. With a FILE, rows are written there; without, they are printed.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kvstack.environment import write_results

PARTS = 12
OPTIONS = {"memcheck": (), "racecheck": ("--racecheck-report", "hazard", "--print-limit", "10000")}


def parsed(log: str) -> tuple[int, dict[str, int]]:
    """The number of reports in what the tool printed, and of which lines. Raises ValueError when it did not come to its end."""
    summary = re.search(r"SUMMARY: (\d+) (?:errors?|hazards? displayed)", log)
    if summary is None:
        raise ValueError(f"the tool did not come to its end:\n{log[-2000:]}")
    # Of a hazard two accesses are told; the first one stands for it.
    told = re.findall(r"(?:hazard detected|Invalid|Misaligned).*\n=+ +(?:\w+ Thread \([\d,]+\) )?at (\w+)\+0x\w+(?: in (\S+))?", log)
    return int(summary[1]), dict(Counter(" ".join(at).strip() for at in told))


def run(tool: str, part: int) -> dict[str, Any]:
    """The row of one part."""
    every = Path(__file__).with_name("every.py")
    command = ["compute-sanitizer", "--tool", tool, *OPTIONS[tool], sys.executable, str(every), f"{part}/{PARTS}"]
    # Memory that PyTorch holds back would hide what is read behind an end.
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    reports, kernels = parsed(done.stdout)
    wrong = done.stderr.strip() if "Target application returned an error" in done.stdout else None
    return {"tool": tool, "part": part, "reports": reports, "kernels": kernels, "wrong": wrong}


def main(tool: str, file: str | None = None) -> None:
    if tool not in OPTIONS:
        sys.exit(f"There is no tool {tool!r}. Give memcheck or racecheck.")
    with ThreadPoolExecutor(PARTS) as pool:
        rows = list(pool.map(lambda part: run(tool, part), range(PARTS)))
    if file:
        write_results(file, f"python tests/kernels/sanitize.py {tool} {file}", rows)
    else:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
