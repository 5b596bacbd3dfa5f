"""Query statistics in the file format of TriAttention's authors (github.com/WeianMao/triattention), read and written.

A `torch.save` of {"metadata": {"sampled_heads": [[layer, head], ...], "head_dim": D, "rope_style": "half" or "interleaved", ...},
"stats": {"layer00_head00": {"q_mean_real": [F], "q_mean_imag": [F], "q_abs_mean": [F]}, ...}}, float32, before RoPE. Such a file names
neither its model nor its text, has no keys and values, and takes whole heads to turn.
"""

import pickle
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvstack.artefact import replacing
from kvstack.errors import ArtefactError, UnsupportedModelError
from kvstack.fingerprint import fingerprint
from kvstack.profile import Profile
from kvstack.rope import rope_of

FIELDS = {"query_mean_real": "q_mean_real", "query_mean_imag": "q_mean_imag", "query_norm": "q_abs_mean"}


def _name(layer: int, head: int) -> str:
    return f"layer{layer:02d}_head{head:02d}"


def _style(model: Any) -> str:
    """How the format names the pairing of `model`. Raises UnsupportedModelError when a part of its heads does not turn."""
    rope = rope_of(model)
    if not rope.frequency.all():
        raise UnsupportedModelError("A part of this model's heads does not turn, which the format cannot say. Use a kvstack profile.")
    return "interleaved" if rope.pairs[1, 0] == 1 else "half"


def write_upstream(profile: Profile, path: str | PathLike[str], model: Any) -> None:
    """Write the query statistics of `profile`, which is of `model`.

    Raises ArtefactError when it is of another model or the file cannot be written, UnsupportedModelError for partial rotary.
    """
    profile.check(model)
    layers, heads, bands = profile.query_norm.shape
    every = [[i, h] for i in range(layers) for h in range(heads)]
    config = model.config.get_text_config(decoder=True)
    metadata = {
        "num_traces": 1, "head_dim": 2 * bands, "dtype": "float32", "rope_style": _style(model),
        "rope_type": (config.rope_parameters or {}).get("rope_type", "default"), "sampled_heads": every, "source": profile.source,
    }  # fmt: skip
    stats = {_name(i, h): {theirs: getattr(profile, ours)[i, h].clone() for ours, theirs in FIELDS.items()} for i, h in every}
    with replacing(path) as temporary:
        torch.save({"metadata": metadata, "stats": stats}, temporary)


def read_upstream(path: str | PathLike[str], model: Any) -> Profile:
    """The query statistics in `path` as a profile of `model`, whose centres of keys and values are zero.

    Raises ArtefactError when the file is missing or damaged, has not every head of every layer, or has heads of another size or pairing
    than `model`, UnsupportedModelError for partial rotary.
    """
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
        about, stats = file["metadata"], file["stats"]
    except OSError as e:
        raise ArtefactError(f"{path} cannot be read: {e.strerror or e}. Check the path.") from e
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as e:
        raise ArtefactError(f"{path} is damaged or no file of TriAttention statistics. Copy it again.") from e
    config = model.config.get_text_config(decoder=True)
    style, frequency = _style(model), rope_of(model).frequency
    layers, heads, bands = config.num_hidden_layers, config.num_attention_heads, len(frequency)
    for what, found, wanted in (("head_dim", about.get("head_dim"), 2 * bands), ("rope_style", about.get("rope_style"), style)):
        if found != wanted:
            raise ArtefactError(f"{path} has {what} {found!r}, and the model {wanted!r}. Use the statistics of this model.")
    every = {(i, h) for i in range(layers) for h in range(heads)}
    have = {(int(i), int(h)) for i, h in about.get("sampled_heads", [])}
    if have != every or {_name(*at) for at in every} != stats.keys():
        raise ArtefactError(
            f"{path} has {len(have & every)} of the {layers} x {heads} heads of the model, and {len(have - every)} that it has not. "
            "Use complete statistics of this model."
        )

    def gather(name: str) -> Tensor:
        each: list[Any] = [stats[_name(i, h)].get(name) for i in range(layers) for h in range(heads)]
        if any(not isinstance(t, Tensor) or t.shape != (bands,) for t in each):
            raise ArtefactError(f"`{name}` of some head in {path} is not a tensor [{bands}]. Copy the file again.")
        return torch.stack(each).float().reshape(layers, heads, bands)

    centre = torch.zeros(layers, config.num_key_value_heads, 2 * bands)
    return Profile(
        key_centre=centre,
        value_centre=centre.clone(),
        **{ours: gather(theirs) for ours, theirs in FIELDS.items()},
        rope_frequency=frequency.float().cpu(),
        fingerprint=fingerprint(model),
        source=f"upstream statistics {Path(path).name}: queries only, centres of keys and values are zero",
        tokens=0,
    )
