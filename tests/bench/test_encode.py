"""`bench encode`: tokens, the check and what it sees, rows and tables; all but time, which needs a GPU."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kvstack.bench import encode, own, report, trial
from kvstack.bench.encode import Encoder, Tokens, difference, new_tokens, store
from kvstack.bench.problem import Problem
from kvstack.environment import write_results
from kvstack.errors import BadInputError, KVStackError, RecipeError
from kvstack.kernels.pages import PAGE, Format, read, write

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # in Triton's interpreter
CPU = torch.device("cpu")
LONG, STEP = Problem((200,), 2, 2, 128), Problem((1,) * 4, 2, 2, 128)


def tokens(word: str, problem: Problem) -> Tokens:
    torch.manual_seed(0)
    c = next(c for c in encode.contenders(word, 128) if isinstance(c, Encoder))
    return c.make(c.small(problem), CPU)


@pytest.mark.parametrize("word", ["4", "3", "2", "k4v2", "8", "k8v4", "4+search"])
@pytest.mark.parametrize("problem", [LONG, STEP])
def test_the_codecs_agree_with_themselves(word: str, problem: Problem) -> None:
    t = tokens(word, problem)
    before = t.pages.pool.clone()
    assert difference(t) == 0 and not torch.equal(t.pages.pool, before)


def test_problems_to_check_are_ragged_and_begin_inside_of_pages() -> None:
    for problem, counts in ((LONG, [200, 100, 0, 200, 1]), (STEP, [1, 1, 0, 1, 1])):
        t = tokens("4", problem)
        assert t.counts.tolist() == counts and t.starts.tolist() == [0, 77, 26, 103, 52]
        assert t.pages.table.shape[1] * PAGE >= max((t.starts + t.counts).tolist())
    c, *_ = encode.contenders("4", 128)
    assert c.small(Problem((32768,), 8, 8, 128)).tokens == encode.CHECKED


def test_tokens_lie_as_a_model_gives_them() -> None:
    t = new_tokens(Format(128, 4, 4), False, Problem((64,) * 3, 2, 2, 128), CPU)
    assert t.k.shape == (3, 2, 64, 128) and t.k.dtype == torch.bfloat16 and t.k.stride() == (64 * 256, 128, 256, 1)
    assert t.pages.table.flatten().sort().values.tolist() == list(range(len(t.pages.pool)))


def flip(t: Tokens, row: int, token: int, by: int, side: int) -> None:
    """Move the first code of a token of K or V (side 2: its scale of K) by some levels."""
    pages = replace(t.pages, table=t.pages.table[row : row + 1])
    held = read(pages)
    codes = held[side].view(torch.int16) if side == 2 else held[side]
    codes[0, 0, token, 0] += by if codes[0, 0, token, 0] < by else -by
    zero = torch.zeros(1, dtype=torch.int32)
    write(pages, *held, zero, zero + held[0].shape[2])


@pytest.mark.parametrize("word", ["4", "3", "8"])
def test_the_check_counts_codes_that_are_off_by_one(word: str) -> None:
    def put(t: Tokens) -> None:
        store(t)
        flip(t, 0, 5, 1, 1)

    new = sum(tokens(word, LONG).counts.tolist()) * 2 * 128
    assert difference(tokens(word, LONG), put) == pytest.approx(1 / new)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: flip(t, 0, 5, 2, 0), "off by 2 levels"),
        (lambda t: flip(t, 1, 80, 2, 2), "scales that do not belong"),
        (lambda t: flip(t, 1, 76, 1, 0), "not its own"),
        (lambda t: flip(t, 1, 177, 1, 1), "not its own"),
        (lambda t: flip(t, 2, 26, 1, 2), "not its own"),
    ],
)
def test_the_check_sees(damage: Callable[[Tokens], None], message: str) -> None:
    def put(t: Tokens) -> None:
        store(t)
        damage(t)

    with pytest.raises(KVStackError, match=message):
        difference(tokens("4", LONG), put)


@pytest.mark.parametrize(("by", "right"), [(40, True), (60, False)])
def test_the_scale_of_other_codes_may_be_another_one_of_about_that_size(by: int, right: bool) -> None:
    def put(t: Tokens) -> None:
        store(t)
        flip(t, 0, 5, 1, 0)
        flip(t, 0, 5, by, 2)

    if right:
        assert difference(tokens("4+search", LONG), put) > 0
    else:
        with pytest.raises(KVStackError, match="scales that do not belong"):
            difference(tokens("4+search", LONG), put)


def test_nothing_is_timed_on_a_red_check() -> None:
    c, peer = encode.contenders("4", 128)
    c, peer = replace(c, missing=lambda _: None), replace(peer, missing=lambda _: None)
    assert trial.check(c, STEP, CPU) == {"error": 0.0} == trial.check(peer, STEP, CPU)
    with pytest.raises(KVStackError, match=r"4 bits was not timed: its output is wrong by 2\.0e-03, with 1e-03 allowed"):
        trial.check(Wrong(**vars(c)), STEP, CPU)


class Wrong(Encoder):
    """Its codes differ in 1 of 500 places."""

    def error(self, problem: Problem, device: torch.device) -> float:
        return 2e-3


def test_the_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("on a GPU the benchmark itself checks")
    from kvstack.kernels.encode import encode as kernel

    torch.manual_seed(0)
    t = new_tokens(Format(128, 4, 4), False, STEP.like((1, 0, 1), torch.float16), CPU)
    assert difference(t, lambda t: kernel(t.k, t.v, t.key, t.value, t.pages, t.starts, t.counts)) < encode.TOLERANCE


def test_contenders_and_bytes() -> None:
    found = encode.contenders(encode.BITS, 128)
    assert [(c.name, c.bits) for c in found] == [
        ("kvstack", "4"), ("torch", "4"), ("kvstack", "3"), ("kvstack", "2"), ("kvstack", "k4v2"), ("kvstack", "8"),
        ("kvstack", "4+search"),
    ]  # fmt: skip
    run = found[0].build(Problem((64,) * 3, 2, 2, 128), CPU)
    assert run.nbytes == 3 * 64 * 2 * (2 * 256 + 2 * 66) and run.held == 3 * 64 * 2 * 512 + 3 * 2 * 2 * Format(128, 4, 4).nbytes
    run.call()
    assert encode.contenders("", 128) == []
    if not torch.cuda.is_available():
        assert {c.missing(LONG) for c in found} == {"there is no CUDA GPU"}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("16", BadInputError, "2 to 8 bits"),
        ("8+search", BadInputError, "not searched for"),
        ("5", RecipeError, "no page format"),
        ("4+", BadInputError, "are no bits"),
    ],
)
def test_what_is_not_encoded(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode.contenders(text, 128)


def rows() -> list[trial.Row]:
    out = []
    for problem in (Problem((32768,), 8, 8, 128), Problem((1,) * 32, 8, 8, 128)):
        for i, c in enumerate(encode.contenders("4, 8, 4+search", 128)):
            found = {"us": 50.0 - 10 * i, "nbytes": 1e8, "calls": 4, "replays": 5, "error": 1e-5}
            found = {"reason": "there is not enough GPU memory"} if c.name == "torch" else found
            out.append(encode.row(problem, c, trial.bandwidth(found, 4.0)))
    return out


def test_rows_have_one_schema_and_can_be_written(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", "kvstack bench encode", rows())
    found = json.loads((tmp_path / "r.json").read_text())["rows"]
    for row in found:
        assert set(row) == {"B", "n", "H", "D", "name", "bits", *encode.MEASURED} | ({"reason"} if row["us"] is None else set())
    assert (found[0]["B"], found[0]["n"], found[0]["H"], found[0]["D"], found[5]["B"]) == (1, 32768, 8, 128, 32)
    assert found[0]["tb_s"] == 2 and found[0]["of_copy"] == 0.5 and "nbytes" not in found[0]


def test_tables() -> None:
    console = Console(width=200, record=True)
    for table in report.tables(rows(), encode.LAYOUT):
        console.print(table)
    text = console.export_text()
    assert text.count("rows x new tokens") == 2 and "1 x 32,768, 8 KV heads of 128" in text and "50.0%" in text
    assert text.index("4+search") < text.index(" 30.0 ") < text.index(" 50.0 ") and "1.0e-05" in text
    assert report.left_out(rows()) == ["torch (4) did not run: there is not enough GPU memory"]
    assert own.words(" a,, b ") == ["a", "b"]
