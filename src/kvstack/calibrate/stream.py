"""`calibrate`: run a model over batches of tokens and stream the statistics of a profile out of it.

Keys and values are read from the model's cache after each batch (`means.py`), queries on their way into attention (`queries.py`);
forecasts are trained on samples of further passes (`forecast.py`). Positions count real tokens, so padding on either side changes
nothing, and it does not count. Only full-attention layers are calibrated, the others (sliding windows) stay zero. One batch must fit in
memory with its cache.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvstack.calibrate.forecast import add_forecast
from kvstack.calibrate.means import sums
from kvstack.calibrate.queries import QuerySums
from kvstack.calibrate.run import Attended, Batch, Take, run, unpack
from kvstack.errors import BadInputError, UnsupportedModelError
from kvstack.fingerprint import fingerprint
from kvstack.profile import Profile
from kvstack.rope import REMEDY, rope_of

TRIED = 64  # tokens on which a model must show that its queries are turned by RoPE alone


def calibrate(
    model: Any,
    batches: Iterable[Batch],
    progress: Callable[[int], None] | None = None,
    source: str = "",
    covariance: bool = False,
    forecast: bool = False,
) -> Profile:
    """The profile of `model` on `batches`.

    A batch is `input_ids [B, T]`, or a mapping with `input_ids` and optionally `attention_mask`, both `[B, T]` (1 for real tokens).
    progress: called after every batch with the number of real tokens so far. source: what the batches are, in words. covariance: also
    find the covariance of the queries, which takes D numbers for each of theirs. forecast: also train a forecast on the same batches;
    `add_forecast` does it on others.
    Raises BadInputError when there are no tokens or the keys, values or queries are not finite, and UnsupportedModelError when the
    model's full-attention layers do not cache keys and values of one shape, or do not turn queries by one RoPE.
    """
    if isinstance(batches, Tensor | Mapping):
        raise BadInputError("`batches` is a list of batches. Put the one you have into a list.")
    if not forecast:
        return _statistics(model, batches, progress, source, covariance)
    kept = list(batches)  # they are read again
    return add_forecast(_statistics(model, kept, progress, source, covariance), model, kept)


@torch.inference_mode()
def _statistics(model: Any, batches: Iterable[Batch], progress: Callable[[int], None] | None, source: str, covariance: bool) -> Profile:
    """The profile without a forecast. See `calibrate`."""
    queries = QuerySums(covariance)
    keys: Tensor | None = None
    values: Tensor | None = None
    tokens = 0
    for batch in batches:
        ids, real = unpack(batch, model.device)
        if tokens == 0 and real.any():
            _check_turning(model, ids[real][None, :TRIED])
        cache = run(model, ids, real, queries.add)
        k, v = (sums(cache, side, real) for side in ("keys", "values"))
        keys, values = (k, v) if keys is None or values is None else (keys + k, values + v)
        tokens += int(real.sum())
        if progress is not None:
            progress(tokens)
    if keys is None or values is None or tokens == 0:
        raise BadInputError("There are no tokens to calibrate on. Give at least one batch with real tokens.")
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise BadInputError("The model gives keys or values that are NaN or Inf. Check its weights, or load it in bfloat16 or float32.")
    centres = {"key_centre": keys, "value_centre": values}
    return Profile(
        **{name: (s / tokens).float().cpu() for name, s in centres.items()},
        **queries.statistics(len(keys), tokens, rope_of(model)),
        fingerprint=fingerprint(model),
        source=source,
        tokens=tokens,
    )


def _check_turning(model: Any, ids: Tensor) -> None:
    """Raise UnsupportedModelError unless queries before RoPE are the same wherever the sequence `ids [1, T]` begins.

    RoPE is relative, so they are, unless a layer has no RoPE, another one than was found, or absolute positions beside it.
    """
    config = model.config.get_text_config(decoder=True)
    start = min(1024, getattr(config, "max_position_embeddings", 2048) // 2)
    ids = ids[:, :start]
    near: dict[int, Tensor] = {}
    far: dict[int, Tensor] = {}

    def into(found: dict[int, Tensor]) -> Take:
        def take(seen: Attended) -> None:
            found[seen.layer] = seen.queries().flatten(1)

        return take

    for found, first in ((near, 0), (far, start)):
        run(model, ids, torch.ones_like(ids, dtype=torch.bool), into(found), start=first)
    for layer, query in near.items():
        # Rounding in bfloat16 makes some hundredths of this, a layer without RoPE about one.
        if (far[layer] - query).norm(dim=1).median() > 0.2 * query.norm(dim=1).median():
            raise UnsupportedModelError(f"Layer {layer} of {config.model_type} does not turn queries by RoPE alone. {REMEDY}")
