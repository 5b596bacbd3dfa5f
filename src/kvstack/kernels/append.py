"""New tokens into pages: by the fused kernel on a GPU, elsewhere by the codecs themselves.

What is stored stays as it is, bit for bit; the lengths are the caller's to change.
"""

import torch
from torch import Tensor

from kvstack.codecs.base import Codec
from kvstack.codecs.exact import ExactCodec
from kvstack.kernels.codes import to_page
from kvstack.kernels.decode import choose
from kvstack.kernels.pages import Pages, write


def append(pages: Pages, key: Codec, value: Codec, k: Tensor, v: Tensor, starts: Tensor, counts: Tensor) -> None:
    """Encode the first `counts[b]` tokens of `k, v [B, H, n, D]` and store them from token `starts[b]` of row b on.

    starts, counts: `[B]` int32 on the device. Raises BadInputError for numbers that are not finite, unless on a GPU: the kernel does
    not look.
    """
    if choose(k.device).name == "reference" or pages.format.k == 32:
        (k_codes, k_scale), (v_codes, v_scale) = (to_page(codec, codec.encode(x)) for codec, x in ((key, k), (value, v)))
        write(pages, k_codes, v_codes, torch.stack([k_scale, v_scale], -1), starts, counts)
    elif isinstance(key, ExactCodec) and isinstance(value, ExactCodec):
        from kvstack.kernels.plain import store  # needs Triton

        store(k.to(key.dtype), v.to(value.dtype), pages, starts, counts)
    else:
        from kvstack.kernels.encode import encode

        encode(k, v, key, value, pages, starts, counts)
