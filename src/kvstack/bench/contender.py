"""A contender: one way to compute a `Problem` on a GPU, ours or another library's, and the check that it does compute it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kvstack.bench.problem import Problem

NAME = "kvstack"  # the name of contenders of ours
_QUERIES = 333  # new tokens a row, at most, of a problem to check


@dataclass(frozen=True)
class Run:
    """A problem with its data, ready to be computed again and again.

    call: from the queries to the output, whose numbers are in the order of `want`; it must not wait for the device. want: the same in
    float64, from the same stored data; None where outputs are checked in another way. nbytes: that a call must move at least, for
    attention those of K and V as stored. detail: what runs, for the results file. held: bytes of memory that a call touches here and
    there, if that is more than nbytes.
    """

    call: Callable[[], Any]
    want: Callable[[], Tensor] | None
    nbytes: int
    detail: str
    held: int | None = None


@dataclass(frozen=True)
class Contender:
    """name, bits: what it is called and how it stores K and V ("bf16", "fp8", or its bits). lengths: of the rows it is checked on.

    tolerance: RMS of the error over RMS of the output that a right one may have. missing: why it cannot run a problem here, or None.
    build: a run with data of its own. precise: it takes a float32 query, and is checked with one.
    """

    name: str
    bits: str
    tolerance: float
    missing: Callable[[Problem], str | None]
    build: Callable[[Problem, torch.device], Run]
    lengths: tuple[int, ...] = (1024, 1024)
    precise: bool = False

    def small(self, problem: Problem) -> Problem:
        """The problem with the heads of `problem` that the contender is checked on."""
        few = replace(problem, queries=min(problem.queries, _QUERIES))
        return few.like(self.lengths, torch.float32 if self.precise else None)

    def error(self, problem: Problem, device: torch.device) -> float:
        """The error on a small problem with the heads of `problem`; NaN when the output has one."""
        run = self.build(self.small(problem), device)
        assert run.want is not None
        want = run.want()
        return float((run.call().double().reshape(want.shape) - want).norm() / want.norm())


def unusable(module: str, package: str) -> str | None:
    """Why a module of a package that is perhaps not installed cannot be imported, or None."""
    if find_spec(module.partition(".")[0]) is None:
        return f"{package} is not installed"
    try:
        import_module(module)
    except Exception as e:  # other people's packages fail in their own ways, and none of them is ours
        return f"{module} cannot be imported: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
    return None


def version_of(package: str) -> str:
    """Name and version of an installed package."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def not_capable(*, least: tuple[int, int], most: tuple[int, int] = (99, 0)) -> str | None:
    """Why this GPU's compute capability is none from `least` to `most`, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    found = torch.cuda.get_device_capability()
    if least <= found <= most:
        return None
    return f"it does not run on compute capability {found[0]}.{found[1]}"
