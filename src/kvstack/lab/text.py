"""Real text that exists on every machine with Python: sources of the standard library and of installed packages.

`held_out_text` is what models are judged on: standard-library modules fixed by name. `training_text` is everything else that is
found, and skips any file that has the name of a held-out module, or is in a folder of that name, so that vendored copies do not leak.
The text differs a little between Python versions, which is why every result that uses it carries `digest(text)`.
It is not a corpus for training models for use.
"""

import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from kvstack.errors import BadInputError

HELD_OUT = (
    "argparse", "calendar", "configparser", "csv", "difflib", "fractions", "ftplib", "heapq", "optparse",
    "shlex", "statistics", "tarfile", "textwrap", "turtle",
)  # fmt: skip
TUNING = ("bdb", "cmd", "doctest", "mailbox", "pdb", "smtplib")  # a second split, for choosing settings
PACKAGES = (
    "numpy", "torch", "transformers", "sympy", "scipy", "networkx", "pandas", "matplotlib", "sklearn", "jax", "flax", "optax",
    "statsmodels", "pip", "setuptools", "pygments", "rich", "typer", "hypothesis", "fsspec", "huggingface_hub", "safetensors",
    "mpmath", "jinja2", "yaml", "tqdm", "filelock", "packaging", "regex", "click", "pytest", "triton",
    "torchvision", "torchaudio", "torch_geometric", "e3nn", "botorch", "gpytorch", "numpyro", "lightning", "pytorch_lightning", "numba",
    "cupy", "cupyx", "jaxlib", "tensorboard", "PIL", "skimage", "seaborn", "onnx", "onnxruntime", "onnxscript", "orbax", "optimistix",
    "diffrax", "equinox", "lineax", "timm", "peft", "accelerate", "sentence_transformers", "tokenizers", "aiohttp", "fontTools", "grpc",
    "h5py", "imageio", "joblib", "llvmlite", "lxml", "mesonbuild", "patsy", "pyarrow", "pyparsing", "sacrebleu", "tensorstore",
    "xarray", "treescope", "werkzeug", "psutil", "einops", "chex", "absl", "etils", "Cython", "torchmetrics", "vllm",
)  # fmt: skip


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _read(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if 500 <= len(text) <= 400_000 else None


def _split(names: tuple[str, ...]) -> str:
    parts = [t for n in names if (t := _read(_stdlib() / f"{n}.py")) is not None]
    if not parts:
        raise BadInputError(
            "This Python has no sources of its standard library, so there is no held-out text. "
            "Use a Python that ships .py files, or pass your own file with --text."
        )
    return "\n".join(parts)


def held_out_text() -> str:
    """The text that results are reported on."""
    return _split(HELD_OUT)


def tuning_text() -> str:
    """The text that settings are chosen on; also not trained on."""
    return _split(TUNING)


def _files() -> Iterator[Path]:
    roots = [_stdlib()]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            roots += [Path(p) for p in spec.submodule_search_locations]
    skip = set(HELD_OUT) | set(TUNING)
    for i, root in enumerate(roots):
        for path in sorted(root.rglob("*.py")):
            inside_packages = i == 0 and "site-packages" in path.parts
            names = {path.stem, *path.parent.relative_to(root).parts}
            if not names & skip and not inside_packages:
                yield path


def training_text(max_bytes: int) -> list[str]:
    """Files to train on, up to `max_bytes` in all; which ones is decided by a hash of their text, not by their place."""
    texts = {hashlib.sha256(t.encode()).digest(): t for p in _files() if (t := _read(p)) is not None}
    chosen, total = [], 0
    for key in sorted(texts):
        total += len(texts[key].encode())
        if total > max_bytes:
            break
        chosen.append(texts[key])
    return chosen


def digest(text: str) -> str:
    """Short name of a text, for results and model cards."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
