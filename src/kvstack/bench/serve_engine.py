"""One engine of vLLM measured, in a process of its own: `python -m kvstack.bench.serve_engine TASK.json ROWS.json`.

The task: the folder of a config, arguments of `vllm.LLM`, and what to measure. Prompts are random tokens.

    prefill      B rows of N tokens, each computed, with one new token
    step         B rows over N tokens that are in the cache (`filled_cache`); the time of long generations less that of short ones
    largest      the same with as many rows of N tokens as fit
    generation   as many rows as fit from nothing to N new tokens: the mean over steps at lengths spread evenly, or, where tokens are
                 evicted, over some hundred steps of rows with a full budget, evictions included, since all later ones are like these
"""

import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

SHORT, LONG, TIMES = 8, 72, 3
POINTS = 4
Row = dict[str, Any]


class Engine:
    """An engine, and what is asked of it. blocks: of its cache."""

    def __init__(self, task: Row) -> None:
        from vllm import LLM

        self.llm = LLM(model=task["model"], **task["arguments"])
        config = self.llm.llm_engine.vllm_config
        self.blocks, self.block = config.cache_config.num_gpu_blocks, config.cache_config.block_size
        self.vocabulary, self.rows = config.model_config.get_vocab_size(), task["arguments"]["max_num_seqs"]
        self.selection: dict[str, int] | None = task["selection"]

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return int(self.blocks * self.block)

    def fitting(self, tokens: int) -> int:
        """Rows of so many tokens that fit at once, evictions considered."""
        if self.selection is not None:
            tokens = min(tokens, self.selection["budget"] + self.selection["interval"] + self.block)
        return int(min((self.blocks - 1) // -(-tokens // self.block), self.rows))

    def run(self, lengths: list[int], tokens: int, compute: bool = False) -> float:
        """Seconds of `tokens` new tokens for random prompts of these lengths."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": random.choices(range(self.vocabulary), k=n)} for n in lengths]
        extra = {"kv_transfer_params": {"compute": compute}}
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra)
        start = time.perf_counter()
        out = self.llm.generate(prompts, params, use_tqdm=False)
        assert all(len(o.outputs[0].token_ids) == tokens for o in out), "a request ended early"
        return time.perf_counter() - start

    def step(self, lengths: list[int], times: int, long: int = LONG) -> list[float]:
        """Seconds of a step of rows of these lengths, several times."""
        self.run(lengths, SHORT)
        return [(self.run(lengths, long) - self.run(lengths, SHORT)) / (long - SHORT) for _ in range(times)]

    def prefill(self, b: int, n: int) -> Row:
        """See the module."""
        self.run([n], 1, compute=True)  # kernels that are compiled on first use
        seconds = min(self.run([n] * b, 1, compute=True) for _ in range(2))
        return dict(kind="prefill", B=b, N=n, prefill_tokens_per_s=b * n / seconds)

    def timed(self, kind: str, b: int, n: int) -> Row:
        """Rows `step` and `largest`."""
        if b * (n + LONG) > self.capacity:
            return dict(kind=kind, B=b, N=n, reason=f"{self.capacity} tokens fit")
        times = self.step([n] * b, TIMES)
        return dict(kind=kind, B=b, N=n, **_speed(b, statistics.median(times)), ms_all=[1e3 * t for t in times])

    def generation(self, n: int) -> Row:
        """See the module."""
        b, plain = self.fitting(n), 0.0
        if self.selection is not None:
            budget, interval = self.selection["budget"], self.selection["interval"]
            lengths = [random.randrange(budget, budget + interval - SHORT) for _ in range(b)]  # so that they are due at different times
            plain = self.step([budget] * b, 1)[0]  # without an eviction
            self.run(lengths, SHORT + interval)  # with all
            at = {"evicting": self.step(lengths, 1, SHORT + 2 * interval)[0]}
        else:
            at = {str(m): self.step([m] * b, 1)[0] for m in (round((i + 0.5) * n / POINTS) for i in range(POINTS))}
        ms_at = {length: 1e3 * t for length, t in at.items()}
        more = {"ms_without_eviction": 1e3 * plain} if self.selection is not None else {}
        return dict(kind="generation", B=b, N=n, **_speed(b, statistics.mean(at.values())), ms_at=ms_at, **more)


def _speed(b: int, seconds: float) -> Row:
    return dict(ms_per_step=1e3 * seconds, tokens_per_s=b / seconds)


def main(task: Row, to: Path) -> None:
    """Measure the engine of `task`, and write its rows after each."""
    engine = Engine(task)
    rows: list[Row] = []

    def note(row: Row) -> None:
        rows.append(row | dict(capacity_tokens=engine.capacity))
        print(rows[-1], flush=True)
        to.write_text(json.dumps(rows))

    for b, n in task["prefill"]:
        note(engine.prefill(b, n))
    for b, n in task["steps"]:
        note(engine.timed("step", b, n))
    for n in task["largest"]:
        note(engine.timed("largest", engine.fitting(n + LONG), n))
    for n in task["generation"]:
        note(engine.generation(n))


if __name__ == "__main__":
    source, rows_file = map(Path, sys.argv[1:])
    main(json.loads(source.read_text("utf-8")), rows_file)
