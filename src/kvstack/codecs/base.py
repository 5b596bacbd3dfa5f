"""What a codec is: the map between vectors and stored bytes, for the K or the V of one layer.

A codec turns `x [B, H, N, D]` into *codes*: a tuple of tensors, one per `Field`, each shaped `[B, H, N // block, *shape]`, where
`block` is the number of tokens that are encoded together (1 for most codecs; a codec with `block > 1` takes whole blocks only).
Attention never needs `x` itself. It works in the codec's latent space, which has a linear map to the head's space:

    x_hat = latent(codes) @ transform + centre            latent: [..., N, Dl], transform: [Dl, D]
    <q, x_hat> = <project(q), latent> + <q, centre>       project(q) = q @ transform^T
    sum_n p_n x_hat_n = unproject(sum_n p_n latent_n)     for sum_n p_n = 1

so a rotation is applied once to the query and once to the output, never to the cache. These functions are pure torch and are the
reference of the kernels. A codec knows nothing of models, caches, masks or positions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvstack import checks

Codes = tuple[Tensor, ...]
Side = Literal["key", "value"]


@dataclass(frozen=True)
class Field:
    """One stored tensor of a codec: `[B, H, N // block, *shape]` of `dtype`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of this field in one block of one KV head."""
        n = self.dtype.itemsize
        for s in self.shape:
            n *= s
        return n


@dataclass(frozen=True)
class Context:
    """What a codec must know of the layer it serves.

    head_dim: size D of the vectors. num_heads: KV heads H. dtype: the model's dtype (only the lossless codec uses it).
    centre: optional static mean per head `[H, D]` that the codec subtracts before encoding.
    """

    head_dim: int
    num_heads: int
    dtype: torch.dtype
    device: torch.device
    centre: Tensor | None = None


class Codec(ABC):
    """One side (K or V) of one layer. Subclasses set `fields` and implement `_encode` and `latent`."""

    fields: tuple[Field, ...]
    block: int = 1
    transform: Tensor | None = None  # [Dl, D] float32; None is the identity
    centre: Tensor | None = None  # [H, D] float32; None is zero

    def encode(self, x: Tensor) -> Codes:
        """Encode `x [B, H, N, D]` (any float dtype; N a multiple of `block`) into one tensor per field.

        Raises BadInputError when `x` has a NaN or an Inf.
        """
        assert x.shape[-2] % self.block == 0, f"{x.shape[-2]} tokens are no whole blocks of {self.block}"
        checks.finite(x, "Load the model in bfloat16 if it overflows in float16, and look for NaN in its weights and inputs.")
        return self._encode(x)

    @abstractmethod
    def _encode(self, x: Tensor) -> Codes:
        """`encode` of finite vectors in whole blocks."""

    @abstractmethod
    def latent(self, codes: Codes) -> Tensor:
        """Latent vectors `[B, H, N, Dl]` in float32 of the codes `[B, H, N // block, ...]`."""

    def project(self, q: Tensor) -> Tensor:
        """Move queries `[..., D]` into latent space, `[..., Dl]` float32, so that logits are `project(q) . latent`."""
        q = q.float()
        return q if self.transform is None else q @ self.transform.T

    def unproject(self, o: Tensor) -> Tensor:
        """Move weighted means of latents `[B, H, ..., Dl]` (weights that sum to 1) back to `[B, H, ..., D]` float32."""
        if self.transform is not None:
            o = o @ self.transform
        if self.centre is not None:
            o = o + self.centre.reshape(1, o.shape[1], *([1] * (o.ndim - 3)), o.shape[-1])
        return o

    def decode(self, codes: Codes) -> Tensor:
        """The vectors `[B, H, N, D]` float32 that the codes stand for."""
        return self.unproject(self.latent(codes))

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token in one KV head, by formula (`nbytes` of the store measures the same)."""
        return sum(f.nbytes for f in self.fields) / self.block

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The tensors that the codec itself holds, which no token adds to; codecs may share them."""
        return tuple(t for t in (self.transform, self.centre) if t is not None)


@dataclass(frozen=True)
class Precision(ABC):
    """A member of the precision axis, as frozen data: it builds the codecs of a layer's K and V."""

    @abstractmethod
    def build(self, side: Side, ctx: Context) -> Codec:
        """The codec of one side of one layer."""
