"""The environment stamp of results, and results files that carry it.

A results file is `{"command": ..., "environment": {...}, "rows": [...]}`: what was run, on what, and what came out. The stamp says
what may change a number and nothing about whose machine it was: no host names, no users, no paths.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvstack import artefact

PACKAGES = ("kvstack", "torch", "transformers", "triton", "numpy", "vllm")


def environment() -> dict[str, Any]:
    """Versions, processor, GPU, git commit and UTC date; None for what is not there."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "gpu": _gpu(),
    }


def write_results(path: str | os.PathLike[str], command: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a results file, replacing `path` atomically.

    Raises ValueError when a number is NaN or infinite, ArtefactError when the file cannot be written.
    """
    results = {"command": command, "environment": environment(), "rows": list(rows)}
    text = json.dumps(results, indent=1, allow_nan=False)
    with artefact.replacing(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a program prints, or None when it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _commit() -> str | None:
    """Commit of the checkout that this module runs from, with "+" when its sources differ from it; None when installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or not (commit := _output("git", "-C", str(root), "rev-parse", "HEAD")):
        return None
    return commit + ("+" if _output("git", "-C", str(root), "status", "--porcelain", "--", "src") else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": torch.cuda.get_device_name(),
        "count": torch.cuda.device_count(),
        "capability": f"{major}.{minor}",
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
    }
