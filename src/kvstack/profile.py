"""A profile: what was calibrated on one model, kept in one file.

Layout: float32 tensors with the shapes of `SHAPES` (L layers, Hkv KV heads, D head size), the model's fingerprint, where the
numbers come from and how many tokens they are means of. On disk it is an artefact (`artefact.py`). How the numbers are found is
the business of `calibrate/`; what they are used for is the codecs'.
"""

from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from kvstack import artefact
from kvstack.errors import ArtefactError
from kvstack.fingerprint import fingerprint

FORMAT, VERSION = "kvstack.profile", 1

# A new calibrated tensor is a field of `Profile` and a row here. One letter means one size in all of them.
SHAPES: dict[str, tuple[str, ...]] = {
    "key_centre": ("L", "Hkv", "D"),
    "value_centre": ("L", "Hkv", "D"),
}


@dataclass(frozen=True, eq=False)
class Profile:
    """Calibrated tensors of the model with `fingerprint`.

    key_centre, value_centre: means of the keys (after RoPE) and of the values, `[L, Hkv, D]` float32; zero in layers without any.
    source: what text they come from, in words. tokens: how many tokens.
    Raises ArtefactError when a tensor has the wrong shape or dtype, or is not finite.
    """

    key_centre: Tensor
    value_centre: Tensor
    fingerprint: str
    source: str
    tokens: int

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for name, letters in SHAPES.items():
            t: Tensor = getattr(self, name)
            agree = t.ndim == len(letters) and all(sizes.setdefault(c, n) == n for c, n in zip(letters, t.shape, strict=True))
            if not agree or t.dtype != torch.float32 or not t.isfinite().all():
                found = f"{t.dtype} {list(t.shape)}" if t.isfinite().all() else "a tensor with NaN or Inf"
                raise ArtefactError(
                    f"`{name}` of a profile is finite float32 [{', '.join(letters)}], the same sizes in all tensors, "
                    f"not {found}. Calibrate again."
                )

    def check(self, model: Any) -> None:
        """Raise ArtefactError unless the profile was made with `model`."""
        if fingerprint(model) != self.fingerprint:
            raise ArtefactError(
                f"This profile belongs to the model with fingerprint {self.fingerprint}, and yours is {fingerprint(model)}. "
                "Calibrate one on your model."
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the profile to one file. Raises ArtefactError when that cannot be done."""
        about = {
            "layout": {name: list(letters) for name, letters in SHAPES.items()},
            "fingerprint": self.fingerprint,
            "source": self.source,
            "tokens": self.tokens,
        }
        artefact.write(path, {name: getattr(self, name) for name in SHAPES}, FORMAT, VERSION, about)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Profile":
        """Read a profile. Raises ArtefactError when the file is missing, damaged or no profile that this version reads."""
        tensors, about = artefact.read(path, FORMAT, VERSION)
        layout = {name: list(letters) for name, letters in SHAPES.items()}
        if about["layout"] != layout or tensors.keys() != SHAPES.keys():
            raise ArtefactError(f"{path} has the tensors {about['layout']}, not {layout}. Calibrate again.")
        return cls(**tensors, fingerprint=about["fingerprint"], source=about["source"], tokens=about["tokens"])
