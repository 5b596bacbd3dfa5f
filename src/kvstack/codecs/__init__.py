"""The precision axis: how a vector becomes bytes. Pure torch, tensors in, tensors out; the reference of the kernels.

`base` says what a codec is. Each method is one module with a codec and the frozen dataclass that a recipe names it by:

    exact, fp8                        16 and 8 bits
    polar                             PolarQuant, 1 to 5 bits, with `rotation` and `lloyd`
    minmax, kivi, turboquant_nc       peers to compare with
    turboquant                        TurboQuant's QJL stage, the negative control

It knows nothing of models, caches, masks or positions.
"""

from kvstack.codecs.base import Codec, Codes, Context, Field, Precision, Side
from kvstack.codecs.exact import Exact
from kvstack.codecs.fp8 import Fp8
from kvstack.codecs.kivi import Kivi
from kvstack.codecs.minmax import MinMax
from kvstack.codecs.polar import Polar
from kvstack.codecs.turboquant import TurboQuant
from kvstack.codecs.turboquant_nc import TurboQuant4bitNC

__all__ = [
    "Codec",
    "Codes",
    "Context",
    "Exact",
    "Field",
    "Fp8",
    "Kivi",
    "MinMax",
    "Polar",
    "Precision",
    "Side",
    "TurboQuant",
    "TurboQuant4bitNC",
]
