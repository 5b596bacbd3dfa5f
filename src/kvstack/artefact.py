"""Saved artefacts: one safetensors file that proves what it is before anything is read from it.

Layout: the tensors, and four strings in the safetensors header: `format` (an id such as "kvstack.profile"), `version` of that format,
`metadata` (JSON, whatever the caller must know to use the tensors, the model's fingerprint above all) and `sha256` over all of these.
A file is written beside its place and then renamed, so a crash leaves the old file or the new one, never half of one.

This module knows nothing of what the tensors mean: a caller compares fingerprints and shapes itself and raises `ArtefactError`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvstack.errors import ArtefactError

Json = dict[str, Any]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; it replaces `path` when the block ends without an error.

    Raises ArtefactError when the folder is missing or cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, SafetensorError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        remedy = "Give a file in a folder that exists and can be written."
        raise ArtefactError(f"{target} cannot be written: {reason}. {remedy}") from e
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Make `folder` if need be, and raise ArtefactError unless files can be written there: before long work, not after it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ArtefactError(f"{folder} cannot be written: {e.strerror or e}. Give another place.") from e


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    format: str,
    version: int,
    metadata: Json,
) -> None:
    """Write `tensors` and `metadata` (JSON without NaN) to `path` as version `version` of `format`, replacing it atomically.

    Raises ArtefactError when the file cannot be written.
    """
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(metadata, sort_keys=True, allow_nan=False)
    header = {"format": format, "version": str(version), "metadata": text}
    header["sha256"] = _checksum(held, header)
    with replacing(path) as temporary:
        save_file(held, temporary, metadata=header)


def read(path: str | os.PathLike[str], format: str, version: int) -> tuple[dict[str, Tensor], Json]:
    """The tensors (on the CPU) and the metadata of `path`.

    Raises ArtefactError when the file is missing, damaged, not of `format`, or of another version than `version`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            _check_kind(path, header, format, version)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except FileNotFoundError as e:
        raise ArtefactError(f"{path} does not exist. Check the path, or write it first.") from e
    except OSError as e:
        raise ArtefactError(f"{path} cannot be read: {e.strerror or e}. Give a file.") from e
    except SafetensorError as e:
        raise ArtefactError(f"{path} is truncated, damaged or no safetensors file ({e}). Write or copy it again.") from e
    claimed = header.pop("sha256", "")
    if _checksum(tensors, header) != claimed:
        raise ArtefactError(f"{path} is damaged: its checksum is wrong. Write or copy it again.")
    return tensors, json.loads(header["metadata"])


def _check_kind(path: str | os.PathLike[str], header: dict[str, str], format: str, version: int) -> None:
    found = header.get("format")
    if found != format:
        what = f"is a {found} file" if found else "was not written by kvstack"
        raise ArtefactError(f"{path} {what}; a {format} file is needed.")
    if header.get("version") != str(version):
        raise ArtefactError(
            f"{path} is {format} version {header.get('version')}, and this kvstack reads version {version}. "
            "Write it again with this kvstack, or use the kvstack that wrote it."
        )


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of the header and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
