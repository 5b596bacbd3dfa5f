"""Statistics of the queries before RoPE, streamed out of the attention of a model while it runs.

Queries are taken where the model calls attention (`run.py`), so whatever it does before RoPE (biases, norms) is in them, and are turned
back by the model's own RoPE. Of each layer one batch of queries is held at a time; what stays are float64 sums over tokens: the bands
`[Hq, F]` complex, their lengths `[Hq, F]` and, if asked for, products of coordinates `[Hq, D, D]`.
"""

import torch
from torch import Tensor

from kvstack.calibrate.run import Attended
from kvstack.errors import BadInputError, UnsupportedModelError
from kvstack.rope import Rope


class QuerySums:
    """Sums over the queries that `add` is given; sum: layer -> bands, lengths and maybe products."""

    def __init__(self, covariance: bool = False) -> None:
        self.covariance = covariance
        self.sum: dict[int, list[Tensor]] = {}

    def add(self, seen: Attended) -> None:
        """Add the queries of a call of attention."""
        query = seen.queries()  # [N, Hq, D]
        z = seen.rope.bands(query)
        found = [z.sum(0, dtype=torch.complex128), z.abs().sum(0, dtype=torch.float64)]
        if self.covariance:
            found.append(torch.einsum("nhd,nhe->hde", query.double(), query.double()))
        known = self.sum.get(seen.layer)
        self.sum[seen.layer] = [a + b for a, b in zip(found, known, strict=True)] if known else found

    def statistics(self, layers: int, tokens: int, rope: Rope) -> dict[str, Tensor]:
        """The tensors of a profile of `layers` layers and of `tokens` tokens in all: float32 on the CPU.

        Raises BadInputError when they are not finite, UnsupportedModelError when layers have heads of different shapes.
        """
        if len({norm.shape for _, norm, *_ in self.sum.values()}) != 1:
            raise UnsupportedModelError("The full-attention layers do not have query heads of one shape; they cannot be calibrated.")
        order = sorted(self.sum)
        mean, norm, *products = (torch.stack(sums) / tokens for sums in zip(*(self.sum[i] for i in order), strict=True))
        found = {"query_mean_real": mean.real, "query_mean_imag": mean.imag, "query_norm": norm}
        if products:
            centre = rope.vectors(mean)
            found["query_covariance"] = products[0] - centre[..., :, None] * centre[..., None, :]
        if not all(t.isfinite().all() for t in found.values()):
            raise BadInputError("The model gives queries that are NaN or Inf. Check its weights, or load it in bfloat16 or float32.")
        at = torch.tensor(order)
        spread = {n: torch.zeros(layers, *t.shape[1:]).index_copy(0, at, t.float().cpu()) for n, t in found.items()}
        return spread | {"rope_frequency": rope.frequency.float().cpu()}
