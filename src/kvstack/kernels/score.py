"""Scores of tokens in pages that are linear in their keys and in the lengths of their bands: by a kernel on a GPU, elsewhere in torch.

    out[b, h, g, n] = sum_j w[b, h, g, j] k_j + sum_f c[h, g, f] |k_f|        k = the key of token n of row b and head h

That is TriAttention's score of every query head (`scorers.tri`, which derives it), with w = rope.vectors(W). Keys are those that the
codes stand for, with their centre; band f of k is made of its coordinates rope.pairs[:, f]. Nothing is standardised or chosen here.
"""

import torch
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.kernels.codes import from_page
from kvstack.kernels.decode import choose
from kvstack.kernels.pages import Pages, read
from kvstack.rope import Rope


def score_linear(pages: Pages, key: Codec, rope: Rope, w: Tensor, c: Tensor) -> Tensor:
    """Scores `[B, H, G, N]` float32 for all N = 128 * pages slots of the table; 0 behind the end of a row.

    key: the codec of K. w: `[B, H, G, D]`, c: `[H, G, D / 2]`, or `[B, H, G, D / 2]` of every row, both float32. Launches depend on
    shapes alone, so a CUDA graph can hold them if `rope` lies on the device.
    """
    if choose(w.device).name == "reference":
        codes, _, scales = read(pages)
        here = torch.arange(codes.shape[2], device=w.device) < pages.lengths[:, None, None]
        keys = key.decode(from_page(key, codes, scales[..., 0])).masked_fill(~here[..., None], 0)
        return torch.einsum("bhgd,bhnd->bhgn", w, keys) + torch.einsum(
            "bhgf,bhnf->bhgn", c.expand(len(w), *c.shape[-3:]), rope.bands(keys).abs()
        )
    from kvstack.kernels import linear, linear_hopper  # need Triton
    from kvstack.kernels.portable import ROWS

    hopper = choose(w.device, key).name == "hopper" and w.shape[-1] in linear_hopper.HEAD_DIMS
    kernel = linear_hopper if hopper else linear
    query_heads = zip(w.split(ROWS, 2), c.split(ROWS, -2), strict=True)  # as many as a program takes
    parts: list[Tensor] = [kernel.score_pages(pages, key, rope, some.contiguous(), of.contiguous()) for some, of in query_heads]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
