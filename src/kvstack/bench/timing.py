"""Time of GPU work, so that neither Python, nor launches, nor the cache make it look better or worse than it is in a model.

Calls are recorded in a CUDA graph, whose replay costs no Python, and the graph repeats them until it runs for milliseconds. Data that
would stay in the level-2 cache from one call to the next exists in so many copies that it cannot (`copies`); a graph walks through all
of them. A time is the median over replays. This module knows nothing of attention.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]
_CACHES = 8  # bytes that a graph walks through, in sizes of the level-2 cache


@dataclass(frozen=True)
class Timing:
    """us: microseconds of one call. calls: that one graph holds. replays: over which the median is."""

    us: float
    calls: int
    replays: int


def copies(nbytes: int, device: torch.device) -> int:
    """How many runs of `nbytes` each must take turns so that the cache does not help."""
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, math.ceil(_CACHES * cache / nbytes))


def time_calls(calls: Sequence[Call], replays: int = 25, milliseconds: float = 4.0) -> Timing:
    """The time of one of `calls`, which are made in turn until a graph of them runs for about `milliseconds`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and allocate outside of the graph
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    once = _replay(_record(calls, 1), 5)
    rounds = max(1, math.ceil(milliseconds / once))
    ms = _replay(_record(calls, rounds), replays)
    return Timing(1e3 * ms / (rounds * len(calls)), rounds * len(calls), replays)


def copy_tb_s(device: torch.device, nbytes: int = 1 << 31) -> float:
    """Bandwidth of a device copy in TB/s, bytes read plus bytes written. Not from a graph, in which a copy is slower than outside."""
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / median(_elapsed(lambda: target.copy_(source)) for _ in range(10)) / 1e9


def _record(calls: Sequence[Call], rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Median milliseconds of a replay."""
    graph.replay()
    return median(_elapsed(graph.replay) for _ in range(replays))


def _elapsed(call: Call) -> float:
    """Milliseconds of the GPU work of a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
