"""One engine of vLLM measured, in a process of its own: `python -m kvstack.bench.serve_engine TASK.json ROWS.json`.

The task: the folder of a config, arguments of `vllm.LLM`, and the points to measure. Prompts are random tokens.

    capacity   tokens that the engine says fit
    prefill    rows of N tokens, each computed, with one new token
    step       B rows over N tokens that are in the cache (`filled_cache`), median of the differences between long and short generations
    largest    the same with as many rows of N tokens as fit
"""

import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

SHORT, LONG, TIMES = 8, 72, 3


def main(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure the engine of `task` and return its rows, `{B, N, capacity_tokens, ...}`."""
    from vllm import LLM

    llm = LLM(model=task["model"], **task["arguments"])
    cache = llm.llm_engine.vllm_config.cache_config
    capacity = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks * cache.block_size
    print(f"capacity {capacity}", flush=True)
    rows: list[dict[str, Any]] = []
    for n, count in task["prefill"]:
        _run(llm, 1, n, 1, compute=True)  # kernels that are compiled on first use
        seconds = min(_run(llm, count, n, 1, compute=True) for _ in range(2))
        rows.append(dict(kind="prefill", B=count, N=n, capacity_tokens=capacity, prefill_tokens_per_s=count * n / seconds))
        print(rows[-1], flush=True)
    for b, n in task["steps"]:
        rows.append(_step(llm, "step", b, n, capacity))
    for n in task["largest"]:
        b = min(capacity // (-(-(n + LONG) // 128) * 128), task["arguments"]["max_num_seqs"])
        rows.append(_step(llm, "largest", b, n, capacity))
    return rows


def _step(llm: Any, kind: str, b: int, n: int, capacity: int) -> dict[str, Any]:
    row: dict[str, Any] = dict(kind=kind, B=b, N=n, capacity_tokens=capacity)
    if b * (n + LONG) <= capacity:
        _run(llm, b, n, SHORT)
        times = [(_run(llm, b, n, LONG) - _run(llm, b, n, SHORT)) / (LONG - SHORT) for _ in range(TIMES)]
        seconds = statistics.median(times)
        row |= dict(ms_per_step=1e3 * seconds, ms_all=[1e3 * t for t in times], tokens_per_s=b / seconds)
    else:
        row["reason"] = f"{capacity} tokens fit"
    print(row, flush=True)
    return row


def _run(llm: Any, b: int, n: int, tokens: int, compute: bool = False) -> float:
    """Seconds of `tokens` new tokens for `b` random prompts of `n` tokens."""
    from vllm import SamplingParams

    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    prompts = [{"prompt_token_ids": random.choices(range(vocabulary), k=n)} for _ in range(b)]
    extra = {"kv_transfer_params": {"compute": compute}}
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra)
    start = time.perf_counter()
    out = llm.generate(prompts, params, use_tqdm=False)
    assert all(len(o.outputs[0].token_ids) == tokens for o in out), "a request ended early"
    return time.perf_counter() - start


if __name__ == "__main__":
    source, to = map(Path, sys.argv[1:])
    to.write_text(json.dumps(main(json.loads(source.read_text("utf-8")))))
