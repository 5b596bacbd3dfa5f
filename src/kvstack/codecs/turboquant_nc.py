"""`turboquant_4bit_nc`: what vLLM's KV cache dtype of that name does. A peer to compare with.

    K   Hadamard rotation without signs, 4-bit Lloyd-Max, norm corrected so that |x_hat| = |x|: layout of `polar`, 66 bytes at D = 128
    V   no rotation, 16 uniform levels from the minimum to the maximum of the vector: layout of `minmax`, 68 bytes at D = 128

It differs from vLLM in details below 2 % of the distortion: the codebook is that of D and not its Gaussian limit, scales are bfloat16,
and the zero point of V is a whole number of steps. That vLLM leaves the first and last layers unquantised is not the codec's business.
"""

from dataclasses import dataclass

from kvstack.codecs.base import Codec, Context, Precision, Side
from kvstack.codecs.minmax import MinMaxCodec
from kvstack.codecs.polar import PolarCodec
from kvstack.codecs.rotation import rotation


@dataclass(frozen=True)
class TurboQuant4bitNC(Precision):
    """Rotated 4-bit Lloyd-Max for K, unrotated 4-bit min-max for V."""

    def build(self, side: Side, ctx: Context) -> Codec:
        """See `Precision.build`. Raises RecipeError when the head size is no multiple of 8."""
        if side == "key":
            return PolarCodec(rotation(ctx.head_dim, None, ctx.device), 4, codebook="exact")
        return MinMaxCodec(ctx.head_dim, 4)
