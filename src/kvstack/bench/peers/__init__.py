"""Peers: other libraries' attention, each in a file that says how it is called and why that is its best setting.

A file gives `PEERS`, contenders (`bench.contender`) for decode steps, and imports its library only when it is asked to. All get random
bf16 data, paged ones in pages in random order, and what a serving engine prepares once per step for all layers (plans, schedules) is
not timed. `PREFILL` are those that can also take many queries at once.
"""

from collections.abc import Mapping

from kvstack.bench.contender import Contender
from kvstack.bench.own import words
from kvstack.bench.peers import flash3, flashinfer, sdpa, turboquant
from kvstack.errors import BadInputError

PEERS: dict[str, tuple[Contender, ...]] = {
    "sdpa": sdpa.PEERS,
    "flash3": flash3.PEERS,
    "flashinfer": flashinfer.PEERS,
    "turboquant": turboquant.PEERS,
}
PREFILL: dict[str, tuple[Contender, ...]] = {"sdpa": sdpa.PEERS, "flash3": flash3.PREFILL}


def select(names: str, among: Mapping[str, tuple[Contender, ...]] = PEERS) -> list[Contender]:
    """The peers of a text such as `sdpa, flash3`. Raises BadInputError."""
    found: list[Contender] = []
    for word in words(names):
        if word not in among:
            raise BadInputError(f"There is no peer {word!r}. Give some of: {', '.join(among)}.")
        found += among[word]
    return found
