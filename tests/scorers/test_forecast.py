"""`forecast` against a literal statement of its network, token by token in float64, from keys whose RoPE is inverted by hand."""

import math

import torch
from torch import Tensor

from kvstack.rope import Rope
from kvstack.scorers import Forecast, ForecastWeights, Layer, View

torch.set_num_threads(1)

B, H, G, D, T, W = 2, 3, 2, 8, 11, 5
ROPE = Rope.half(D)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = ForecastWeights(
    gaussian(H, 2 * D, W, seed=0) / 4, gaussian(H, W, seed=1), gaussian(H, W, 2, seed=2), gaussian(H, 2, seed=3)
)  # fmt: skip
KEY, VALUE = gaussian(B, H, T, D, seed=4), gaussian(B, H, T, D, seed=5)
POSITION = torch.stack([torch.arange(T), torch.arange(T) + 3000])
SCORER = Forecast(64).build(Layer(D, H, G, ROPE, torch.device("cpu"), forecast=WEIGHTS))


def literal(b: int, h: int, n: int) -> tuple[float, float]:
    """p and r of one token."""
    x = [0.0] * D
    for f in range(D // 2):
        angle = -int(POSITION[b, n]) * float(ROPE.frequency[f])
        re, im = float(KEY[b, h, n, f]), float(KEY[b, h, n, f + D // 2])
        x[f], x[f + D // 2] = re * math.cos(angle) - im * math.sin(angle), re * math.sin(angle) + im * math.cos(angle)
    x += VALUE[b, h, n].tolist()
    out = WEIGHTS.out_bias[h].tolist()
    for w in range(W):
        z = sum(float(WEIGHTS.hidden[h, d, w]) * v for d, v in enumerate(x)) + float(WEIGHTS.hidden_bias[h, w])
        for o in range(2):
            out[o] += float(WEIGHTS.out[h, w, o]) * z * (1 + math.erf(z / math.sqrt(2))) / 2
    return out[0], out[1]


def view(records: Tensor, seen: Tensor) -> View:
    none = torch.zeros(B, 0, dtype=torch.long)
    valid = torch.arange(T) < torch.tensor([[11, 9, 4], [11, 11, 7]])[..., None]
    return View(
        KEY, None, valid, torch.zeros(B, H, T), KEY[:, :, :0], none.bool(), none, KEY.new_zeros(B, H * G, 0, D), none.bool(),
        records.masked_fill(~valid[..., None], torch.nan), seen, 1.0,
    )  # fmt: skip


def test_records_and_scores_are_the_network() -> None:
    records = SCORER.begin(KEY, VALUE, POSITION)
    assert SCORER.records == 3 and SCORER.record_dtype == torch.float16 and not SCORER.queries and not SCORER.observes
    torch.testing.assert_close(records[..., 2] * 128, POSITION[:, None].expand(B, H, T).float())
    seen = torch.tensor([500, 4000])
    exact, stored = (SCORER.score(view(r, seen)) for r in (records, records.half().float()))
    for b in range(B):
        for h in range(H):
            for n in range(T):
                p, r = literal(b, h, n)
                assert abs(float(records[b, h, n, 0]) - p) < 1e-4 and abs(float(records[b, h, n, 1]) - r) < 1e-4
                if view(records, seen).valid[b, h, n]:
                    score = p + r * math.log1p((int(seen[b]) - int(POSITION[b, n])) / 128)
                    assert abs(float(exact[b, h, n]) - score) < 1e-4 and abs(float(stored[b, h, n]) - score) < 0.02


def test_a_rounded_place_is_never_ahead() -> None:
    """Beside a token at 131071 stands 1024 * 128 in float16, one more than it has seen."""
    records = torch.tensor([1.0, -1.0, 131_071 / 128]).half().float().expand(B, H, T, 3)
    assert (SCORER.score(view(records, torch.tensor([131_071, 130_000])))[:, :, :4] == 1).all()


def test_all_heads_compete_unless_told_otherwise() -> None:
    assert Forecast(64).heads == "pooled" and Forecast(64, heads="separate").heads == "separate"
