"""What a scorer is: it says how much each cached token of a KV head will be missed.

A `Selection` is a member of the selection axis, frozen data: how many tokens stay, and which scorer says which. It builds a `Scorer`
for a layer from what is known of it (`Layer`). Whoever owns the tokens then

    records = scorer.begin(...)       numbers kept beside every new token, if the scorer wants any
    records = scorer.observe(...)     the attention that the stored tokens got, if it wants to see that
    scores = scorer.score(view)       every `interval` tokens; the lowest leave for good

Scores are `[B, H, N]` float32 for the N candidates in H KV heads; larger stays. Candidates are in the order in which they came, and so
are those that an earlier round has left; sinks and the exact window are no candidates, and stay. Keys are those that attention reads,
after RoPE and out of their codes: no score needs positions. Pure torch, tensors in, tensors out; nothing here removes anything.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvstack.checks import choice, whole_number
from kvstack.rope import Rope

Heads = Literal["separate", "shared", "union", "pooled"]
Prompt = Literal["compress", "protect", "error"]


@dataclass(frozen=True, eq=False)
class QueryStats:
    """Calibrated statistics of the queries of one layer before RoPE.

    mean: `[Hq, F]` complex64, the mean of each band. norm: `[Hq, F]` float32, the mean length of each band. covariance: `[Hq, D, D]`
    float32 in the coordinates of the head, or None.
    """

    mean: Tensor
    norm: Tensor
    covariance: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ForecastWeights:
    """Calibrated networks of the KV heads of one layer, with W hidden units each; float32. See `scorers/forecast.py`.

    hidden: `[H, 2 D, W]`, of keys before RoPE and values. hidden_bias: `[H, W]`. out: `[H, W, 2]`. out_bias: `[H, 2]`.
    """

    hidden: Tensor
    hidden_bias: Tensor
    out: Tensor
    out_bias: Tensor


@dataclass(frozen=True, eq=False)
class Future:
    """What only an evaluation knows: the queries `[B, Hq, T, D]` (after RoPE) of all T positions of the sequence under a full cache,
    and `lse [B, Hq, T]`, the logarithms of the sums of their exponentiated logits; +inf where a row has ended."""

    queries: Tensor
    lse: Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """What a scorer may know of the layer it serves. heads: KV heads H; groups: query heads of each, G; Hq = G H. index: of the layer.
    stats, forecast: of a profile; future: in evaluations only."""

    head_dim: int
    heads: int
    groups: int
    rope: Rope
    device: torch.device
    index: int = 0
    stats: QueryStats | None = None
    future: Future | None = None
    forecast: ForecastWeights | None = None


@dataclass(frozen=True, eq=False)
class View:
    """What a scorer sees of a layer when tokens shall leave.

    key, value: candidates `[B, H, N, D]` float32, anything where not `valid [B, H, N]`; value is None unless the scorer asks for it.
    age: `[B, H, N]`, 0 for the newest token of the row; of tokens before the last eviction, at most their real age.
    near_key: sinks and exact window `[B, H, M, D]` float32, with `near_valid [B, M]` and `near_age [B, M]`.
    queries: the newest queries `[B, Hq, W, D]` float32 after RoPE, oldest first, W as the scorer asks; `asked [B, W]` is false where
    a row had no query yet. The last one is of age 0. records: `[B, H, N, R]` float32. seen: `[B]`, tokens of the row so far, which
    is the position of its next query. scale: factor on the logits.
    """

    key: Tensor
    value: Tensor | None
    valid: Tensor
    age: Tensor
    near_key: Tensor
    near_valid: Tensor
    near_age: Tensor
    queries: Tensor
    asked: Tensor
    records: Tensor
    seen: Tensor
    scale: float

    @classmethod
    def of_keys(cls, key: Tensor, value: Tensor | None, valid: Tensor, age: Tensor, seen: Tensor, scale: float) -> "View":
        """A view for scorers that look at nothing but the candidates: no near tokens, no queries, no records."""
        b, h, _, d = key.shape
        nothing = valid.new_zeros(b, 0)
        return cls(
            key,
            value,
            valid,
            age,
            key[:, :, :0],
            nothing,
            nothing.long(),
            key.new_zeros(b, h, 0, d),
            nothing,
            key[..., :0],
            seen,
            scale,
        )


class Scorer(ABC):
    """Scores of one layer. queries: how many of the newest queries it looks at. records: numbers kept beside every token, of
    `record_dtype`. values: whether it looks at values. observes: whether it wants the attention weights of all queries. ordered:
    whether scores depend on the ages of candidates, or on their order."""

    queries: int = 0
    records: int = 0
    record_dtype: torch.dtype = torch.float32
    values: bool = False
    observes: bool = False
    ordered: bool = True

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """`[B, H, N]` float32, larger stays; anything finite where not `view.valid`. Infinity protects."""

    def linear(self, seen: Tensor) -> tuple[Rope, Tensor, Tensor] | None:
        """A rope, `w [B, H, G, D]` and `c [H, G, D / 2]` float32 for rows whose next query is at `seen [B]`, if `score` is the
        greatest, over the query heads g of each group, of the `standardised`

            raw[b, h, g, n] = sum_j w[b, h, g, j] k_j + sum_f c[h, g, f] |k_f|        k: the key of token n, k_f: its band f of the rope

        which a kernel reads off the codes; None when it is not.
        """
        return None

    def begin(self, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
        """Records `[B, H, T, R]` float32 of new tokens `key, value [B, H, T, D]` (after RoPE) at `position [B, T]`."""
        return key.new_zeros(*key.shape[:-1], self.records, dtype=torch.float32)

    def observe(self, records: Tensor, weights: Tensor) -> Tensor:
        """`records [B, H, N, R]` after queries gave the tokens these attention weights `[B, Hq, T, N]` (0 where they do not see)."""
        return records


@dataclass(frozen=True)
class Selection(ABC):
    """How many tokens stay, and which.

    budget: tokens of a KV head that are left after an eviction, sinks and window among them. interval: an eviction comes when so many
    more are there. heads: every layer and KV head keeps its own tokens ("separate"), KV heads of one index keep the same in all layers,
    by the mean of their scores ("shared"), all keep the same, by the greatest score ("union"), or the tokens of all layers and KV heads
    compete for the sum of their budgets, so that some keep more than others ("pooled"). prompt: its tokens compete like all
    others ("compress"), stay on top of the budget ("protect"), or stay within it, and one that does not fit is refused ("error").
    Raises RecipeError for numbers out of range.
    """

    budget: int
    interval: int = 128
    heads: Heads = "separate"
    prompt: Prompt = "compress"
    needs: ClassVar[tuple[str, ...]] = ()  # of "stats", "covariance", "forecast", "future": what `Layer` must have

    def __post_init__(self) -> None:
        whole_number("budget", self.budget, 1, 2**31 - 1)
        whole_number("interval", self.interval, 1, 2**31 - 1)
        choice("heads", self.heads, ("separate", "shared", "union", "pooled"))
        choice("prompt", self.prompt, ("compress", "protect", "error"))

    @abstractmethod
    def build(self, layer: Layer) -> Scorer:
        """The scorer of one layer."""


def by_group(x: Tensor, heads: int) -> Tensor:
    """`x [B, Hq, ...]` as `[B, H, G, ...]`."""
    out: Tensor = x.unflatten(1, (heads, -1))
    return out


def recent_logits(view: View) -> tuple[Tensor, Tensor]:
    """Logits of the newest queries over the candidates, `[B, H, G, W, N]`, and over the near tokens, `[B, H, G, W, M]`.

    -inf where a query comes before a token, where there is no query, and where a token is not valid.
    """
    q = by_group(view.queries, view.key.shape[1])
    w = q.shape[3]
    query_age = torch.arange(w - 1, -1, -1, device=q.device)
    out = []
    near = view.near_valid[:, None], view.near_age[:, None]
    for key, valid, age in ((view.key, view.valid, view.age), (view.near_key, *near)):
        clean = key.masked_fill(~valid[..., None], 0)
        logits = torch.einsum("bhgwd,bhnd->bhgwn", q, clean) * view.scale
        seen = valid[:, :, None] & (age[:, :, None] >= query_age[:, None]) & view.asked[:, None, :, None]  # [B, H or 1, W, N]
        out.append(logits.masked_fill(~seen[:, :, None], -torch.inf))
    return out[0], out[1]


def standardised(x: Tensor, valid: Tensor) -> Tensor:
    """`x [B, ..., N]` with mean 0 and standard deviation 1 over the tokens that are `valid [B, ..., N]`, which broadcasts."""
    count = valid.sum(-1, keepdim=True).clamp_min(1)
    x = x.masked_fill(~valid, 0)
    centred = (x - x.sum(-1, keepdim=True) / count).masked_fill(~valid, 0)
    spread = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    out: Tensor = centred / spread.clamp_min(1e-6)
    return out
