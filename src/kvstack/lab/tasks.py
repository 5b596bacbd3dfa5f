"""Synthetic long-context tasks whose answers are known token by token.

A `Sample` is a token sequence and its *items*: the spans `[start, stop)` that are answers. An item is right when every token of it
is the model's first choice. Each task states its *working set*: the share of the context that any correct solver must keep.

    recall   key-value pairs, then questions                          all of it (or the share of lines that are pairs)
    quote    numbered passages of text, then verbatim quotes          all of it (or the share of passages that are numbered)
    dfs      a tree, then the trace of a depth-first search           about half
    chain    variables re-assigned from each other, modulo 97         the newest value of each variable, 0.5-5 %
    modular  a running total modulo 97 with early results kept        the kept results, 0.5-5 %

`dfs` has the rules of the public DFS state-query benchmark (ascending neighbours, stack and visited set after a number of steps).
Generators know nothing of models. They draw from `random.Random`, so a seed names a sample.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from kvstack.lab.tokenizer import BOS, EOS, Words

MODULUS = 97
QUOTED = 24  # tokens of one passage


@dataclass
class Sample:
    """`tokens` of one sequence, the spans of its answers, and the share of the context that a solver needs."""

    tokens: list[int]
    items: list[tuple[int, int]] = field(default_factory=list)
    working_set: float = 1.0

    def answer(self, tokens: Sequence[int]) -> None:
        """Append `tokens` as one item."""
        self.items.append((len(self.tokens), len(self.tokens) + len(tokens)))
        self.tokens += tokens


def _filled(rng: Random, share: float | None) -> float:
    """The share of lines that matter: as asked, or (when training) mostly all of them."""
    if share is not None:
        return share
    return 1.0 if rng.random() < 0.7 else rng.uniform(0.1, 1.0)


def recall(w: Words, rng: Random, length: int, share: float | None = None) -> Sample:
    """Pairs of two-number keys and values; a quarter of the length asks for them. share: lines that are pairs, not noise."""
    num, eq, end, noise = w.numbers, w.ids[" ="], w.ids["\n"], w.ids[" *"]
    share = _filled(rng, share)
    lines = max(2, (int(length * 0.75) - 6) // 6)
    pairs = max(1, int(lines * share))
    keys = rng.sample(range(512 * 512), lines)
    values = [rng.randrange(512 * 512) for _ in keys]
    real = set(rng.sample(range(lines), pairs)) if pairs < lines else set(range(lines))
    s = Sample([BOS, *w("recall", "\n")], working_set=pairs / lines)
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        s.tokens += [num[k >> 9], num[k & 511], eq if i in real else noise, num[v >> 9], num[v & 511], end]
    s.tokens += w(" ?", "\n")
    asked = list(real)
    while len(s.tokens) + 7 <= length:
        i = rng.choice(asked)
        s.tokens += [num[keys[i] >> 9], num[keys[i] & 511], eq]
        s.answer([num[values[i] >> 9], num[values[i] & 511]])
        s.tokens.append(end)
    s.tokens.append(EOS)
    return s


def quote(w: Words, rng: Random, length: int, share: float | None = None, *, text: Sequence[int]) -> Sample:
    """Numbered passages of `text` tokens, then some of them verbatim. share: passages that are numbered."""
    colon, end, noise = w.ids[" :"], w.ids["\n"], w.ids[" *"]
    share = _filled(rng, share)
    size = QUOTED if length >= 512 else 8
    count = max(2, min(512, int(length * 0.7) // (size + 3)))
    numbered = max(1, int(count * share))
    labels = rng.sample(range(512), count)
    real = set(rng.sample(range(count), numbered))
    s = Sample([BOS, *w("quote", "\n")], working_set=numbered / count)
    passages = []
    for i, label in enumerate(labels):
        start = rng.randrange(len(text) - size)
        passages.append([int(t) for t in text[start : start + size]])
        s.tokens += [w.numbers[label], colon if i in real else noise, *passages[-1], end]
    s.tokens += w(" ?", "\n")
    asked = list(real)
    while len(s.tokens) + size + 4 <= length:
        i = rng.choice(asked)
        s.tokens += [w.numbers[labels[i]], colon]
        s.answer(passages[i])
        s.tokens.append(end)
    s.tokens.append(EOS)
    return s


def chain(w: Words, rng: Random, length: int, variables: int | None = None) -> Sample:
    """`A = B + 13 : 17 30`: look up B, add, and give both; at the end a few variables are asked."""
    num, end, eq, plus, colon = w.numbers, w.ids["\n"], w.ids[" ="], w.ids[" +"], w.ids[" :"]
    n = variables or rng.randint(4, max(6, min(26, length // 80)))
    names = rng.sample(w.letters, n)
    value = [rng.randrange(MODULUS) for _ in names]
    s = Sample([BOS, *w("chain", "\n")], working_set=3 * n / length)
    for name, v in zip(names, value, strict=True):
        s.tokens += [name, eq, num[v], end]
    while len(s.tokens) + 9 + 16 <= length:
        i, j = rng.sample(range(n), 2)
        c = rng.randrange(MODULUS)
        value[i] = (value[j] + c) % MODULUS
        s.tokens += [names[i], eq, names[j], plus, num[c], colon]
        s.answer([num[value[j]], num[value[i]]])
        s.tokens.append(end)
    s.tokens += w(" ?", "\n")
    for i in rng.sample(range(n), min(3, n)):
        s.tokens += [names[i], colon]
        s.answer([num[value[i]]])
        s.tokens.append(end)
    s.tokens.append(EOS)
    return s


def modular(w: Words, rng: Random, length: int, labels: int | None = None) -> Sample:
    """A running total with a long scratchpad; results kept early under a letter are used much later and in the answers."""
    num, end, eq, plus, times = w.numbers, w.ids["\n"], w.ids[" ="], w.ids[" +"], w.ids[" *"]
    keep = w.ids[" keep"]
    n = labels or rng.randint(3, max(4, min(26, length // 128)))
    names = rng.sample(w.letters, n)
    kept: dict[int, int] = {}
    total = rng.randrange(MODULUS)
    s = Sample([BOS, *w("modular", "\n", " start"), num[total], end], working_set=(3 * n + 5) / length)
    steps = max(n + 2, (length - 8 * 8 - 10) // 5)
    early = set(rng.sample(range(max(n, steps // 4)), n))  # results are kept in the first quarter only
    for step in range(steps):
        if len(s.tokens) + 5 + 8 * 8 + 3 > length:  # this step, the questions, and what frames them
            break
        if step in early and len(kept) < n:
            name = names[len(kept)]
            kept[name] = total
            s.tokens += [keep, name, eq]
            s.answer([num[total]])
            s.tokens.append(end)
            continue
        kind = rng.random()
        if kept and kind < 0.2:
            name = rng.choice(list(kept))
            total = (total + kept[name]) % MODULUS
            s.tokens += [plus, name, eq]
        elif kind < 0.4:
            c = rng.choice((2, 3, 5))
            total = total * c % MODULUS
            s.tokens += [times, num[c], eq]
        else:
            c = rng.randrange(MODULUS)
            total = (total + c) % MODULUS
            s.tokens += [plus, num[c], eq]
        s.answer([num[total]])
        s.tokens.append(end)
    s.tokens += w(" ?", "\n")
    known = list(kept)
    for _ in range(8 if len(known) > 1 else 0):
        a, b = rng.sample(known, 2)
        s.tokens += [a, plus, b, eq]
        s.answer([num[kept[a]], num[kept[b]], num[(kept[a] + kept[b]) % MODULUS]])
        s.tokens.append(end)
    s.tokens.append(EOS)
    return s


def random_tree(rng: Random, nodes: int) -> dict[int, list[int]]:
    """Sorted neighbours of each node of a random tree whose labels are numbers under 256."""
    labels = rng.sample(range(256), nodes)
    graph: dict[int, list[int]] = {x: [] for x in labels}
    for i in range(1, nodes):
        a, b = labels[i], labels[rng.randrange(max(0, i - 6), i)]
        graph[a].append(b)
        graph[b].append(a)
    return {x: sorted(graph[x]) for x in rng.sample(labels, nodes)}


def dfs(
    w: Words,
    rng: Random,
    length: int,
    steps: int | None = None,
    *,
    graph: Mapping[int, Sequence[int]] | None = None,
    start: int | None = None,
) -> Sample:
    """Trace of a depth-first search (`3 > 17`: third step visits 17; `<`: back to), then node, stack from the top, visited."""
    num, end, colon, fwd, back = w.numbers, w.ids["\n"], w.ids[" :"], w.ids[" >"], w.ids[" <"]
    if graph is None:
        most = max(4, min(256, (length - 40) // 15))
        # Sequences of about the asked length, with now and then a small graph, as in the public set.
        small = steps is None and rng.random() < 0.15
        graph = random_tree(rng, rng.randint(4, most) if small else rng.randint(max(4, int(0.8 * most)), most))
    start = next(iter(graph)) if start is None else start
    total = 2 * (len(graph) - 1)
    if steps is None:
        steps = total if rng.random() < 0.5 else rng.randint(1, total)
    s = Sample([BOS, *w("dfs", "\n")])
    for x, near in graph.items():
        s.tokens += [num[x], colon, *(num[y] for y in near), end]
    listed = len(s.tokens)
    s.tokens += [*w(" start"), num[start], *w(" steps"), num[steps], end]
    seen, stack, moved = {start: None}, [start], True
    for step in range(1, steps + 1):
        new = next((y for y in graph[stack[-1]] if y not in seen), None)
        moved = new is not None
        if new is not None:
            seen[new] = None
            stack.append(new)
        else:
            stack.pop()
        s.tokens.append(num[step])
        s.answer([fwd if moved else back, num[stack[-1]]])
        s.tokens.append(end)
    s.tokens += w(" at")
    s.answer([num[stack[-1]]])
    s.tokens += w("\n", " stack")
    s.answer([*(num[x] for x in reversed(stack)), end])
    s.tokens += w(" seen")
    s.answer([*(num[x] for x in seen), end])
    s.tokens.append(EOS)
    s.working_set = (listed + 2 * len(seen)) / len(s.tokens)
    return s


def dfs_from_public(w: Words, item: Mapping[str, Any]) -> Sample:
    """A sample from one entry of the public DFS state-query benchmark; its own answer is checked against ours by the tests."""
    graph: dict[int, list[int]] = {n: [] for n in item["graph"]["nodes"]}
    for a, b in item["graph"]["edges"]:
        graph[a].append(b)
        graph[b].append(a)
    near = {n: sorted(v) for n, v in graph.items()}
    return dfs(w, Random(0), 0, item["steps"], graph=near, start=item["start_node"])


Task = Callable[..., Sample]
TASKS: dict[str, Task] = {"recall": recall, "quote": quote, "dfs": dfs, "chain": chain, "modular": modular}


def make(name: str, w: Words, rng: Random, length: int, text: Sequence[int], **options: Any) -> Sample:
    """One sample of task `name` of at most `length` tokens; `text` are tokens to quote from."""
    if name == "quote":
        options["text"] = text
    return TASKS[name](w, rng, length, **options)
