"""Serving measured: vLLM with its own caches and with ours, each engine in a process of its own, all with the same arguments.

    {engine, kv, B, N, capacity_tokens, prefill_tokens_per_s, ms_per_step, tokens_per_s}

kind says what a row is of: `prefill`, `step` or `largest` (as many rows as fit). The model has a shape of `generate.SHAPES` and random
weights, or is yours. What the engine's process does is `serve_engine`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kvstack.bench.generate import SHAPES
from kvstack.errors import BadInputError
from kvstack.vllm.settings import VARIABLE

Row = dict[str, Any]
PEERS = ("bf16", "fp8", "turboquant_4bit_nc", "int4_per_token_head")  # words of vLLM's --kv-cache-dtype; bf16 is its `auto`
STEPS = ((1, 32768), (8, 32768), (32, 4096), (32, 16384), (128, 2048))
LIMIT = 40960  # tokens of a request


def folder(shape: str, to: Path) -> Path:
    """Write the config of a shape of `SHAPES` into a folder, for random weights. Raises BadInputError for another name."""
    import transformers

    if shape not in SHAPES:
        raise BadInputError(f"There is no shape {shape!r}. Shapes are {', '.join(SHAPES)}; or give the folder or hub name of a model.")
    name, config = SHAPES[shape]
    made = getattr(transformers, f"{name}Config")(**config | {"max_position_embeddings": LIMIT}, architectures=[f"{name}ForCausalLM"])
    made.torch_dtype = "bfloat16"
    made.save_pretrained(to)
    return to


def arguments(kv: str, steps: Iterable[tuple[int, int]], random_weights: bool, memory: float, rows: int, limit: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for an engine; they differ in nothing but the cache. rows: the most at once."""
    from kvstack.bench import filled_cache

    sizes = sorted({1, 2, 4, 8, *range(16, rows + 1, 16), *(b for b, _ in steps)})
    return dict(
        dtype="bfloat16",
        kv_cache_dtype=kv if kv in PEERS[1:] else "auto",
        load_format="dummy" if random_weights else "auto",
        skip_tokenizer_init=True,
        max_model_len=limit,
        max_num_seqs=rows,
        gpu_memory_utilization=memory,
        enable_prefix_caching=False,
        kv_transfer_config=filled_cache.CONFIG,
        compilation_config={"cudagraph_capture_sizes": sizes},
    )


def measure(
    model: str, engines: Sequence[str], prefill: Sequence[tuple[int, int]], steps: Sequence[tuple[int, int]], largest: Sequence[int],
    memory: float = 0.9, rows: int = 128, log: Path | None = None, tell: Callable[[str], None] = print,
) -> list[Row]:  # fmt: skip
    """Rows of all engines. An engine that fails has one row with its `reason`."""
    out: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        random_weights = model in SHAPES
        path = str(folder(model, place / "model")) if random_weights else model
        for kv in engines:
            task = dict(
                model=path, prefill=prefill, steps=steps, largest=largest,
                arguments=arguments(kv, steps, random_weights, memory, rows, LIMIT),
            )  # fmt: skip
            tell(kv)
            out += [dict(engine="vLLM" if kv in PEERS else "vLLM + kvstack", kv=kv) | row for row in _engine(kv, task, place, log)]
    return out


def _engine(kv: str, task: dict[str, Any], place: Path, log: Path | None) -> list[Row]:
    source, to = place / "task.json", place / "rows.json"
    source.write_text(json.dumps(task))
    to.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE} | ({} if kv in PEERS else {VARIABLE: kv})
    command = [sys.executable, "-m", "kvstack.bench.serve_engine", str(source), str(to)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if log is not None:
        with log.open("a") as file:
            file.write(f"=== {kv}\n{done.stdout}\n")
    if to.exists():
        return list(json.loads(to.read_text()))
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return [dict(kind="failed", B=None, N=None, reason=(lines or ["no output"])[-1][-300:])]
