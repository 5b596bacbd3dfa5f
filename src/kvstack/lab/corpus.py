"""The corpus as token ids: what `lab.text` finds on this machine, through the tokenizer of the bundled model, in one array.

On disk it is one `.npz` file: tokens of the three texts as uint16, and facts as JSON, the digest of the training tokens among them.
Batches are windows at places that the seed and the number of the step decide, and nothing else: a resumed run, another number of
processes and another architecture see the same tokens in the same order. Documents have the tokenizer's end mark between them.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstack import artefact
from kvstack.errors import BadInputError
from kvstack.lab.registry import bundled_model
from kvstack.lab.text import held_out_text, training_text, tuning_text
from kvstack.lab.tokenizer import EOS, load_tokenizer

SLICE = 2000  # files tokenised at once


@dataclass(frozen=True)
class Corpus:
    """Training tokens `[N]` uint16, and the tokens of the two texts that are not trained on."""

    train: NDArray[np.uint16]
    tuning: NDArray[np.uint16]
    test: NDArray[np.uint16]
    digest: str
    bytes_per_token: float  # of the test text, to turn nats a token into bits a byte


def make_corpus(max_bytes: int, progress: Callable[[float], None] = lambda share: None) -> Corpus:
    """Read and tokenise up to `max_bytes` of text."""
    tok = load_tokenizer(bundled_model())

    def ids(texts: Sequence[str]) -> NDArray[np.uint16]:
        parts = [np.asarray([*e.ids, EOS], np.uint16) for e in tok.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        return np.concatenate(parts)

    texts = training_text(max_bytes)
    parts = []
    for i in range(0, len(texts), SLICE):
        parts.append(ids(texts[i : i + SLICE]))
        progress(min(1.0, (i + SLICE) / len(texts)))
    test = ids([held_out_text()])
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes())
    return Corpus(np.concatenate(parts), ids([tuning_text()]), test, digest.hexdigest()[:16], len(held_out_text().encode()) / len(test))


def save_corpus(corpus: Corpus, path: Path) -> None:
    """Write `path` (.npz). Raises ArtefactError when that cannot be done."""
    facts = {"digest": corpus.digest, "bytes_per_token": corpus.bytes_per_token}
    with artefact.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, train=corpus.train, tuning=corpus.tuning, test=corpus.test, facts=np.array(json.dumps(facts)))


def load_corpus(path: Path) -> Corpus:
    """The corpus in a file. Raises BadInputError when it is none."""
    try:
        with np.load(path) as held:
            return Corpus(held["train"], held["tuning"], held["test"], **json.loads(str(held["facts"])))
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as e:
        raise BadInputError(f"{path} is no corpus. Make one with `kvstack lab corpus {path}`.") from e


def places(seed: int, step: int, rows: int, tokens: int, length: int) -> NDArray[np.int64]:
    """Where the `rows` windows of `length` + 1 tokens of a step begin."""
    return np.random.default_rng((seed, step)).integers(0, tokens - length, rows)


def windows(tokens: Tensor, starts: NDArray[np.int64], length: int) -> Tensor:
    """`[rows, length + 1]` long, on the device of `tokens`."""
    at = torch.from_numpy(starts).to(tokens.device)[:, None] + torch.arange(length + 1, device=tokens.device)
    return tokens[at].long()


def as_tensor(tokens: NDArray[np.uint16], device: torch.device) -> Tensor:
    """Tokens as int32, which indexes on a GPU."""
    return torch.from_numpy(tokens.astype(np.int32)).to(device)


def judged(tokens: NDArray[np.uint16], length: int, device: torch.device, most: int = 10**9) -> Tensor:
    """The first `most` windows `[n, length + 1]` of a text that is not trained on, one after the other."""
    n = min(most, (len(tokens) - 1) // length)
    if not n:
        raise BadInputError(f"The text has {len(tokens)} tokens, too few for a window of {length}. Give a shorter length.")
    return windows(as_tensor(tokens, device), np.arange(n, dtype=np.int64) * length, length)


def corpus_facts(corpus: Corpus) -> dict[str, Any]:
    """What results say of a corpus."""
    sizes = {f"{name}_tokens": len(getattr(corpus, name)) for name in ("train", "tuning", "test")}
    return {"digest": corpus.digest, "bytes_per_token": corpus.bytes_per_token, **sizes}
