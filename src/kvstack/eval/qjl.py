"""Why TurboQuant's second stage, QJL (a 1-bit sign sketch of the residual), does not pay: three measurements at equal code bytes.

    inner     error of <q, x_hat> on random vectors, next to theory
    softmax   what that error does to attention weights over random keys: KL divergence, and the weight that a needle keeps
    model     what it does to text and tasks, through a real cache
    paired    differences to `polar` over the same sequences of `model`

Each function returns rows for a results file: plain dicts with the key `part`, and for a measured mean `name` also `name_low` and
`name_high`, its 95 % interval over seeds or sequences. A *family* is one codec at every number of bits. Keys are unit vectors
`x [1, 1, N, D]`, queries are `q [1, 1, Q, D]`. Codebooks are exact, as in the theory. `tables` and `figure` show rows; writing files is
the business of the command.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from kvstack.codecs import Context, Polar, TurboQuant
from kvstack.codecs.base import Codec, Side
from kvstack.codecs.lloyd import lloyd_max
from kvstack.eval import metrics, runner
from kvstack.eval.page import Table
from kvstack.eval.suite import SuiteConfig
from kvstack.recipe import Recipe

Row = dict[str, Any]
Progress = Callable[[int, int], None]

D = 128
BITS = (2, 3, 4)
BASE = "polar, unbiased"  # what `bits_lost` counts from
FAMILIES: dict[str, Callable[[int], Polar | TurboQuant]] = {
    "polar, plain": lambda b: Polar(b, b, "plain", "exact"),
    "polar": lambda b: Polar(b, b, codebook="exact"),
    "polar, unbiased": lambda b: Polar(b, b, "unbiased", "exact"),
    "turboquant, orthogonal": lambda b: TurboQuant(b, "orthogonal"),
    "turboquant": lambda b: TurboQuant(b),
}

# Softmax: logits of spread TAU; a needle of logit NEEDLE among keys whose logits spread by NEEDLE_TAU.
TAU = 3.0
NEEDLE, NEEDLE_TAU = 12.0, 2.0


class SketchOfKeys(TurboQuant):
    """The sketch where it is meant to be, on K alone; V as in `polar`."""

    def build(self, side: Side, ctx: Context) -> Codec:
        """See `Precision.build`."""
        return super().build(side, ctx) if side == "key" else Polar(self.bits, self.bits, codebook="exact").build(side, ctx)


class _SketchOfKeysRecipe(Recipe):
    """A recipe that the grammar has no word for: QJL at its best."""

    def __str__(self) -> str:
        assert isinstance(self.precision, SketchOfKeys)
        return f"K: turboquant{self.precision.bits}(sketch={self.precision.sketch}), V: polar{self.precision.bits}"


RECIPES: dict[str, Callable[[int], Recipe]] = {
    "polar": lambda b: Recipe(Polar(b, b, codebook="exact")),
    "polar, unbiased": lambda b: Recipe(Polar(b, b, "unbiased", "exact")),
    "turboquant, orthogonal, K only": lambda b: _SketchOfKeysRecipe(SketchOfKeys(b, "orthogonal")),
    "turboquant": lambda b: Recipe(TurboQuant(b)),
}


def theory(member: Polar | TurboQuant) -> tuple[float, float]:
    """Slope of <q, x_hat> on <q, x>, and variance of their difference for a random q, in units of |q|^2 |x|^2 / D.

    To the leading order in 1 / D, which is about 1 % too much at D = 128.
    """
    if isinstance(member, TurboQuant):
        rest = lloyd_max(member.bits - 1, D).distortion
        return 1.0, rest * (math.pi / 2 - (member.sketch == "orthogonal"))
    e = lloyd_max(member.k, D).distortion
    cosine = math.sqrt(1 - e)
    return {"plain": (1 - e, e), "matched": (cosine, 2 - 2 * cosine), "unbiased": (1.0, e / (1 - e))}[member.scale]


def needle_theory(slope: float, variance: float, keys: int) -> float:
    """Weight that a needle keeps: its logit times `slope`, and a background that e^(v/2) inflates; no noise on the needle itself.

    The background's logits have variance tau^2 (2 slope - 1 + variance), and the mean of e^l is e^(half of that).
    """

    def weight(s: float, v: float) -> float:
        return 1 / (1 + keys * math.exp(NEEDLE_TAU**2 * (2 * s - 1 + v) / 2 - NEEDLE * s))

    return weight(slope, variance) / weight(1.0, 0.0)


def _no_progress(done: int, total: int) -> None:
    pass


def _members() -> dict[Polar | TurboQuant, Row]:
    """Every codec of the first two parts, and how its rows begin."""
    found = {make(bits): (family, bits) for bits in BITS for family, make in FAMILIES.items()}
    return {m: {"family": family, "codec": str(Recipe(m)), "bits": bits} for m, (family, bits) in found.items()}


def _codec(member: Polar | TurboQuant, seed: int) -> Codec:
    """The codec with rotation and sketch of `seed`."""
    return replace(member, seed=seed).build("key", Context(D, 1, torch.float32, torch.device("cpu")))


def _unit(n: int, generator: torch.Generator) -> Tensor:
    return normalize(torch.randn(1, 1, n, D, generator=generator), dim=-1)


def _interval(name: str, e: metrics.Estimate) -> Row:
    return {name: e.mean, f"{name}_low": e.low, f"{name}_high": e.high}


def inner(seeds: int, vectors: int = 4096, queries: int = 1024, progress: Progress = _no_progress) -> list[Row]:
    """Slope and error variance of inner products of random vectors, one row per codec. Every seed draws vectors, rotation, sketch."""
    members = _members()
    slopes, variances = defaultdict(list), defaultdict(list)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        x, q = _unit(vectors, generator), _unit(queries, generator) * D**0.5
        truth = q @ x.mT  # [1, 1, Q, N], variance 1
        for member in members:
            codec = _codec(member, seed)
            estimate = codec.project(q) @ codec.latent(codec.encode(x)).mT
            slopes[member].append(float((truth * estimate).mean() / truth.square().mean()))
            variances[member].append(float((truth - estimate).square().mean()))
        progress(seed + 1, seeds)
    rows = []
    for member, row in members.items():
        slope, variance = theory(member)
        rows.append({
            "part": "inner", **row, "head_dim": D, "bytes": _codec(member, 0).bytes_per_token, "seeds": seeds,
            **_interval("slope", metrics.mean(slopes[member])), "slope_theory": slope,
            **_interval("variance", metrics.mean(variances[member])), "variance_theory": variance,
        })  # fmt: skip
    base = {row["bits"]: row["variance"] for row in rows if row["family"] == BASE}
    return [{**row, "bits_lost": math.log(row["variance"] / base[row["bits"]], 4)} for row in rows]


def softmax(seeds: int, tokens: int = 4096, keys: int = 32768, queries: int = 64, progress: Progress = _no_progress) -> list[Row]:
    """Attention weights over encoded keys, one row per codec.

    kl: KL(p || p_hat) over `tokens` keys. needle: geometric mean of p_hat / p of one key more that stands out among `keys` keys.
    """
    members = _members()
    divergences, weights = defaultdict(list), defaultdict(list)
    cosine = NEEDLE / (NEEDLE_TAU * D**0.5)  # between a query and its needle
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        x, q, other = _unit(keys, generator), _unit(queries, generator), _unit(queries, generator)
        other = other - (other * q).sum(-1, keepdim=True) * q
        needles = cosine * q + math.sqrt(1 - cosine**2) * normalize(other, dim=-1)  # [1, 1, Q, D], one for each query
        q = q * D**0.5
        truth = _log_weights(q @ x.mT, (q * needles).sum(-1), tokens)
        for member in members:
            codec = _codec(member, seed)
            latent_q = codec.project(q)
            logits = latent_q @ codec.latent(codec.encode(x)).mT  # [1, 1, Q, N]
            found = _log_weights(logits, (latent_q * codec.latent(codec.encode(needles))).sum(-1), tokens)
            divergences[member].append(float((truth[0].exp() * (truth[0] - found[0])).sum(-1).mean()))
            weights[member].append(float((found[1] - truth[1]).mean()))
        progress(seed + 1, seeds)
    return [
        {
            "part": "softmax", **row, "head_dim": D, "seeds": seeds, "queries": queries,
            "tokens": tokens, "tau": TAU, **_interval("kl", metrics.mean(divergences[member])),
            "needle_keys": keys, "needle_tau": NEEDLE_TAU, "needle_logit": NEEDLE,
            **{name: math.exp(value) for name, value in _interval("needle", metrics.mean(weights[member])).items()},
            "needle_theory": needle_theory(*theory(member), keys),
        }
        for member, row in members.items()
    ]  # fmt: skip


def _log_weights(logits: Tensor, needle: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Log of the weights of the first `tokens` keys `[..., Q, tokens]`, and of each query's needle among all keys `[..., Q]`.

    logits `[..., Q, N]` and needle `[..., Q]` have spread 1 for random keys.
    """
    rest = torch.logsumexp(NEEDLE_TAU * logits, -1)
    return (TAU * logits[..., :tokens]).log_softmax(-1), -softplus(rest - NEEDLE_TAU * needle)


def model(lm: Any, tokenizer: Any, text: str, cfg: SuiteConfig, progress: Progress = _no_progress) -> list[Row]:
    """Rows of `runner.rows` per recipe, then `paired` rows: each recipe minus `polar` of the same bits, over the same sequences.

    Raises BadInputError when the sequences do not fit the model's context, or the text is too short.
    """
    made = {(family, bits): make(bits) for bits in BITS for family, make in RECIPES.items()}
    scores = runner.evaluate(lm, tokenizer, list(made.values()), cfg, text, progress=progress)
    names = {str(recipe): {"family": family, "bits": bits} for (family, bits), recipe in made.items()}
    rows = [
        {"part": "model", **names.get(row["recipe"], {"family": "bf16", "bits": 16}), **row, "task_samples": cfg.task_samples}
        for row in runner.rows(scores, cfg)
    ]
    for (family, bits), recipe in made.items():
        ours, polar = scores[str(recipe)], scores[str(made["polar", bits])]
        if ours is not polar:
            hits, polar_hits = ([v for values in s.tasks.values() for v in values] for s in (ours, polar))
            rows.append({
                "part": "paired", "family": family, "against": "polar", "bits": bits,
                "kl_ratio": math.fsum(ours.kl) / math.fsum(polar.kl),
                **_interval("kl", metrics.paired(ours.kl, polar.kl)), "text_sequences": len(ours.kl),
                **_interval("accuracy", metrics.paired(hits, polar_hits)), "samples": len(hits),
                "bytes_difference": ours.bytes_per_token - polar.bytes_per_token,
            })  # fmt: skip
    return rows


def _said(row: Row, name: str, form: str, factor: float = 1.0) -> str:
    mean, low, high = (format(factor * row[key], form) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{mean} [{low}, {high}]"


def accuracy(row: Row) -> float:
    """Mean accuracy over the tasks of a model row, in per cent."""
    return 100 * math.fsum(e["accuracy"] for e in row["tasks"].values()) / len(row["tasks"])


_TABLES: tuple[tuple[str, str, dict[str, Callable[[Row], str]]], ...] = (
    ("inner", f"Inner products of random vectors, D = {D}; error variance in units of |q|^2 |x|^2 / D", {
        "codec": lambda r: r["codec"],
        "bytes": lambda r: f"{r['bytes']:.0f}",
        "slope": lambda r: _said(r, "slope", ".4f"),
        "slope, theory": lambda r: f"{r['slope_theory']:.4f}",
        "error variance": lambda r: _said(r, "variance", ".4f"),
        "variance, theory": lambda r: f"{r['variance_theory']:.4f}",
        "bits lost": lambda r: f"{r['bits_lost']:+.2f}",
    }),
    ("softmax", f"Attention weights over random keys, D = {D}", {
        "codec": lambda r: r["codec"],
        "KL": lambda r: _said(r, "kl", ".3f"),
        "needle keeps": lambda r: _said(r, "needle", ".2f"),
        "needle, theory": lambda r: f"{r['needle_theory']:.2f}",
    }),
    ("model", "The model, through a real cache", {
        "recipe": lambda r: r["recipe"],
        "bytes/token": lambda r: f"{r['bytes_per_token']:,.0f}",
        "bits/byte, change %": lambda r: _said(r, "delta_pct", "+.2f"),
        "KL to bf16": lambda r: _said(r, "kl", ".4f"),
        "tasks %": lambda r: f"{accuracy(r):.1f}",
    }),
    ("paired", "Over the same sequences, minus polar of the same bits", {
        "codec": lambda r: f"{r['family']}, {r['bits']} bits",
        "bytes/token": lambda r: f"{r['bytes_difference']:+,.0f}",
        "KL": lambda r: _said(r, "kl", "+.4f"),
        "KL, ratio": lambda r: f"{r['kl_ratio']:.2f}",
        "tasks, points": lambda r: _said(r, "accuracy", "+.1f", 100),
    }),
)  # fmt: skip


def tables(rows: Sequence[Row]) -> list[Table]:
    """The rows as tables, one for each part that was measured; brackets are 95 % intervals."""
    out = []
    for part, title, columns in _TABLES:
        if chosen := [row for row in rows if row["part"] == part]:
            out.append(Table(title, tuple(columns), [tuple(say(row) for say in columns.values()) for row in chosen]))
    return out


@dataclass(frozen=True)
class _Panel:
    part: str
    name: str
    title: str
    theory: str = ""
    log: bool = True


_PANELS = (
    _Panel("inner", "variance", "Variance of a logit's error (lines: theory)", "variance_theory"),
    _Panel("softmax", "kl", f"Attention weights: KL divergence (logits of spread {TAU:.0f})"),
    _Panel("softmax", "needle", "Weight that a needle keeps (lines: theory)", "needle_theory", log=False),
    _Panel("model", "kl", "Model: KL to bf16 (nats per token)"),
)
_LOOKS = {
    "polar, plain": ("#9ecae1", "v"), "polar": ("#4292c6", "o"), "polar, unbiased": ("#08306b", "s"),
    "turboquant, orthogonal": ("#fd8d3c", "^"), "turboquant, orthogonal, K only": ("#8c6d31", "P"), "turboquant": ("#cb181d", "D"),
}  # fmt: skip


def figure(rows: Sequence[Row]) -> Any:
    """One panel for each measurement that was made, against bits: a matplotlib `Figure`."""
    from matplotlib.figure import Figure

    panels = [p for p in _PANELS if any(row["part"] == p.part for row in rows)]
    fig: Any = Figure(figsize=(10.5, 8), layout="constrained")
    handles: dict[str, Any] = {}
    for panel, ax in zip(panels, fig.subplots(2, 2).flat, strict=False):
        for i, (family, (colour, marker)) in enumerate(_LOOKS.items()):
            chosen = [row for row in rows if row["part"] == panel.part and row["family"] == family]
            if not chosen:
                continue
            x = [row["bits"] + 0.07 * (i - 2.5) for row in chosen]
            y = [row[panel.name] for row in chosen]
            bars = [[abs(row[f"{panel.name}_{end}"] - row[panel.name]) for row in chosen] for end in ("low", "high")]
            ax.plot(x, [row[panel.theory or panel.name] for row in chosen], color=colour, alpha=0.5, linewidth=1.2)
            handles[family] = ax.errorbar(x, y, bars, color=colour, marker=marker, markersize=6.5, linestyle="none", capsize=3)
        if panel.log:
            ax.set_yscale("log")
        else:
            ax.axhline(1, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_xticks(BITS, [f"{b} bits" for b in BITS])
        ax.set_title(panel.title, loc="left", fontsize=11)
        ax.grid(alpha=0.25)
    for ax in fig.axes[len(panels) :]:
        ax.remove()
    legend = [family for family in _LOOKS if family in handles]
    fig.legend([handles[f] for f in legend], legend, loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    return fig
