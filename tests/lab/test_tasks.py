"""Tasks, solved again from their text: a solver that shares no code with the generators fills the blanks where the answers were."""

import inspect
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from kvstack.lab import tasks
from kvstack.lab.registry import bundled_model
from kvstack.lab.tasks import TASKS, Sample, dfs_from_public, make
from kvstack.lab.tokenizer import BOS, EOS, Words, load_tokenizer

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
PUBLIC = ROOT.parent / "shared" / "data" / "dfs_state_query_small.json"
TOK = load_tokenizer(bundled_model())
WORDS = Words(TOK)
TEXT = TOK.encode(inspect.getsource(tasks), add_special_tokens=False)
BLANK = "\N{FULL BLOCK}"
LENGTHS = (256, 1024, 4096)


def sample(name: str, length: int, seed: int, **options: Any) -> Sample:
    return make(name, WORDS, Random(seed), length, TEXT, **options)


def puzzle(s: Sample) -> tuple[str, list[str]]:
    """The text of a sample with a blank for every answer, and the answers."""
    edges = sorted({0, len(s.tokens), *(e for item in s.items for e in item)})
    parts = [((a, b) in s.items, TOK.decode(s.tokens[a:b])) for a, b in pairwise(edges)]
    return "".join(BLANK if item else text for item, text in parts), [text for item, text in parts if item]


def solve_recall(text: str) -> Iterator[str]:
    known = {m[1]: m[2] for m in re.finditer(r"^( \d+ \d+) =( \d+ \d+)$", text, re.M)}
    for key in re.findall(rf"^( \d+ \d+) ={BLANK}$", text, re.M):
        yield known[key]


def solve_quote(text: str) -> Iterator[str]:
    listing, _, questions = text.rpartition("\n ?\n")
    known = {m[1]: m[2] for m in re.finditer(r"\n( \d+) :(.*?)(?=\n \d+ [:*]|\Z)", listing, re.S)}
    for label in re.findall(rf"^( \d+) :{BLANK}$", questions, re.M):
        yield known[label]


def tour(graph: dict[int, list[int]], at: int, seen: list[int]) -> Iterator[tuple[str, int]]:
    """Moves of a depth-first search that takes the smallest new neighbour; `seen` grows as it goes."""
    seen.append(at)
    for near in sorted(graph[at]):
        if near not in seen:
            yield " >", near
            yield from tour(graph, near, seen)
            yield " <", at


def search(graph: dict[int, list[int]], start: int, steps: int) -> tuple[list[str], list[int], list[int]]:
    """The first moves, the stack from the bottom, and the visited nodes in order."""
    moves, stack, seen = [], [start], []
    walk = tour(graph, start, seen)
    for _ in range(steps):
        mark, node = next(walk)
        stack = [*stack, node] if mark == " >" else stack[:-1]
        moves.append(f"{mark} {node}")
    # The generator marks a node only when it is asked for the move after it.
    visited = dict.fromkeys([start, *(int(m.split()[1]) for m in moves)])
    return moves, stack, list(visited)


def solve_dfs(text: str) -> Iterator[str]:
    graph = {int(a): [int(x) for x in b.split()] for a, b in re.findall(r"^ (\d+) :((?: \d+)*)$", text, re.M)}
    found = re.search(r"^ start (\d+) steps (\d+)$", text, re.M)
    assert found
    moves, stack, seen = search(graph, int(found[1]), int(found[2]))
    assert re.findall(rf"^ (\d+){BLANK}$", text, re.M) == [str(i + 1) for i in range(len(moves))]
    yield from moves
    yield f" {stack[-1]}"
    yield "".join(f" {x}" for x in reversed(stack)) + "\n"
    yield "".join(f" {x}" for x in seen) + "\n"


def solve_chain(text: str) -> Iterator[str]:
    value: dict[str, int] = {}
    for line in text.splitlines():
        if m := re.fullmatch(r" ([A-Z]) = (\d+)", line):
            value[m[1]] = int(m[2])
        elif m := re.fullmatch(rf" ([A-Z]) = ([A-Z]) \+ (\d+) :{BLANK}", line):
            before = value[m[2]]
            value[m[1]] = (before + int(m[3])) % 97
            yield f" {before} {value[m[1]]}"
        elif m := re.fullmatch(rf" ([A-Z]) :{BLANK}", line):
            yield f" {value[m[1]]}"


def solve_modular(text: str) -> Iterator[str]:
    total, kept = 0, {}
    for line in text.splitlines():
        if m := re.fullmatch(r" start (\d+)", line):
            total = int(m[1])
        elif m := re.fullmatch(rf" keep ([A-Z]) ={BLANK}", line):
            kept[m[1]] = total
            yield f" {total}"
        elif m := re.fullmatch(rf" ([+*]) (\w+) ={BLANK}", line):
            by = kept[m[2]] if m[2].isalpha() else int(m[2])
            total = (total + by if m[1] == "+" else total * by) % 97
            yield f" {total}"
        elif m := re.fullmatch(rf" ([A-Z]) \+ ([A-Z]) ={BLANK}", line):
            yield f" {kept[m[1]]} {kept[m[2]]} {(kept[m[1]] + kept[m[2]]) % 97}"


SOLVERS = {"recall": solve_recall, "quote": solve_quote, "dfs": solve_dfs, "chain": solve_chain, "modular": solve_modular}


def needed(name: str, s: Sample) -> float:
    """The share of the tokens that a solver must keep, counted in the text."""
    text, _ = puzzle(s)
    if name in ("recall", "quote"):
        pattern = r"^ \d+ \d+ ([=*]) \d+ \d+$" if name == "recall" else r"\n \d+ ([:*])(?=.*\n \?\n)"
        marks = re.findall(pattern, text.rpartition("\n ?\n")[0] + "\n ?\n", re.M if name == "recall" else re.S)
        return sum(m != "*" for m in marks) / len(marks)
    if name == "dfs":
        seen = TOK.decode(s.tokens).rsplit(" seen", 1)[1].split("\n")[0].split()
        listed = s.tokens.index(WORDS.ids[" start"])
        return (listed + 2 * len(seen)) / len(s.tokens)
    # A name, a sign and a value for each variable; the running total is a line of its own.
    names = set(re.findall(r"^ ([A-Z]) = \d+$" if name == "chain" else r"^ keep ([A-Z]) =", text, re.M))
    return (3 * len(names) + (5 if name == "modular" else 0)) / len(s.tokens)


def test_there_is_a_solver_for_every_task() -> None:
    assert list(SOLVERS) == list(TASKS)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", TASKS)
def test_every_answer_is_what_a_solver_finds(name: str, length: int) -> None:
    for seed in range(6):
        text, answers = puzzle(sample(name, length, seed))
        assert list(SOLVERS[name](text)) == answers
        assert answers


@pytest.mark.parametrize("options", [{"recall": 0.3}, {"quote": 0.3}, {"dfs": 7}, {"chain": 26}, {"modular": 26}], ids=str)
def test_options_leave_the_answers_right(options: dict[str, Any]) -> None:
    names = {"recall": "share", "quote": "share", "dfs": "steps", "chain": "variables", "modular": "labels"}
    for name, value in options.items():
        for length in LENGTHS:
            text, answers = puzzle(sample(name, length, 1, **{names[name]: value}))
            assert list(SOLVERS[name](text)) == answers


@pytest.mark.parametrize("length", [128, 256, 1000, 4096])
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in TASKS), ("recall", {"share": 0.05}), ("quote", {"share": 1.0}), ("chain", {"variables": 26}),
     ("modular", {"labels": 26}), ("modular", {"labels": 3})],
)  # fmt: skip
def test_length_and_items(name: str, options: dict[str, Any], length: int) -> None:
    for seed in range(10):
        s = sample(name, length, seed, **options)
        assert len(s.tokens) <= length
        assert s.tokens[0] == BOS and s.tokens[-1] == EOS and s.tokens.count(BOS) == s.tokens.count(EOS) == 1
        # Something comes before the first answer that predicts it, and answers come in order and apart.
        assert s.items[0][0] >= 1 and s.items[-1][1] <= len(s.tokens) - 1
        assert all(a < b for a, b in s.items) and all(x[1] <= y[0] for x, y in pairwise(s.items))
        if name != "dfs" and options.get("labels", 0) < 26:
            assert len(s.tokens) > 0.9 * length, "no sample wastes its length"


@pytest.mark.parametrize("name", TASKS)
def test_no_length_is_exceeded_by_a_token(name: str) -> None:
    for length in (*range(128, 160), *range(512, 544)):
        assert all(len(sample(name, length, seed).tokens) <= length for seed in range(5))


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_names_a_sample(name: str) -> None:
    assert sample(name, 512, 5) == sample(name, 512, 5)
    assert sample(name, 512, 5).tokens != sample(name, 512, 6).tokens


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", TASKS)
def test_the_declared_working_set_is_what_is_there(name: str, length: int) -> None:
    for seed in range(6):
        s = sample(name, length, seed)
        # Chain and modular state their share of the asked length, which the last line may leave open.
        assert s.working_set == pytest.approx(needed(name, s), rel=0.05)


def test_working_sets_span_the_range() -> None:
    def mean(name: str, length: int, **options: Any) -> float:
        return sum(sample(name, length, seed, **options).working_set for seed in range(20)) / 20

    narrow = [mean("chain", 2048, variables=26), mean("modular", 2048, labels=26), mean("chain", 1024, variables=8)]
    assert all(0.02 <= x <= 0.05 for x in narrow)
    assert max(narrow) < 0.4 < mean("dfs", 4096, steps=100) < 0.9
    for name in ("recall", "quote"):
        assert mean(name, 2048, share=1.0) == 1.0
        assert mean(name, 2048, share=0.3) == pytest.approx(0.3, abs=0.03)
        assert 0.85 < mean(name, 2048) < 1.0, "in training most samples need everything"


def final_state(s: Sample) -> dict[str, Any]:
    """Node, stack from the bottom and sorted visited nodes, read in the answer text."""
    found = re.search(r" at (\d+)\n stack((?: \d+)+)\n seen((?: \d+)+)\n<\|eos\|>$", TOK.decode(s.tokens))
    assert found
    stack, seen = ([int(x) for x in part.split()] for part in (found[2], found[3]))
    return {"current_node": int(found[1]), "stack": stack[::-1], "visited_nodes": sorted(seen)}


OWN = [
    # there and back on a path
    {"graph": {"nodes": [0, 1, 2], "edges": [[0, 1], [1, 2]]}, "start_node": 0, "steps": 3,
     "answer": {"current_node": 1, "stack": [0, 1], "visited_nodes": [0, 1, 2]}},
    # a cycle, whose edges are not in ascending order
    {"graph": {"nodes": [0, 1, 2, 3], "edges": [[0, 2], [2, 3], [0, 1], [1, 2]]}, "start_node": 0, "steps": 3,
     "answer": {"current_node": 3, "stack": [0, 1, 2, 3], "visited_nodes": [0, 1, 2, 3]}},
    # a star from one of its points: to the centre, to the smallest point and back
    {"graph": {"nodes": [9, 40, 200, 255], "edges": [[9, 255], [9, 200], [9, 40]]}, "start_node": 200, "steps": 3,
     "answer": {"current_node": 9, "stack": [200, 9], "visited_nodes": [9, 40, 200]}},
]  # fmt: skip


@pytest.mark.parametrize("entry", OWN, ids=["path", "cycle", "star"])
def test_searches_worked_out_by_hand(entry: dict[str, Any]) -> None:
    assert final_state(dfs_from_public(WORDS, entry)) == entry["answer"]


@pytest.mark.skipif(not PUBLIC.is_file(), reason=f"the public DFS benchmark is not at {PUBLIC}")
def test_the_public_benchmark_agrees() -> None:
    entries = json.loads(PUBLIC.read_text("utf-8"))
    fit = [e for e in entries if max(e["graph"]["nodes"]) < 256 and e["steps"] < 512]
    assert len(fit) >= 30
    for entry in fit:
        s = dfs_from_public(WORDS, entry)
        assert final_state(s) == {**entry["answer"], "visited_nodes": sorted(entry["answer"]["visited_nodes"])}
        text, answers = puzzle(s)
        assert list(solve_dfs(text)) == answers
