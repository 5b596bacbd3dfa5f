"""Searches in the public format: graphs of the right kind, answers of the right search, and the statistics of the public set."""

import json
import math
from collections import Counter
from pathlib import Path
from random import Random
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from kvstack.lab.public_dfs import DEPTHS, SPARSE, dfs_public, public_item, random_labelled_tree
from kvstack.lab.registry import bundled_model
from kvstack.lab.tokenizer import Words, load_tokenizer

torch.set_num_threads(1)
PUBLIC = Path(__file__).parents[3] / "shared" / "data" / "dfs_state_query_small.json"
TOK = load_tokenizer(bundled_model())
WORDS = Words(TOK)


def state(item: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Stack from the bottom and visited nodes of a search, by the rules of the benchmark."""
    stack, seen = [item["start_node"]], [item["start_node"]]
    for _ in range(item["steps"]):
        new = sorted({a + b - stack[-1] for a, b in item["graph"]["edges"] if stack[-1] in (a, b)} - set(seen))
        if new:
            stack.append(new[0])
            seen.append(new[0])
        else:
            stack.pop()
    return stack, seen


def test_trees_are_drawn_evenly() -> None:
    rng = Random(0)
    found = Counter(frozenset(random_labelled_tree(rng, 4)) for _ in range(3200))
    assert len(found) == 16, "Cayley: 4^2 trees"
    assert sum((n - 200) ** 2 / 200 for n in found.values()) < 37.7, "99.9 % quantile of chi^2, 15 degrees"


@pytest.mark.parametrize("depth", [DEPTHS[0], 13, DEPTHS[-1]])
def test_items_are_connected_graphs_in_which_the_walk_does_not_end(depth: int) -> None:
    for seed in range(40):
        item = public_item(Random(seed), depth)
        nodes, edges = item["graph"]["nodes"], item["graph"]["edges"]
        assert 10 <= len(nodes) <= 20 and nodes == list(range(len(nodes))) and len(nodes) - 1 <= len(edges) <= len(nodes) + 2
        assert len({tuple(e) for e in edges}) == len(edges) and all(a < b for a, b in edges)
        whole = {**item, "steps": 2 * (len(nodes) - 1)}
        assert sorted(state(whole)[1]) == nodes and state(whole)[0] == [0] and item["steps"] == depth < whole["steps"]


def test_samples_end_in_the_state_of_the_search() -> None:
    depths = set()
    for seed in range(40):
        s, item = dfs_public(WORDS, Random(seed)), public_item(rng := Random(seed), rng.choice(DEPTHS))
        stack, seen = state(item)
        depths.add(item["steps"])
        ends = TOK.decode(s.tokens).split(" stack")[1].replace("<|eos|>", "").split(" seen")
        assert [[int(x) for x in e.split()] for e in ends] == [stack[::-1], seen]
        assert len(s.items) == item["steps"] + 3 and 100 < len(s.tokens) < 260
    assert len(depths) > 10 and dfs_public(WORDS, Random(0), depth=20).items[-1][1] < 260


@pytest.mark.skipif(not PUBLIC.is_file(), reason=f"the public DFS benchmark is not at {PUBLIC}")
def test_items_are_like_those_of_the_public_set() -> None:
    theirs = json.loads(PUBLIC.read_text("utf-8"))
    assert {e["start_node"] for e in theirs} == {0} and all(
        e["graph"]["nodes"] == list(range(len(e["graph"]["nodes"]))) for e in theirs
    )
    rng = Random(0)
    ours = [public_item(rng, e["steps"]) for e in theirs for _ in range(100)]

    def leaves(item: dict[str, Any]) -> float:
        degree = Counter(x for e in item["graph"]["edges"] for x in e)
        return sum(d == 1 for d in degree.values()) / len(degree)

    for what in (
        lambda e: len(e["graph"]["nodes"]),
        lambda e: len(e["graph"]["edges"]) - len(e["graph"]["nodes"]),
        leaves,
        lambda e: len(state(e)[0]),
        lambda e: len(state(e)[1]),
    ):
        a, b = [what(e) for e in theirs], [what(e) for e in ours]
        assert abs(mean(a) - mean(b)) < 3 * stdev(b) / math.sqrt(len(a))
    assert mean(e["metadata"]["graph_type"] == "sparse" for e in theirs) == SPARSE
