"""How positions turn a head: the planes that rotary position embedding (RoPE) turns, and how fast.

A head of size D is D / 2 *bands*, each a complex number made of two coordinates. At position p band f is multiplied by
`scale[f] * exp(i p frequency[f])`. Coordinates that do not turn (partial rotary) make bands of frequency 0 and scale 1, so that every
sum over bands is a sum over the whole head. Frequencies are those of the model's own rotary module, whatever scaling it has; with
dynamic scaling that is what the module holds now. Phases are worked out in float64: at a position of 1e6, float32 is 0.06 rad off.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvstack.errors import UnsupportedModelError

REMEDY = "Use a model whose full-attention layers share one RoPE, such as Llama, Qwen3, Mistral or Gemma."
# A rotary module holds one RoPE, or one for each type of layers: prefix of its attributes, and what its `forward` is told.
HELD: dict[str, dict[str, str]] = {"": {}, "full_attention_": {"layer_type": "full_attention"}}
TRIED = (1, 2, 7, 31)  # positions at which a RoPE must do what the model does; angles are still exact in float32


@dataclass(frozen=True, eq=False)
class Rope:
    """pairs: `[2, D / 2]` coordinates of the real and of the imaginary part of each band. frequency: `[D / 2]` float64, radians a
    token. scale: `[D / 2]` float64, what turning multiplies lengths with."""

    pairs: Tensor
    frequency: Tensor
    scale: Tensor

    @staticmethod
    def half(head_dim: int, theta: float = 10_000.0, device: torch.device | None = None) -> "Rope":
        """Plain RoPE of base `theta`, band f made of the coordinates f and f + D / 2."""
        f = torch.arange(head_dim // 2, device=device)
        return Rope(
            torch.stack([f, f + head_dim // 2]), theta ** (-2.0 * f.double() / head_dim), torch.ones_like(f, dtype=torch.float64)
        )

    def bands(self, x: Tensor) -> Tensor:
        """Bands `[..., D / 2]` complex64 of vectors `x [..., D]`."""
        x = x.float()
        return torch.complex(x[..., self.pairs[0].to(x.device)], x[..., self.pairs[1].to(x.device)])

    def vectors(self, z: Tensor) -> Tensor:
        """Vectors `[..., D]` float32 of bands `z [..., D / 2]`: the inverse of `bands`."""
        out = z.real.new_empty(*z.shape[:-1], 2 * z.shape[-1])
        out[..., self.pairs[0].to(z.device)], out[..., self.pairs[1].to(z.device)] = z.real, z.imag
        return out

    def phase(self, position: Tensor) -> Tensor:
        """`exp(i p frequency)`, `[..., D / 2]` complex64, at positions `[...]` (whole or fractional)."""
        angle = position.double()[..., None] * self.frequency.to(position.device)
        return torch.polar(torch.ones_like(angle), angle.remainder(2 * torch.pi)).to(torch.complex64)

    def turn(self, x: Tensor, position: Tensor) -> Tensor:
        """`x [..., D]` as the model's RoPE turns it at `position`, of a shape that broadcasts to `[...]`."""
        return self.vectors(self.bands(x) * self.phase(position) * self.scale.float().to(x.device))

    def unturn(self, x: Tensor, position: Tensor) -> Tensor:
        """The inverse of `turn`: `x [..., D]` as it was before RoPE."""
        return self.vectors(self.bands(x) * self.phase(position).conj() / self.scale.float().to(x.device))


@torch.no_grad()
def rope_of(model: Any) -> Rope:
    """The RoPE of the full-attention layers of a transformers `model`, on its device, as its rotary module holds it now.

    Frequencies and scale are the module's own; which coordinates make a band is found by letting the modelling code turn unit vectors.
    Raises UnsupportedModelError when there is no rotary module, when full-attention layers have several, or when the code turns heads
    in another way than this module says.
    """
    config = model.config.get_text_config(decoder=True)
    stated = getattr(config, "record_dim", None) or getattr(config, "head_dim", None)
    head_dim = stated or config.hidden_size // config.num_attention_heads
    kind = config.model_type
    names = [(m, p) for m in model.modules() for p in HELD if hasattr(m, f"{p}inv_freq") and hasattr(m, f"{p}attention_scaling")]
    held = [(getattr(m, f"{p}inv_freq"), float(getattr(m, f"{p}attention_scaling"))) for m, p in names]
    if not held:
        raise UnsupportedModelError(f"{kind} has no rotary module for its full-attention layers. {REMEDY}")
    frequency, scaling = held[0]
    if any(s != scaling or not torch.equal(f, frequency) for f, s in held):
        raise UnsupportedModelError(f"The layers of {kind} turn heads at different frequencies. {REMEDY}")
    rotary, prefix = names[0]
    turned = _turned(rotary, HELD[prefix], head_dim, 2 * len(frequency))
    f, rest = torch.arange(len(frequency)), torch.arange(2 * len(frequency), head_dim)
    if turned is not None and len(rest) % 2 == 0:
        still = rest.new_zeros(len(rest) // 2).double()
        frequencies, scale = torch.cat([frequency.cpu().double(), still]), torch.cat([torch.full_like(f.double(), scaling), still + 1])
        for pairs in (torch.stack([f, f + len(f)]), torch.stack([2 * f, 2 * f + 1])):  # halves, neighbours
            rope = Rope(torch.cat([pairs, rest.view(2, -1)], 1), frequencies, scale)
            ours = rope.turn(torch.eye(head_dim)[:, None], torch.tensor(TRIED))
            if (ours - turned).abs().max() < 1e-5:
                return Rope(*(t.to(frequency.device) for t in (rope.pairs, rope.frequency, rope.scale)))
    raise UnsupportedModelError(f"{kind} turns heads neither by halves nor by neighbouring coordinates. {REMEDY}")


def _turned(rotary: Any, layer: dict[str, str], head_dim: int, rotary_dim: int) -> Tensor | None:
    """The unit vectors of a head as the model's code turns them at the positions `TRIED`, `[D, positions, D]`; None when it cannot.

    A copy on the CPU and without its decorators, because those let a dynamic RoPE forget the length that it has seen.
    """
    forward = inspect.unwrap(type(rotary).forward)
    apply = forward.__globals__.get("apply_rotary_pos_emb")
    if apply is None or rotary_dim > head_dim:
        return None
    out = torch.eye(head_dim)[:, None].repeat(1, len(TRIED), 1)
    for width in dict.fromkeys((head_dim, rotary_dim)):  # some models hand over the whole head, others the part that turns
        x = torch.eye(width)[None, :, None].expand(1, width, len(TRIED), width)
        try:
            cos, sin = forward(copy.deepcopy(rotary).cpu(), x, torch.tensor([TRIED]), **layer)
            out[:width, :, :width] = apply(x, x, cos, sin)[0][0]
        except (RuntimeError, TypeError, ValueError):  # shapes that do not fit, or functions with other arguments
            continue
        return out
    return None
