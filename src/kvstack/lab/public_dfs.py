"""`dfs_public`: searches as in the public DFS state-query benchmark (TriAttention, arXiv 2604.04921), at any depth.

An item is a graph of 10-20 nodes 0, 1, ..., a walk from node 0 and the number of its steps, which is the depth; the set has depths of
6 to 20. Two thirds of the graphs are random labelled trees, the others have 1-3 edges more. The benchmark asks for the state at the
end in JSON; here it is the trace and then the state, in the words of `tasks.dfs`, which is some 200 tokens whatever else is asked.
"""

from collections import Counter
from random import Random
from typing import Any

from kvstack.lab.tasks import Sample, dfs_from_public
from kvstack.lab.tokenizer import Words

DEPTHS = range(6, 21)
NODES = range(10, 21)
SPARSE = 11 / 30  # share of graphs that are no trees


def random_labelled_tree(rng: Random, nodes: int) -> list[tuple[int, int]]:
    """Edges `(a, b)`, a < b, of a tree drawn evenly among all with these labels: a random Prüfer sequence, decoded."""
    sequence = [rng.randrange(nodes) for _ in range(nodes - 2)]
    left = Counter([*range(nodes), *sequence])  # edges that each node still needs
    edges = []
    for x in sequence:
        leaf = min(y for y in range(nodes) if left[y] == 1)
        edges.append((min(leaf, x), max(leaf, x)))
        left[leaf] -= 1
        left[x] -= 1
    a, b = (y for y in range(nodes) if left[y] == 1)
    return [*edges, (a, b)]


def public_item(rng: Random, depth: int) -> dict[str, Any]:
    """One item in the format of the public set, without its answer: `graph` (`nodes`, `edges`), `start_node` and `steps`."""
    nodes = rng.randint(max(NODES[0], depth // 2 + 2), NODES[-1])  # the last of the 2 (nodes - 1) moves is not asked for
    edges = set(random_labelled_tree(rng, nodes))
    size = nodes - 1 + (rng.randint(1, 3) if rng.random() < SPARSE else 0)
    while len(edges) < size:
        a, b = sorted(rng.sample(range(nodes), 2))
        edges.add((a, b))
    return {"graph": {"nodes": list(range(nodes)), "edges": [list(e) for e in sorted(edges)]}, "start_node": 0, "steps": depth}


def dfs_public(w: Words, rng: Random, depth: int | None = None) -> Sample:
    """A sample of an item of `depth` steps (6..20; drawn when None), as long as it happens to be."""
    return dfs_from_public(w, public_item(rng, rng.choice(DEPTHS) if depth is None else depth))
