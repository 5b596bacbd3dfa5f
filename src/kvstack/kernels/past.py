"""Attention of a chunk of new queries over a past in pages, which lies before them all.

On Hopper `prefill_hopper` does it all. Elsewhere there are three launches:

    project   rotate the queries, once                                            `rotate`
    attend    every query over all tokens of its row, page by page                `prefill`
    merge     rotate the output back, once                                        `merge`

Pages are read as they are: what is unpacked lives in registers and in shared memory. What the new tokens see of each other and of other
tiers is somebody else's, and is merged with this by the logarithms of the sums. Few queries over a long past share it out among more
programs (`splits`), whose results are merged first. A step of up to eight tokens is faster by `decode`.
"""

import math

import torch
from torch import Tensor

from kvstack.kernels import reference
from kvstack.kernels.decode import LOG2_E, Body, Path
from kvstack.kernels.device import processors
from kvstack.kernels.reference import Partial, Shape

ROWS = 128  # query rows of a program


def attend_past(q: Tensor, body: Body, shape: Shape, path: Path | None = None, dtype: torch.dtype = torch.float32) -> Partial:
    """Attention of `q [B, Hq, T, D]` over all tokens of a body, as a partial with an output of `dtype`.

    path: of `choose`; None for the body's own. Pages of 16 bits have no kernel here and take the reference.
    """
    path = path or body.path
    f = body.pages.format
    if path.name == "reference" or max(f.k, f.v) > 8:
        key, value, below = body.sides()
        parts = [reference.attend(queries, key, value, below, shape) for queries in q.split(reference.QUERIES, 2)]
        return Partial(torch.cat([p.out for p in parts], 2).to(dtype), torch.cat([p.lse for p in parts], 2))
    from kvstack.kernels import prefill, prefill_hopper  # these need Triton
    from kvstack.kernels.merge import merge_partials
    from kvstack.kernels.rotate import project

    b, hq, t, d = q.shape
    heads = body.pages.pool.shape[1]
    segments, rows, factor = b * heads, hq // heads * t, shape.scale * LOG2_E
    e = splits(segments * -(-rows // ROWS), body.pages.table.shape[1], q.device)
    lse = torch.empty(segments, e, rows, device=q.device)
    if path.name == "hopper":
        part = torch.empty(segments, e, rows, d, dtype=dtype if e == 1 else torch.float32, device=q.device)
        centres = body.key.centre, body.value.centre
        prefill_hopper.attend_pages(q, body.signs, centres, factor, body.pages, *body.tables, part, lse, shape.softcap)
        part, lse = _merged(part, lse)
        return Partial(part.to(dtype).reshape(q.shape), lse.reshape(b, hq, t))
    rotated, bias = project(q, body.signs[0], body.key.centre, factor, heads)  # [B * H, R, D], [B * H, R]
    part, lse2 = torch.empty(segments, e, rows, d, device=q.device), lse
    prefill.prefill_pages(rotated, bias, body.pages, *body.levels, part, lse2, shape.softcap)
    part, lse = _merged(part, lse2 * math.log(2))
    out = torch.empty(b, hq, t, d, dtype=dtype, device=q.device)
    # One partial is left for every head of every row, in the order of a single program that takes all pages in turn.
    merge_partials(out, (part, lse * LOG2_E), None, body.cum, 1, body.signs[1], body.value.centre, None, heads)
    return Partial(out, lse.reshape(b, hq, t))


def _merged(part: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Partials `[S, E, R, D]` with `lse [S, E, R]` as one, `[S, 1, R, D]` and `[S, 1, R]`."""
    if part.shape[1] == 1:
        return part, lse
    weights = lse.softmax(1).nan_to_num(0)  # a row without tokens has none
    return (weights[..., None] * part).sum(1, keepdim=True), lse.logsumexp(1, keepdim=True)


def splits(programs: int, pages: int, device: torch.device) -> int:
    """Among how many programs a row's `pages` are shared out, so that `programs` for all query rows become about one per
    multiprocessor, with eight pages each at least."""
    return max(1, min(processors(device) // programs, pages // 8))
