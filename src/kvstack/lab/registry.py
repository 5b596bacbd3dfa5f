"""Where the bundled reference model is, and how a model is loaded by path, hub name or as `bundled`."""

import os
from pathlib import Path
from typing import Any

import torch

from kvstack.errors import BadInputError
from kvstack.profile import Profile

NAME = "kvlab-6m"


def bundled_model() -> Path:
    """Folder of the reference model, in the checkout's `models/` or where $KVSTACK_MODELS points."""
    root = Path(os.environ.get("KVSTACK_MODELS", Path(__file__).resolve().parents[3] / "models"))
    folder = root / NAME
    if not (folder / "model.safetensors").is_file():
        raise BadInputError(
            f"The bundled model is not at {folder}. Run from a checkout, set KVSTACK_MODELS to its models folder, "
            "or train one with `kvstack lab train`."
        )
    return folder


def folder(name: str) -> Path:
    """The folder that `bundled`, or the path of a folder, stands for."""
    return bundled_model() if name == "bundled" else Path(name).expanduser()


def load_profile(name: str) -> Profile | None:
    """The profile that lies in a model's folder, or None."""
    path = folder(name) / "profile" / "profile.safetensors"
    return Profile.load(path) if path.is_file() else None


def load(name: str, dtype: torch.dtype | None = None, device: str | None = None) -> tuple[Any, Any]:
    """Model (in eval mode) and tokenizer of `bundled`, a local folder or a hub name.

    dtype None: float32 for the bundled model, so that only the cache rounds; what the checkpoint says for others.
    device None: the GPU if there is one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import kvstack.attention  # noqa: F401 - transformers knows our decoder from then on

    local = folder(name)
    looks_like_path = name.startswith((".", "/", "~")) or local.exists()
    where: str | Path = local if looks_like_path else name
    if looks_like_path and not (local / "config.json").is_file():
        raise BadInputError(f"{name} is not a model folder: it has no config.json. Give a folder, a hub name, or `bundled`.")
    dtype = dtype or (torch.float32 if name == "bundled" else None)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype or "auto", local_files_only=looks_like_path)
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=looks_like_path)
    except (OSError, ValueError) as e:  # ValueError: a kind of model that transformers does not know
        raise BadInputError(f"Could not load {name}: {str(e).splitlines()[0]} Give a folder, a hub name, or `bundled`.") from e
    return model.to(device).eval(), tokenizer
