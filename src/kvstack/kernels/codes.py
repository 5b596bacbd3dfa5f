"""Which codecs have a page format, and their codes as pages hold them: the bridge between `codecs` and `pages`, without loss.

In a page a code is one number per coordinate, uint8 (int16 with 16 bits, int32 with 32), and a scale is bfloat16; see `pages.pack`.
"""

import torch
from torch import Tensor

from kvstack.codecs.base import Codec, Codes
from kvstack.codecs.exact import ExactCodec
from kvstack.codecs.fp8 import Fp8Codec
from kvstack.codecs.packing import pack, unpack
from kvstack.codecs.polar import PolarCodec
from kvstack.errors import RecipeError
from kvstack.kernels.pages import Format


def page_format(head_dim: int, key: Codec, value: Codec) -> Format:
    """The format of pages of these codecs. Raises RecipeError when they have none."""
    k, v = _width(key), _width(value)
    if k is None or v is None:
        raise RecipeError(
            "Pages hold `polar` with 2, 3 or 4 bits, `fp8`, and numbers of 16 or 32 bits only. For others use `kvstack.Cache`."
        )
    return Format(head_dim, k, v)


def _width(codec: Codec) -> int | None:
    if isinstance(codec, PolarCodec):
        return codec.bits if 2 <= codec.bits <= 4 else None
    if isinstance(codec, ExactCodec):
        return 8 * codec.dtype.itemsize if codec.dtype.itemsize in (2, 4) else None
    return 8 if isinstance(codec, Fp8Codec) else None


def to_page(codec: Codec, codes: Codes) -> tuple[Tensor, Tensor]:
    """Codes `[B, H, n, D]` and scales `[B, H, n]` for a page, of what the codec made."""
    if isinstance(codec, ExactCodec):
        (x,) = codes
        return x.view(torch.int16 if x.element_size() == 2 else torch.int32), torch.ones(
            x.shape[:-1], dtype=torch.bfloat16, device=x.device
        )
    numbers, scale = codes
    if isinstance(codec, Fp8Codec):
        return numbers.view(torch.uint8), scale
    assert isinstance(codec, PolarCodec)
    return unpack(numbers, codec.bits), scale


def from_page(codec: Codec, numbers: Tensor, scale: Tensor) -> Codes:
    """What the codec made, of the codes `[B, H, n, D]` and scales `[B, H, n]` of a page."""
    if isinstance(codec, ExactCodec):
        return (numbers.view(codec.dtype),)
    if isinstance(codec, Fp8Codec):
        return numbers.view(torch.float8_e4m3fn), scale
    assert isinstance(codec, PolarCodec)
    return pack(numbers, codec.bits), scale
