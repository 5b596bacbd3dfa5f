"""Problems, our own contenders and the peers, as far as a machine without a GPU can tell: what they compute and why they cannot run."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend

from kvstack.bench import own, peers
from kvstack.bench.contender import Contender, Run, not_capable, unusable
from kvstack.bench.peers import sdpa
from kvstack.bench.peers.paging import not_paged, paged, random_order
from kvstack.bench.problem import Problem, attention, random_query, random_tokens
from kvstack.errors import BadInputError, RecipeError
from kvstack.kernels.pages import Format, read

torch.set_num_threads(1)
CPU = torch.device("cpu")
SMALL = Problem((3, 200), heads=4, kv_heads=2, head_dim=64)
GPU = torch.cuda.is_available()


def test_a_shape_is_rows_times_tokens() -> None:
    p = Problem.parse(" 8x32768 ", 32, 8, 128)
    assert (p.batch, p.tokens, p.heads, p.kv_heads, p.head_dim) == (8, 32768, 32, 8, 128)
    assert p.scale == pytest.approx(128**-0.5) and p.like((1, 5)).lengths == (1, 5)


@pytest.mark.parametrize("text", ["8", "8x", "x8", "0x5", "8x-1", "8 by 9", "2x3x4"])
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(BadInputError, match="such as 32x4096"):
        Problem.parse(text, 32, 8, 128)


def test_heads_must_share() -> None:
    with pytest.raises(BadInputError, match="6 query heads cannot share 4"):
        Problem((1,), heads=6, kv_heads=4)


def test_attention_is_torchs_and_ignores_what_lies_behind_a_row() -> None:
    q, (k, v) = random_query(SMALL, CPU).double(), (x.double() for x in random_tokens(SMALL, CPU))
    k[0, 3:], v[0, 3:] = math.nan, math.nan
    out = attention(q, k, v, SMALL)
    for b, n in enumerate(SMALL.lengths):
        keys, values = (x[b, :n].transpose(0, 1) for x in (k, v))
        want = torch.nn.functional.scaled_dot_product_attention(q[b, :, None], keys, values, enable_gqa=True)[:, 0]
        torch.testing.assert_close(out[b], want)


@pytest.mark.skipif(GPU, reason="on a GPU the benchmark itself checks")
@pytest.mark.parametrize("bits", ["4", "3", "2", "k4v2", "8", "k8v4"])
def test_our_own_runs_compute_what_they_are_checked_against(bits: str) -> None:
    (c,) = own.contenders(bits, 128)
    assert c.error(Problem((1,), 4, 2, 128), CPU) < 1e-5


def test_random_pages_are_random_and_end_in_nan() -> None:
    torch.manual_seed(0)
    lengths = (130, 256)
    p = Problem(lengths, 4, 2, 128)
    pages = own.random_pages(Format(128, 8, 4), p, CPU)
    k, _, scales = read(pages)
    assert scales[0, :, 130:].isnan().all() and scales[0, :, :130].isfinite().all() and scales[1].isfinite().all()
    numbers = k.view(torch.float8_e4m3fn).float()
    assert numbers.isfinite().all() and 45 < numbers.std() < 55
    logits = (numbers * scales[..., :1].float() @ torch.randn(128, 500) / 128**0.5)[1]
    assert 0.8 < logits.std() < 2
    held = [pages.table[b, : -(-n // 128)].tolist() for b, n in enumerate(lengths)]
    assert sorted(i for ids in held for i in ids) == list(range(len(pages.pool)))


def test_bytes_are_those_of_whole_pages() -> None:
    (c,) = own.contenders("k4v2", 128)
    run = c.build(Problem((129, 1), 4, 2, 128), CPU)
    assert run.nbytes == 3 * 2 * (128 * 128 * 6 // 8 + 512)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [("5", RecipeError, "no page format"), ("four", BadInputError, "are no bits"), ("k4", BadInputError, "are no bits")],
)
def test_what_are_no_bits(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        own.contenders(text, 128)


@pytest.mark.skipif(GPU, reason="here they may run")
def test_every_contender_says_why_it_cannot_run() -> None:
    found = [*own.contenders("4", 128), *peers.select(", ".join(peers.PEERS))]
    assert len({(c.name, c.bits) for c in found}) == len(found)
    assert {c.bits for c in found} == {"4", "bf16", "fp8"}
    for c in found:
        assert c.missing(Problem(c.lengths)) == "there is no CUDA GPU"


def test_reasons() -> None:
    assert unusable("no_such_package.part", "the package") == "the package is not installed"
    assert (
        unusable("kvstack.no_such_part", "kvstack") == "kvstack.no_such_part cannot be imported: No module named 'kvstack.no_such_part'"
    )
    assert unusable("json.decoder", "json") is None
    assert not_paged(100, 16) == "100 tokens are no whole pages of 16" and not_paged(96, 16) is None
    if not GPU:
        assert not_capable(least=(8, 0)) == "there is no CUDA GPU"


def test_unknown_peers_are_refused() -> None:
    assert peers.select("") == [] and {c.bits for c in peers.select("flash3")} == {"bf16", "fp8"}
    with pytest.raises(BadInputError, match=r"no peer 'sdp'\. Give some of: sdpa, flash3"):
        peers.select("sdp")


def test_pages_hold_the_tokens() -> None:
    x, order = torch.randn(2, 48, 3, 8), random_order(2, 48, 16, CPU)
    pool = paged(x, 16, order)
    assert pool.shape == (6, 16, 3, 8) and torch.equal(pool[order.reshape(2, 3)].flatten(1, 2), x)


def test_a_check_sees_errors_and_nan() -> None:
    def contender(factor: float) -> Contender:
        def build(problem: Problem, device: torch.device) -> Run:
            run = sdpa._build(SDPBackend.MATH, problem, device)
            return Run(lambda: run.call() * factor, run.want, run.nbytes, run.detail)

        return Contender("x", "bf16", 1e-2, lambda _: None, build, lengths=(64, 64))

    assert 0 < contender(1).error(SMALL, CPU) < 1e-2
    assert contender(1.1).error(SMALL, CPU) == pytest.approx(0.1, abs=0.01)
    assert math.isnan(contender(math.nan).error(SMALL, CPU))
