"""Each published method against a literal, slow statement of it: loops over queries and tokens, in float64, KV head by KV head.

A KV head of a row is its tokens in the order in which they came: sinks, candidates, window. Heads of one row have lost different
numbers of their oldest candidates. The statements know nothing of masks, padding or ages.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from kvstack.rope import Rope
from kvstack.scorers import (
    H2O,
    RKV,
    Expected,
    Future,
    KeyDiff,
    KNorm,
    Layer,
    Oracle,
    QueryStats,
    Random,
    Selection,
    SnapKV,
    Streaming,
    View,
)

torch.set_num_threads(1)

H, G, D = 2, 3, 8
HQ = H * G
SCALE = D**-0.5
COUNTS = ((23, 17), (12, 14))  # candidates of each row and KV head
STEPS = 6  # more queries than any scorer looks at come after the candidates


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(eq=False)
class Head:
    """key, value: `[n, D]` of all tokens; query: `[G, n, D]`, the newest. Candidates are `sinks..end`. seen: tokens so far."""

    index: int
    key: Tensor
    value: Tensor
    query: Tensor
    sinks: int
    end: int
    seen: int

    @property
    def n(self) -> int:
        return len(self.key)


Rows = list[list[Head]]


def make_rows(sinks: int, window: int) -> Rows:
    rows = []
    for i, counts in enumerate(COUNTS):
        n = sinks + max(counts) + window
        key, value, query = gaussian(H, n, D, seed=i), gaussian(H, n, D, seed=10 + i), gaussian(H, G, n, D, seed=20 + i)
        key[:, 3::4] = key[:, 2:3] + 0.3 * key[:, 3::4]  # near duplicates
        row = []
        for h, count in enumerate(counts):
            left = torch.cat([torch.arange(sinks), torch.arange(n - window - count, n)])
            row.append(Head(h, key[h, left], value[h, left], query[h, :, n - len(left) :], sinks, sinks + count, n))
        rows.append(row)
    return rows


def make_view(rows: Rows, queries: int) -> View:
    """The rows padded with NaN; the newest queries of each."""
    longest = max(head.end - head.sinks for row in rows for head in row)

    def stack(parts: Callable[[Head], Tensor]) -> Tensor:
        return torch.stack([torch.stack([parts(head) for head in row]) for row in rows])

    def padded(x: Tensor, value: float = torch.nan) -> Tensor:
        return torch.cat([x, x.new_full((longest - len(x), *x.shape[1:]), value)])

    def near(head: Head, x: Tensor) -> Tensor:
        return torch.cat([x[: head.sinks], x[head.end :]])

    key, value = (stack(lambda head, x=x: padded(getattr(head, x)[head.sinks : head.end])) for x in ("key", "value"))  # type: ignore[misc]
    near_age = torch.stack([near(row[0], torch.cat([row[0].seen - 1 - torch.arange(row[0].sinks), ages(row[0])])) for row in rows])
    return View(
        key, value, stack(lambda head: torch.arange(longest) < head.end - head.sinks),
        stack(lambda head: padded(ages(head)[: head.end - head.sinks], 0)), stack(lambda head: near(head, head.key)),
        torch.ones_like(near_age, dtype=torch.bool), near_age, stack(lambda head: head.query[:, head.n - queries :]).flatten(1, 2),
        torch.ones(len(rows), queries, dtype=torch.bool), key.new_zeros(*key.shape[:3], 0), torch.tensor([row[0].seen for row in rows]),
        SCALE,
    )  # fmt: skip


def ages(head: Head) -> Tensor:
    """Of candidates and window."""
    return torch.arange(head.n - head.sinks - 1, -1, -1)


def context(stats: QueryStats | None = None, future: Future | None = None, index: int = 0) -> Layer:
    return Layer(D, H, G, Rope.half(D), torch.device("cpu"), index, stats, future)


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = sum(math.exp(x - top) for x in logits)
    return [math.exp(x - top) / total for x in logits]


def dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def cosine(a: Tensor, b: Tensor) -> float:
    return dot(a, b) / (dot(a, a) * dot(b, b)) ** 0.5


def pool(x: list[float], kernel: int, how: str) -> list[float]:
    half = kernel // 2
    around = [x[max(0, i - half) : i + half + 1] for i in range(len(x))]
    return [max(a) if how == "max" else sum(a) / kernel for a in around]


def snapkv(head: Head, w: int, kernel: int, how: str) -> list[float]:
    """Attention of the last w queries, causal among them; mean, mean over the group, pooled over what is older than them."""
    mean = [0.0] * head.n
    for g in range(G):
        for p in range(head.n - w, head.n):
            attention = softmax([dot(head.query[g, p], head.key[i]) * SCALE for i in range(p + 1)])
            for i, a in enumerate(attention):
                mean[i] += a / w / G
    end = min(head.end, head.n - w)
    return pool(mean[head.sinks : end], kernel, how) + [math.inf] * (head.end - end)


def rkv(head: Head, w: int, kernel: int, weight: float) -> list[float]:
    """Importance less redundancy of each key older than the last w."""
    older = head.n - w
    mean = [0.0] * older
    for p in range(head.n - w, head.n):
        logits = [max(dot(head.query[g, p], head.key[i]) * SCALE for g in range(G)) for i in range(older)]
        for i, a in enumerate(softmax(logits)):
            mean[i] += a / w
    c = [[0.0 if i == j else cosine(head.key[i], head.key[j]) for j in range(head.n)] for i in range(head.n)]
    for line in c:
        alike = [j for j in range(head.n) if line[j] > 0.5]
        line[max(alike, default=0)] = 0.0
    redundancy = softmax([sum(c[i][j] for i in range(head.n)) / head.n for j in range(head.n)])
    end = min(head.end, older)
    importance = pool(mean[head.sinks : end], kernel, "max")
    score = [weight * i - (1 - weight) * r for i, r in zip(importance, redundancy[head.sinks : end], strict=True)]
    return score + [math.inf] * (head.end - end)


def knorm(head: Head) -> list[float]:
    return [-(dot(k, k) ** 0.5) for k in head.key[head.sinks : head.end]]


def keydiff(head: Head) -> list[float]:
    keys = list(head.key[head.sinks : head.end].double())
    anchor = sum((k / dot(k, k) ** 0.5 for k in keys), torch.zeros(D, dtype=torch.float64)) / len(keys)
    return [-cosine(k, anchor) for k in keys]


def streaming(head: Head) -> list[float]:
    return [-float(head.n - 1 - i) for i in range(head.sinks, head.end)]


def agree(selection: Selection, literal: Callable[[Head], list[float]], rows: Rows, view: View, layer: Layer) -> None:
    got = selection.build(layer).score(view)
    for b, h in product(range(len(rows)), range(H)):
        truth = torch.tensor(literal(rows[b][h])).double()
        torch.testing.assert_close(got[b, h, : len(truth)].double(), truth, rtol=1e-5, atol=1e-6)


everywhere = pytest.mark.parametrize(("sinks", "window"), [(0, 0), (2, 0), (2, 3), (1, STEPS + 3)])


@everywhere
@pytest.mark.parametrize(("w", "kernel", "how"), [(1, 1, "max"), (4, 7, "max"), (STEPS, 5, "mean")])
def test_snapkv(sinks: int, window: int, w: int, kernel: int, how: str) -> None:
    rows = make_rows(sinks, window)
    selection = SnapKV(8, queries=w, kernel=kernel, pool=how)  # type: ignore[arg-type]
    agree(selection, lambda head: snapkv(head, w, kernel, how), rows, make_view(rows, w), context())


@everywhere
@pytest.mark.parametrize(("w", "kernel", "weight"), [(1, 3, 50), (STEPS, 7, 10), (4, 5, 0)])
def test_rkv(sinks: int, window: int, w: int, kernel: int, weight: int) -> None:
    rows = make_rows(sinks, window)
    selection = RKV(8, queries=w, kernel=kernel, weight=weight)
    agree(selection, lambda head: rkv(head, w, kernel, weight / 100), rows, make_view(rows, w), context())


LITERAL = {"knorm": (KNorm(8), knorm), "keydiff": (KeyDiff(8), keydiff), "streaming": (Streaming(8), streaming)}


@everywhere
@pytest.mark.parametrize(("selection", "literal"), LITERAL.values(), ids=LITERAL)
def test_keys_alone(sinks: int, window: int, selection: Selection, literal: Callable[[Head], list[float]]) -> None:
    rows = make_rows(sinks, window)
    agree(selection, literal, rows, make_view(rows, 0), context())


def test_published_defaults() -> None:
    assert SnapKV(8) == SnapKV(8, queries=32, kernel=7, pool="max") and RKV(8) == RKV(8, queries=8, kernel=7, weight=10)
    assert Expected(8) == Expected(8, future=512)


def test_h2o() -> None:
    """The attention of every query, one after another and in two chunks, added up for every token."""
    n, scorer = 23, H2O(8).build(context())
    key, query = gaussian(H, n, D, seed=0), gaussian(H, G, n, D, seed=20)
    truth = [[0.0] * n for _ in range(H)]
    weights = torch.zeros(1, HQ, n, n)
    for h, g, p in product(range(H), range(G), range(n)):
        attention = softmax([dot(query[h, g, p], key[h, i]) * SCALE for i in range(p + 1)])
        weights[0, h * G + g, p, : p + 1] = torch.tensor(attention)
        for i, a in enumerate(attention):
            truth[h][i] += a / G
    rows = make_rows(0, 0)[:1]
    valid = make_view(rows, 0).valid
    for cuts in ((n,), (9, n - 9), (1,) * n):
        records = scorer.begin(key[None], key[None], torch.arange(n)[None])
        for chunk in weights.split(cuts, 2):
            records = scorer.observe(records, chunk)
        got = scorer.score(replace(make_view(rows, 0), records=records))
        torch.testing.assert_close(got[valid].double(), torch.tensor(truth)[None][valid].double(), rtol=1e-5, atol=1e-6)


def rotation(rope: Rope, position: int) -> Tensor:
    """RoPE as a matrix `[D, D]` float64."""
    out = torch.zeros(D, D, dtype=torch.float64)
    for f in range(D // 2):
        a, b = int(rope.pairs[0, f]), int(rope.pairs[1, f])
        cos, sin = (float(rope.scale[f]) * x(position * float(rope.frequency[f])) for x in (math.cos, math.sin))
        out[a, a], out[a, b], out[b, a], out[b, b] = cos, -sin, sin, cos
    return out


@pytest.mark.parametrize("future", [1, 12, 512])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_expected(future: int, scale: float) -> None:
    """Mean and covariance under the mean of the rotation matrices, position by position."""
    half = Rope.half(D)
    rope = Rope(torch.arange(D).view(-1, 2).T, half.frequency, scale * half.scale)
    root = gaussian(HQ, D, D, seed=31)
    mean = gaussian(HQ, D, seed=30)
    stats = QueryStats(rope.bands(mean), rope.bands(mean).abs(), root @ root.mT / D)
    rows = make_rows(2, 3)

    def literal(head: Head) -> list[float]:
        turn = sum((rotation(rope, head.seen + i) for i in range(future)), torch.zeros(D, D, dtype=torch.float64)) / future
        candidates, score = slice(head.sinks, head.end), [0.0] * (head.end - head.sinks)
        keys = head.key[candidates].double()
        for q in range(head.index * G, head.index * G + G):
            m, c = turn @ mean[q].double(), turn @ (root @ root.mT / D)[q].double() @ turn.T
            attention = softmax([dot(m, k) * SCALE + dot(k, c @ k) * SCALE**2 / 2 for k in keys])
            for i, (a, v) in enumerate(zip(attention, head.value[candidates], strict=True)):
                score[i] += a / G * dot(v, v) ** 0.5
        return score

    layer = Layer(D, H, G, rope, torch.device("cpu"), stats=stats)
    agree(Expected(8, future=future), literal, rows, make_view(rows, 0), layer)


def test_oracle() -> None:
    """The greatest probability among queries still to come, longer than one chunk of them; the second row has ended."""
    rows, total = make_rows(1, 2), 600
    view = make_view(rows, 0)
    queries, keys = gaussian(2, HQ, total, D, seed=40), gaussian(2, H, total, D, seed=41)
    for row, each in zip(rows, keys, strict=True):
        for head in row:
            each[head.index, : head.sinks] = head.key[: head.sinks]
            each[head.index, head.seen - head.n + head.sinks : head.seen] = head.key[head.sinks :]
    logits = torch.einsum("bqtd,bqnd->bqtn", queries, keys.repeat_interleave(G, 1)).double() * SCALE
    attention = logits.masked_fill(torch.ones(total, total).triu(1).bool(), -torch.inf)
    ends = (total, 30)
    lse = attention.logsumexp(-1).float()
    lse[1, :, ends[1] :] = -torch.inf
    queries[1, :, ends[1] :] = torch.nan

    def literal(head: Head) -> list[float]:
        b = next(i for i, row in enumerate(rows) if head in row)
        p = attention[b, head.index * G : (head.index + 1) * G, head.seen : ends[b]].softmax(-1)
        last = head.seen - (head.n - head.end)
        return [float(p[..., i].max()) for i in range(last - (head.end - head.sinks), last)]

    agree(Oracle(8), literal, rows, view, context(future=Future(queries, lse)))

    over = replace(view, seen=torch.tensor(ends))
    assert not Oracle(8).build(context(future=Future(queries, lse))).score(over).any()


def test_random_is_uniform_and_its_own() -> None:
    rows = make_rows(0, 0)
    view = make_view(rows, 0)
    drawn = {}
    for seed, index, later in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 128)):
        moved = replace(view, seen=view.seen + later)
        drawn[seed, index, later] = Random(8, seed=seed).build(context(index=index)).score(moved)[0][view.valid[0]]
    many = torch.stack(list(drawn.values())).flatten()
    assert len(many.unique()) == len(many) and many.min() >= 0 and many.max() < 1
    assert abs(float(many.mean()) - 0.5) < 4 / (12 * len(many)) ** 0.5
