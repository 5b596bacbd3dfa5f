"""Peers: other libraries' decode attention, each in a file that says how it is called and why that is its best setting.

A file gives `PEERS`, contenders (`bench.contender`), and imports its library only when it is asked to. All get random bf16 data, paged
ones in pages in random order, and what a serving engine prepares once per step for all layers (plans, schedules) is not timed.
"""

from kvstack.bench.contender import Contender
from kvstack.bench.peers import flash3, flashinfer, sdpa, turboquant
from kvstack.errors import BadInputError

PEERS: dict[str, tuple[Contender, ...]] = {
    "sdpa": sdpa.PEERS,
    "flash3": flash3.PEERS,
    "flashinfer": flashinfer.PEERS,
    "turboquant": turboquant.PEERS,
}


def select(names: str) -> list[Contender]:
    """The peers of a text such as `sdpa, flash3`. Raises BadInputError."""
    words = [w for w in (word.strip() for word in names.split(",")) if w]
    for word in words:
        if word not in PEERS:
            raise BadInputError(f"There is no peer {word!r}. Give some of: {', '.join(PEERS)}.")
    return [peer for word in words for peer in PEERS[word]]
