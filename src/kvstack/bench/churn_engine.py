"""One engine of vLLM under churn, or asked again, in a process of its own: `python -m kvstack.bench.churn_engine TASK.json FOUND.json`.

How many requests are wanted at once changes at random times, down to one, so there are rushes and lulls. Prompts are parts of a text,
and many begin at the same places. Everything runs in this process, because requests must be aborted between two steps
(VLLM_ENABLE_V1_MULTIPROCESSING=0).
"""

import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PART = "part done: "
SAMPLES = 10  # of memory
LIKELIEST = 20  # tokens whose probability vLLM tells
TOGETHER = 8  # requests that are asked at once, at the end
Row = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """ids: tokens of a text that prompts are parts of. longest: tokens of a request. new_tokens: of an answer, at most. at_once:
    requests in the engine, at most. kept: finished requests that are told. shared: prefixes of many. aborted: the part that is."""

    ids: list[int]
    longest: int
    new_tokens: int
    at_once: int
    kept: int
    shared: int = 4
    aborted: float = 0.15


@dataclass
class Asked:
    """A request. abort_at: after how many new tokens it is aborted, None for never. said: its new tokens so far."""

    prompt: list[int]
    tokens: int
    abort_at: int | None
    preempted: bool = False
    said: list[int] = field(default_factory=list)


def churn(
    llm: Any, load: Load, seconds: float, requests: int | None, seed: int, told: Callable[[float], object]
) -> tuple[Row, list[Row]]:
    """Keep an engine busy for `seconds` or so many `requests`, and let it finish. Returns what happened, and some of the requests that
    were finished, with what was `said`, chosen at random."""
    rng, engine = random.Random(seed), llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    starts = [rng.randrange(len(load.ids) - load.longest) for _ in range(load.shared)]
    asked: dict[str, Asked] = {}
    done: list[Row] = []
    row: Row = dict(requests=0, finished=0, aborted=0, preempted=0, new_tokens=0, cached_tokens=0, gpu_bytes=[], host_bytes=[])
    wanted, began = load.at_once, time.monotonic()
    part = 0.0
    while part < 1 or asked:
        part = max((time.monotonic() - began) / seconds, row["requests"] / requests if requests else 0)
        if part >= len(row["gpu_bytes"]) / SAMPLES and part < 1:
            told(part)
            _sample(row)
        if rng.random() < 0.01:
            wanted = rng.randint(1, load.at_once)
        while part < 1 and len(asked) < wanted and rng.random() < 0.8:
            name = str(row["requests"])
            asked[name] = _request(rng, load, starts)
            engine.add_request(name, {"prompt_token_ids": asked[name].prompt}, _params(asked[name].tokens))
            row["requests"] += 1
        for out in engine.step():
            one = asked[out.request_id]
            one.said = list(out.outputs[0].token_ids)
            if out.finished:
                del asked[out.request_id]
                row["finished"] += 1
                row["new_tokens"] += len(one.said)
                row["cached_tokens"] += out.num_cached_tokens or 0
                place = len(done) if len(done) < load.kept else rng.randrange(row["finished"])
                if place < load.kept:
                    done[place : place + 1] = [dict(prompt=one.prompt, tokens=one.tokens, said=one.said, preempted=one.preempted)]
        over = [name for name, one in asked.items() if one.abort_at is not None and len(one.said) >= one.abort_at]
        engine.abort_request(over)
        row["aborted"] += len(over)
        row["new_tokens"] += sum(len(asked.pop(name).said) for name in over)
        for name, request in scheduler.requests.items():
            if request.num_preemptions and name in asked:
                asked[name].preempted = True
    for _ in range(3):  # what is left of aborted requests
        engine.step()
    _sample(row)
    row["preempted"] = int(sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"))
    return row | dict(seconds=time.monotonic() - began, leaked_blocks=free - pool.get_num_free_blocks()), done


def ask_again(llm: Any, done: Sequence[Row], all_tokens: bool, told: Callable[[float], object]) -> Row:
    """Ask an engine for requests that were finished, one at a time. all_tokens: go on behind differences, with what was said before.
    Then for some at once, which shows what rounding alone does."""
    gaps: list[tuple[float, int, int]] = []  # with the request and the place
    others: list[float] = []
    alone: list[Any] = []
    tokens = differing = 0
    for i, one in enumerate(done):
        told(i / len(done))
        first, other = 0, done[i - 1]["said"]
        while first < one["tokens"]:
            prompt, left = one["prompt"] + one["said"][:first], one["said"][first:]
            (answer,) = _ask(llm, [(prompt, len(left))])
            if first == 0:
                alone.append(answer)
                if len(other) and other[0] != answer.token_ids[0]:
                    others.append(_gap(answer, 0, other[0]))
            at = _first_other(answer, left)
            tokens += len(left) if at is None else at + 1
            if at is None:
                break
            differing += first == 0
            gaps.append((_gap(answer, at, left[at]), i, first + at))
            first = first + at + 1 if all_tokens else one["tokens"]
    together: list[float] = []
    for i in range(0, len(done), TOGETHER):
        answers = _ask(llm, [(one["prompt"], one["tokens"]) for one in done[i : i + TOGETHER]])
        for a, b in zip(alone[i:], answers, strict=False):
            if (at := _first_other(a, b.token_ids)) is not None:
                together.append(_gap(a, at, b.token_ids[at]))
    gaps.sort(reverse=True)
    found = dict(checked=len(done), tokens=tokens, differing=differing, gaps=[gap for gap, _, _ in gaps], others=_middle(others))
    worst = [dict(at=at, prompt=done[i]["prompt"], said=done[i]["said"]) for _, i, at in gaps[:1]]
    return found | dict(together=sorted(together, reverse=True), worst=worst)


def _ask(llm: Any, asked: Sequence[tuple[list[int], int]]) -> list[Any]:
    """Answers to prompts, of so many tokens each."""
    found = llm.generate([{"prompt_token_ids": ids} for ids, _ in asked], [_params(n, LIKELIEST) for _, n in asked], use_tqdm=False)
    return [out.outputs[0] for out in found]


def _first_other(answer: Any, said: Sequence[int]) -> int | None:
    """Where an answer has another token than was said, or None."""
    return next((i for i, (a, b) in enumerate(zip(answer.token_ids, said, strict=True)) if a != b), None)


def _gap(answer: Any, at: int, token: int) -> float:
    """How much less likely a token is than the likeliest of an answer, in nats; at least, when it is not among those that are told."""
    known = {t: p.logprob for t, p in answer.logprobs[at].items()}
    return float(max(known.values()) - known.get(token, min(known.values())))


def _middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _request(rng: random.Random, load: Load, starts: Sequence[int]) -> Asked:
    tokens = rng.randint(1, load.new_tokens)
    length = rng.randint(1, load.longest - tokens)
    start = rng.choice(starts) if rng.random() < 0.7 else rng.randrange(len(load.ids) - load.longest)
    abort_at = rng.choice([0, rng.randrange(tokens)]) if rng.random() < load.aborted else None  # at 0 it waits, or is half computed
    return Asked(load.ids[start : start + length], tokens, abort_at)


def _params(tokens: int, logprobs: int | None = None) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=logprobs)


def _sample(row: Row) -> None:
    """Note the bytes of tensors on the GPU, and those of this process on the host."""
    import torch

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    row["gpu_bytes"].append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
    row["host_bytes"].append(pages * resource.getpagesize())


def main(task: Row, to: Path) -> None:
    """Do what a task says: churn, or ask again."""
    from vllm import LLM

    llm = LLM(model=task["model"], **task["arguments"])

    def told(part: float) -> None:
        print(f"{PART}{part:.3f}", flush=True)

    if "load" in task:
        row, done = churn(llm, Load(**task["load"]), task["seconds"], task["requests"], task["seed"], told)
        to.write_text(json.dumps(dict(row=row, done=done)))
    else:
        to.write_text(json.dumps(ask_again(llm, task["done"], task["all_tokens"], told)))


if __name__ == "__main__":
    source, found_file = map(Path, sys.argv[1:])
    main(json.loads(source.read_text("utf-8")), found_file)
