"""One engine of vLLM under churn, or saying answers again, in a process of its own:
`python -m kvstack.bench.churn_engine TASK.json FOUND.json`.

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
                    done[place : place + 1] = [dict(prompt=one.prompt, said=one.said, preempted=one.preempted)]
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


def say_again(llm: Any, done: Sequence[Row], told: Callable[[float], object]) -> Row:
    """Let an engine say what was said in requests that were finished, one at a time, and find how much less likely than its own choice
    each token is. Then the same for what it says itself, to some requests at once, whose prompts it has in its cache."""
    tokens = [one["said"] for one in done]

    def judged(said: Sequence[Sequence[int]], part: float) -> list[list[float]]:
        out = []
        for i, one in enumerate(done):
            told(part + i / len(done) / 3)
            out.append(_gaps(llm, one["prompt"], said[i]))
        return out

    found = judged(tokens, 0)
    others = [  # its first one instead
        _gaps(llm, one["prompt"], other[:1])[0]
        for one, other in zip(done, tokens[-1:] + tokens[:-1], strict=True)
        if other[0] != one["said"][0]
    ]
    own: list[Sequence[int]] = []
    for i in range(0, len(done), TOGETHER):
        told(1 / 3 + i / len(done) / 3)
        some = done[i : i + TOGETHER]
        _forget(llm)
        _said(llm, some, 1)
        own += _said(llm, some)
    control = judged(own, 2 / 3)
    at = max(((gap, i, place) for i, gaps in enumerate(found) for place, gap in enumerate(gaps)), default=(0, 0, 0))
    return dict(
        checked=len(done), tokens=sum(map(len, found)), differing=sum(any(gaps) for gaps in found), gaps=_sorted(found),
        together=_sorted(control), others=statistics.median(others) if others else None,
        worst=[dict(at=at[2], prompt=done[at[1]]["prompt"], said=tokens[at[1]])] if at[0] else [],
    )  # fmt: skip


def _gaps(llm: Any, prompt: Sequence[int], said: Sequence[int]) -> list[float]:
    """How much less likely than the likeliest each token is that an engine is made to say, in nats. The prompt is computed anew."""
    from kvstack.bench.forced import parameters

    _forget(llm)
    (answer,) = llm.generate([{"prompt_token_ids": list(prompt)}], parameters(said), use_tqdm=False)
    assert list(answer.outputs[0].token_ids) == list(said), "the engine said something else"
    steps = zip(said, answer.outputs[0].logprobs, strict=True)
    return [float(max(p.logprob for p in step.values()) - step[token].logprob) for token, step in steps]


def _forget(llm: Any) -> None:
    """Empty the cache of prefixes, once nothing is left of the last request."""
    for _ in range(4):
        if llm.reset_prefix_cache():
            return
        llm.llm_engine.step()
    raise AssertionError("a finished request still has blocks")


def _said(llm: Any, asked: Sequence[Row], tokens: int | None = None) -> list[Sequence[int]]:
    """Answers of an engine that is asked at once, of so many tokens, or of as many as were said."""
    how = [_params(tokens or len(one["said"])) for one in asked]
    found = llm.generate([{"prompt_token_ids": one["prompt"]} for one in asked], how, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in found]


def _sorted(gaps: Sequence[Sequence[float]]) -> list[float]:
    """Those of tokens that are not the likeliest, the greatest first."""
    return sorted((gap for some in gaps for gap in some if gap > 0), reverse=True)


def _request(rng: random.Random, load: Load, starts: Sequence[int]) -> Asked:
    tokens = rng.randint(1, load.new_tokens)
    length = rng.randint(1, load.longest - tokens)
    start = rng.choice(starts) if rng.random() < 0.7 else rng.randrange(len(load.ids) - load.longest)
    abort_at = rng.choice([0, rng.randrange(tokens)]) if rng.random() < load.aborted else None  # at 0 it waits, or is half computed
    return Asked(load.ids[start : start + length], tokens, abort_at)


def _params(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)


def _sample(row: Row) -> None:
    """Note the bytes of tensors on the GPU, and those of this process on the host."""
    import torch

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    row["gpu_bytes"].append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
    row["host_bytes"].append(pages * resource.getpagesize())


def main(task: Row, to: Path) -> None:
    """Do what a task says: churn, or say again."""
    from vllm import LLM

    from kvstack.bench import forced, random_weights  # noqa: F401, the latter is a load format

    again = "load" not in task
    llm = LLM(model=task["model"], **task["arguments"], **(forced.arguments() if again else {}))

    def told(part: float) -> None:
        print(f"{PART}{part:.3f}", flush=True)

    if again:
        to.write_text(json.dumps(say_again(llm, task["done"], told)))
    else:
        row, done = churn(llm, Load(**task["load"]), task["seconds"], task["requests"], task["seed"], told)
        to.write_text(json.dumps(dict(row=row, done=done)))


if __name__ == "__main__":
    source, found_file = map(Path, sys.argv[1:])
    main(json.loads(source.read_text("utf-8")), found_file)
