"""A profile: what was calibrated on one model, kept in one file.

Layout: float32 tensors with the shapes of `SHAPES`, and those of `OPTIONAL` that were asked for (L layers, Hkv KV heads, Hq query
heads, D head size, F = D / 2 bands of RoPE, W hidden units of a forecast); the model's fingerprint, where the numbers come from and how
many tokens they are means of. On disk it is an artefact (`artefact.py`). How the numbers are found is the business of `calibrate/`;
what they are used for is the codecs' and the scorers'.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from kvstack import artefact
from kvstack.errors import ArtefactError
from kvstack.fingerprint import fingerprint
from kvstack.scorers.base import ForecastWeights, QueryStats

FORMAT, VERSION = "kvstack.profile", 2

# A new calibrated tensor is a field of `Profile` and a row here. One name means one size in all of them.
SHAPES: dict[str, tuple[str, ...]] = {
    "key_centre": ("L", "Hkv", "D"),
    "value_centre": ("L", "Hkv", "D"),
    "query_mean_real": ("L", "Hq", "F"),
    "query_mean_imag": ("L", "Hq", "F"),
    "query_norm": ("L", "Hq", "F"),
    "rope_frequency": ("F",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "query_covariance": ("L", "Hq", "D", "D"),
    "forecast_hidden": ("L", "Hkv", "2D", "W"),
    "forecast_hidden_bias": ("L", "Hkv", "W"),
    "forecast_out": ("L", "Hkv", "W", "2"),
    "forecast_out_bias": ("L", "Hkv", "2"),
    "forecast_fit": ("L", "Hkv", "2"),
}


@dataclass(frozen=True, eq=False)
class Profile:
    """Calibrated tensors of the model with `fingerprint`; all are float32, and zero in layers that were not calibrated.

    key_centre, value_centre: means of the keys (after RoPE) and of the values, `[L, Hkv, D]`. query_mean_real, query_mean_imag: means
    of the bands of the queries before RoPE, `[L, Hq, F]`. query_norm: mean lengths of these bands, `[L, Hq, F]`. rope_frequency: of the
    bands, `[F]`, radians a token. query_covariance: of the queries before RoPE, `[L, Hq, D, D]`, or None.
    forecast_hidden `[L, Hkv, 2D, W]`, forecast_hidden_bias `[L, Hkv, W]`, forecast_out `[L, Hkv, W, 2]`, forecast_out_bias
    `[L, Hkv, 2]`: networks as in `scorers/forecast.py`. forecast_fit: their rank correlation and loss on samples that were held out,
    `[L, Hkv, 2]`. All five of them, or None.
    source: what text they come from, in words. tokens: how many tokens.
    Raises ArtefactError when a tensor has the wrong shape or dtype, or is not finite.
    """

    key_centre: Tensor
    value_centre: Tensor
    query_mean_real: Tensor
    query_mean_imag: Tensor
    query_norm: Tensor
    rope_frequency: Tensor
    fingerprint: str
    source: str
    tokens: int
    query_covariance: Tensor | None = None
    forecast_hidden: Tensor | None = None
    forecast_hidden_bias: Tensor | None = None
    forecast_out: Tensor | None = None
    forecast_out_bias: Tensor | None = None
    forecast_fit: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = {"2": 2}
        for name, t in self.tensors().items():
            axes = (SHAPES | OPTIONAL)[name]
            agree = t.ndim == len(axes) and all(sizes.setdefault(axis, n) == n for axis, n in zip(axes, t.shape, strict=True))
            if not agree or t.dtype != torch.float32 or not t.isfinite().all():
                found = f"{t.dtype} {list(t.shape)}" if t.isfinite().all() else "a tensor with NaN or Inf"
                raise ArtefactError(
                    f"`{name}` of a profile is finite float32 [{', '.join(axes)}], the same sizes in all tensors, "
                    f"not {found}. Calibrate again."
                )
        if sizes["D"] != 2 * sizes["F"]:
            raise ArtefactError(f"Heads of size {sizes['D']} do not have {sizes['F']} bands, as this profile says. Calibrate again.")
        forecast = [name for name in OPTIONAL if name.startswith("forecast")]
        missing = [name for name in forecast if getattr(self, name) is None]
        if missing not in ([], forecast) or (not missing and sizes["2D"] != 2 * sizes["D"]):
            raise ArtefactError(f"A forecast for heads of size {sizes['D']} is all of {', '.join(forecast)}. Calibrate again.")

    def tensors(self) -> dict[str, Tensor]:
        """The calibrated tensors by name, without the optional ones that are missing."""
        return {name: t for name in SHAPES | OPTIONAL if (t := getattr(self, name)) is not None}

    def layer(self, index: int, device: torch.device | None = None) -> QueryStats:
        """The statistics of the queries of layer `index`, on `device`."""
        mean = torch.complex(self.query_mean_real[index], self.query_mean_imag[index])
        covariance = None if self.query_covariance is None else self.query_covariance[index].to(device)
        return QueryStats(mean.to(device), self.query_norm[index].to(device), covariance)

    def forecast(self, index: int, device: torch.device | None = None) -> ForecastWeights | None:
        """The forecast of layer `index`, on `device`, or None."""
        if self.forecast_hidden is None:
            return None
        return ForecastWeights(*(getattr(self, f"forecast_{f.name}")[index].to(device) for f in fields(ForecastWeights)))

    def concentration(self) -> Tensor:
        """R `[L, Hq, F]` in [0, 1]: length of the mean over mean length of each band (TriAttention, arXiv 2604.04921); 1 where all
        queries of a head agree on its phase, and 0 where there are none."""
        length = torch.hypot(self.query_mean_real, self.query_mean_imag)
        return torch.where(self.query_norm > 0, length / self.query_norm, 0).clamp_max(1)

    def check(self, model: Any) -> None:
        """Raise ArtefactError unless the profile was made with `model`."""
        if fingerprint(model) != self.fingerprint:
            raise ArtefactError(
                f"This profile belongs to the model with fingerprint {self.fingerprint}, and yours is {fingerprint(model)}. "
                "Calibrate one on your model."
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the profile to one file. Raises ArtefactError when that cannot be done."""
        tensors = self.tensors()
        about = {"layout": _layout(tensors), "fingerprint": self.fingerprint, "source": self.source, "tokens": self.tokens}
        artefact.write(path, tensors, FORMAT, VERSION, about)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Profile":
        """Read a profile. Raises ArtefactError when the file is missing, damaged or no profile that this version reads."""
        tensors, about = artefact.read(path, FORMAT, VERSION)
        known = tensors.keys() <= (SHAPES | OPTIONAL).keys()
        if not known or not SHAPES.keys() <= tensors.keys() or about["layout"] != _layout(tensors):
            raise ArtefactError(f"{path} has the tensors {about['layout']}, not {_layout(SHAPES)}. Calibrate again.")
        return cls(**tensors, fingerprint=about["fingerprint"], source=about["source"], tokens=about["tokens"])


def _layout(names: Mapping[str, object]) -> dict[str, list[str]]:
    return {name: list((SHAPES | OPTIONAL)[name]) for name in names}
