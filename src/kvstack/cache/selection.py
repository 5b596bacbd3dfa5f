"""Which tokens of a layer leave: what the scorer needs to know beside the tiers, and when and how the decision falls.

    records   the scorer's numbers beside every token of body and window, in the order in which the tokens came, `[rows, heads, n, R]`
    queries   the newest queries `[B, Hq, W, D]`, of which `asked [B, W]` are there
    load      tokens of each row that a KV head holds, in the mean over heads and layers
    prompt    tokens of each row that came before its first step of decoding

An eviction is due when the load of a row is `interval` above what may stay. It comes at the end of a call, so that all queries of the
call have seen the same tokens. Layers decide alone, or meet in a `Council` when their tokens compete or agree. With heads=pooled a KV
head of a row is a row of its own in the tiers (`split`), because heads then hold different numbers of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvstack.allocators import kept
from kvstack.cache.tier import Tier, plainly
from kvstack.codecs.exact import ExactCodec
from kvstack.errors import BadInputError
from kvstack.scorers.base import Scorer, Selection, View

STEPS = 8  # tokens that a step of decoding may bring, with the drafts of assisted decoding


@dataclass
class Council:
    """Where `layers` layers hand in their scores, and get their decision when the last one has."""

    layers: int
    heads: str
    waiting: list[tuple[Tensor, Tensor, Callable[[Tensor], None]]] = field(default_factory=list)

    def hand_in(self, scores: Tensor, counts: Tensor, decided: Callable[[Tensor], None]) -> None:
        """A layer's `scores [B, H, N]` and how many may stay, `counts [B, H]`; `decided` is called with those that do, `[B, H, N]`."""
        self.waiting.append((scores, counts, decided))
        if len(self.waiting) < self.layers:
            return
        waiting, self.waiting = self.waiting, []
        # Layers hold other tokens only where they compete; where they agree, all have as many.
        keep = kept([s for s, _, _ in waiting], [c for _, c, _ in waiting], self.heads)  # type: ignore[arg-type]
        for mask, (_, _, call) in zip(keep, waiting, strict=True):
            call(mask)


def council(selection: Selection, layers: int) -> Council:
    """The council of a cache of `layers` layers; where heads keep their own tokens, every layer is one for itself."""
    return Council(1 if selection.heads == "separate" else layers, selection.heads)


class Chooser:
    """See the module. scorer: of this layer. `rows` and `heads` are those of the tiers, `split` rows make one of the batch."""

    def __init__(
        self, selection: Selection, scorer: Scorer, council: Council, rows: int, heads: int, split: int, device: torch.device
    ) -> None:
        self.selection, self.scorer, self.council, self.split = selection, scorer, council, split
        record = ExactCodec(scorer.records, scorer.record_dtype), ExactCodec(0, scorer.record_dtype)
        self.records = Tier(*record, rows, heads, device)
        batch = rows // split
        self.load, self.prompt = (torch.zeros(batch, dtype=torch.long) for _ in range(2))
        self.fresh = torch.zeros(batch, dtype=torch.long)  # newest tokens of each row of which none is evicted
        self.reading = True  # the prompt
        self.queries: Tensor | None = None
        self.asked = torch.zeros(batch, scorer.queries, dtype=torch.bool, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of records and queries."""
        small = sum(t.nbytes for t in (self.load, self.prompt, self.fresh, self.asked))
        return small + (self.records.nbytes if self.scorer.records else 0) + (0 if self.queries is None else self.queries.nbytes)

    def joined(self, x: Tensor) -> Tensor:
        """`x [rows, heads, ...]`, KV heads or query heads of a row, as `[B, all heads, ...]`."""
        return x if self.split == 1 else x.reshape(len(x) // self.split, self.split * x.shape[1], *x.shape[2:])

    def parted(self, x: Tensor) -> Tensor:
        """`x [B, H, ...]` as `[rows, heads, ...]`."""
        return x if self.split == 1 else x.reshape(len(x) * self.split, 1, *x.shape[2:])

    def _is_prompt(self, steps: int) -> bool:
        """Whether a call of `steps` new tokens brings more of the prompt: the first does, and those after it that are no decoding."""
        return self.reading and (steps > STEPS or not int(self.prompt.max()))

    def check(self, counts: Tensor, steps: int, window: int) -> None:
        """Raise BadInputError when the prompt, of which `counts [B]` tokens come in a call of `steps`, must stay but does not fit.

        window: newest tokens that will stay beside it.
        """
        longest = int((self.prompt + counts).max()) if self._is_prompt(steps) else 0
        if self.selection.prompt == "error" and longest + window > self.selection.budget:
            taken = f", of which {window} are for the window" if window else ""
            raise BadInputError(
                f"The prompt has {longest} tokens, and the budget is {self.selection.budget}{taken}. Raise the budget, let the prompt "
                "be compressed (prompt=compress), or let it stay on top of the budget (prompt=protect)."
            )

    @plainly
    def come(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, counts: Tensor) -> None:
        """Note new queries `[B, Hq, T, D]`, keys and values `[B, H, T, D]`, of which the first `counts[b]` of row b count."""
        self.reading = self._is_prompt(q.shape[2])
        if self.reading:
            self.prompt = self.prompt + counts
        self.load, self.fresh = self.load + counts, self.fresh + counts
        if self.scorer.records:
            new = self.parted(self.scorer.begin(k, v, position.to(k.device)))
            nothing = new.new_zeros(*new.shape[:-1], 0)
            self.records.append(new, nothing, counts.repeat_interleave(self.split))
        if w := self.scorer.queries:
            old = q.new_zeros(*q.shape[:2], w, q.shape[3]) if self.queries is None else self.queries
            at = counts.to(q.device)[:, None] + torch.arange(w, device=q.device)
            self.queries = torch.cat([old, q], 2).take_along_dim(at[:, None, :, None], 2)
            self.asked = torch.cat([self.asked, self.asked.new_ones(q.shape[0], q.shape[2])], 1).take_along_dim(at, 1)

    def observe(self, weights: Tensor, body: Tensor) -> None:
        """Attention `weights [rows, Hq, T, Nb + n]` over the body and the window, of which `body [rows]` tokens are in the body."""
        n = int(self.records.lengths.max())
        at = torch.arange(n, device=weights.device)
        # Rows with shorter bodies have a gap between body and window.
        gap = (int(body.max()) - body).to(weights.device)[:, None]
        source = (at + torch.where(at < body.to(weights.device)[:, None], 0, gap)).clamp_max(weights.shape[-1] - 1)
        real = at < self.records.lengths.to(weights.device)[:, None]
        weights = weights.take_along_dim(source[:, None, None], -1) * real[:, None, None]
        held = self.records.buffers[0][0]
        seen = self.scorer.observe(self.joined(held[:, :, :n]), self.joined(weights))
        held[:, :, :n] = self.parted(seen)

    def due(self) -> Tensor:
        """Rows `[B]` that must give tokens away now."""
        if self.reading and self.selection.prompt != "compress":
            return torch.zeros_like(self.load, dtype=torch.bool)
        return self.load >= self.target() + self.selection.interval

    def target(self) -> Tensor:
        """Tokens `[B]` that a KV head of each row keeps, in the mean."""
        return self.selection.budget + (self.prompt if self.selection.prompt == "protect" else torch.zeros_like(self.prompt))

    def _guarded(self, sinks: Tensor) -> Tensor:
        """Tokens `[B]` at the front of the body that stay, where `sinks [B]` have gone to the sinks already."""
        return torch.zeros_like(self.prompt) if self.selection.prompt == "compress" else (self.prompt - sinks).clamp_min(0)

    @plainly
    def propose(
        self, due: Tensor, sinks: Tier, window: Tier, body: Tier, lengths: Tensor, scale: float, decided: Callable[[Tensor], None]
    ) -> None:
        """Score the tokens of the body, and hand in what of the places each KV head gets, for rows that are `due [B]`.

        lengths: tokens that came, `[B]`. decided: called, at once or later, with the tokens of the body that stay, `[B, H, N]`.
        """
        view = self._view(sinks, window, body, lengths, scale)
        device = view.key.device
        in_sinks, in_window = (tier.lengths[:: self.split] for tier in (sinks, window))
        places = (self.target() - in_sinks - in_window).clamp_min(0).to(device)
        counts = torch.where(due.to(device)[:, None], places[:, None], view.valid.sum(-1))
        place = torch.arange(view.key.shape[2], device=device)
        stays = (place < self._guarded(in_sinks).to(device)[:, None]) | ~due.to(device)[:, None]
        scores = self.scorer.score(view).masked_fill(stays[:, None], torch.inf).masked_fill(~view.valid, -torch.inf)
        self.load, self.fresh = torch.where(due, self.target(), self.load), torch.where(due, in_window, self.fresh)
        self.council.hand_in(scores, counts, decided)

    def _view(self, sinks: Tier, window: Tier, body: Tier, lengths: Tensor, scale: float) -> View:
        stored = body.sides()
        key, *near = (self.joined(s.codec.decode(s.codes)) for s in (stored[0], sinks.sides()[0], window.sides()[0]))
        b, heads, n, d = key.shape
        place = [torch.arange(tier.longest, device=key.device) for tier in (body, sinks, window)]
        held = body.lengths.reshape(b, -1).expand(-1, heads).to(key.device)[..., None]  # [B, H, 1]
        in_sinks, in_window = (tier.lengths[:: self.split].to(key.device)[:, None] for tier in (sinks, window))
        came, scorer = lengths.to(key.device)[:, None], self.scorer
        return View(
            key=key,
            value=self.joined(stored[1].codec.decode(stored[1].codes)) if scorer.values else None,
            valid=place[0] < held,
            age=in_window[..., None] + held - 1 - place[0],
            near_key=torch.cat(near, 2),
            near_valid=torch.cat([place[1] < in_sinks, place[2] < in_window], 1),
            near_age=torch.cat([came - 1 - place[1], in_window - 1 - place[2]], 1),
            queries=key.new_zeros(b, heads, 0, d) if self.queries is None else self.queries.float(),
            asked=self.asked,
            records=self.joined(self.records.buffers[0][0][:, :, :n].float()),
            seen=lengths,
            scale=scale,
        )

    def keep(self, index: Tensor, counts: Tensor, body: Tensor, window: Tensor) -> None:
        """Follow the body, of which the tokens `index [rows, heads, :counts[row]]` of `body [rows]` stay, and all `window [rows]`."""
        if not self.scorer.records:
            return
        total = counts + window
        at = torch.arange(int(total.max()), device=index.device)
        kept_here = at < counts.to(index.device)[:, None]
        behind = (body - counts).to(index.device)[:, None] + at
        padded = torch.nn.functional.pad(index, (0, max(0, len(at) - index.shape[-1])))[..., : len(at)]
        source = torch.where(kept_here[:, None], padded, behind[:, None]).clamp_max(self.records.longest - 1)  # behind a row's end: any
        self.records.keep(source, total)

    def crop(self, counts: Tensor) -> None:
        """Forget the newest `counts [B]` tokens. Raises BadInputError when one of them is not there any more."""
        if bool((counts > self.fresh).any()):
            n = int(self.fresh.min())
            raise BadInputError(
                f"Only the newest {n} tokens can be removed: of those before, some are evicted. Read the prompt again, or use a window "
                "as long as what shall be removable."
            )
        self.load, self.fresh = self.load - counts, self.fresh - counts
        self.prompt = self.prompt.minimum(self.load)  # of a prompt that is not evicted, that is what is left
        self.reading = self.reading or not int(self.load.max())
        if self.scorer.records:
            rows = counts.repeat_interleave(self.split)
            self.records.truncate(rows.minimum(self.records.lengths))
        if self.queries is not None:
            w = self.asked.shape[1]
            at = torch.arange(w, device=self.asked.device) - counts.to(self.asked.device)[:, None]
            self.queries = self.queries.take_along_dim(at.clamp_min(0)[:, None, :, None], 2)
            self.asked = self.asked.take_along_dim(at.clamp_min(0), 1) & (at >= 0)

    def select(self, rows: Tensor, parts: Tensor) -> None:
        """Keep the batch rows `rows`, which are the rows `parts` of the tiers, in that order, with repetitions."""
        self.load, self.prompt, self.fresh = (x[rows] for x in (self.load, self.prompt, self.fresh))
        at = rows.to(self.asked.device)
        self.asked, self.queries = self.asked[at], None if self.queries is None else self.queries[at]
        self.records.select(parts)

    def state(self) -> dict[str, Tensor]:
        """Tensors that `load_state` takes."""
        held = {name: getattr(self, name) for name in ("load", "prompt", "fresh", "asked")}
        held |= {f"records.{name}": t for name, t in self.records.state().items()} if self.scorer.records else {}
        return held | {"reading": torch.tensor(self.reading)} | ({} if self.queries is None else {"queries": self.queries})

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name in ("load", "prompt", "fresh"):
            setattr(self, name, tensors[name])
        device = self.asked.device
        self.asked, self.reading = tensors["asked"].to(device), bool(tensors["reading"])
        self.queries = tensors["queries"].to(device) if "queries" in tensors else None
        if self.scorer.records:
            self.records.load_state({n.removeprefix("records."): t for n, t in tensors.items() if n.startswith("records.")})
