"""An engine of vLLM under churn: requests of any length come at any time, share prefixes, are aborted, and are more than there is room
for.

Afterwards nothing may be left behind, and no token may be wrong. Blocks and memory are counted; and of the requests that were finished
some are asked again, one at a time, of an engine that has done nothing else. Where both say other tokens for the first time, the second
engine must have found the first one's token about as likely as its own: batches, chunks and prefixes round differently, but a page that
is not where it should be does not say something nearly as good.

    {seconds, requests, finished, aborted, preempted, new_tokens, cached_tokens, checked, differing, worst_gap, leaked_blocks,
    grown_bytes}

Everything runs in this process, because requests must be aborted between two steps (VLLM_ENABLE_V1_MULTIPROCESSING=0).
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """ids: tokens of a text that prompts are parts of. shared: prefixes of many. longest: tokens of a request. at_once: requests that
    are wanted in the engine. aborted: the part of them that does not end."""

    ids: list[int]
    shared: int = 4
    longest: int = 900
    at_once: int = 12
    aborted: float = 0.15
    new_tokens: int = 120


@dataclass
class Asked:
    """A request. abort_at: after how many new tokens it is aborted, None for never. said: its tokens, once it is finished."""

    prompt: list[int]
    tokens: int
    abort_at: int | None
    said: list[int] | None = None


def churn(llm: Any, load: Load, seconds: float, seed: int, told: Callable[[float], object] = lambda _: None) -> tuple[Row, list[Asked]]:
    """Keep an engine busy for `seconds`, and let it finish. Returns what happened, and the requests that were finished."""
    rng, engine = random.Random(seed), llm.llm_engine
    pool = _scheduler(llm).kv_cache_manager.block_pool
    free, held = pool.get_num_free_blocks(), _allocated()
    starts = [rng.randrange(len(load.ids) - load.longest) for _ in range(load.shared)]
    asked: dict[str, Asked] = {}
    running: dict[str, int] = {}
    done: list[Asked] = []
    row: Row = dict(requests=0, finished=0, aborted=0, preempted=0, new_tokens=0, cached_tokens=0)
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds or running:
        told(min(passed, seconds))
        while passed < seconds and len(running) < load.at_once and (not running or rng.random() < 0.5):
            name = str(row["requests"])
            asked[name] = _request(rng, load, starts)
            running[name] = 0
            engine.add_request(name, {"prompt_token_ids": asked[name].prompt}, _params(asked[name].tokens))
            row["requests"] += 1
        for out in engine.step():
            running[out.request_id] = len(out.outputs[0].token_ids)
            if out.finished:
                one = asked.pop(out.request_id)
                one.said = list(out.outputs[0].token_ids)
                done.append(one)
                row["finished"] += 1
                row["new_tokens"] += running.pop(out.request_id)
                row["cached_tokens"] += out.num_cached_tokens or 0
        over = [name for name, n in running.items() if (at := asked[name].abort_at) is not None and n >= at]
        if over:
            engine.abort_request(over)
            row["aborted"] += len(over)
        for name in over:
            row["new_tokens"] += running.pop(name)
            del asked[name]
    for _ in range(3):  # what is left of aborted requests
        engine.step()
    preempted = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    row |= dict(
        preempted=int(sum(preempted)), seconds=time.monotonic() - began,
        leaked_blocks=free - pool.get_num_free_blocks(), grown_bytes=_allocated() - held,
    )  # fmt: skip
    return row, done


def compare(llm: Any, done: list[Asked], most: int, seed: int) -> Row:
    """Ask an engine that has done nothing else for some of the finished requests. worst_gap: nats between its own token and what was
    said, at the first difference, the largest of all."""
    some = random.Random(seed).sample(done, min(most, len(done)))
    gaps = []
    for one in some:
        (out,) = llm.generate([{"prompt_token_ids": one.prompt}], _params(one.tokens, 20), use_tqdm=False)
        said = out.outputs[0]
        assert one.said is not None
        first = next((i for i, (a, b) in enumerate(zip(one.said, said.token_ids, strict=True)) if a != b), None)
        if first is not None:
            likely = {token: p.logprob for token, p in said.logprobs[first].items()}
            least = min(likely.values())
            gaps.append(max(likely.values()) - likely.get(one.said[first], least - 1))
    return dict(checked=len(some), differing=len(gaps), worst_gap=max(gaps, default=0.0))


def _request(rng: random.Random, load: Load, starts: list[int]) -> Asked:
    tokens = rng.randint(1, load.new_tokens)
    length = rng.randint(1, load.longest - tokens)
    start = rng.choice(starts) if rng.random() < 0.7 else rng.randrange(len(load.ids) - load.longest)
    abort_at = rng.randint(0, tokens - 1) if rng.random() < load.aborted else None
    return Asked(load.ids[start : start + length], tokens, abort_at)


def _params(tokens: int, logprobs: int | None = None) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=logprobs)


def _scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def _allocated() -> int:
    """Bytes of tensors on the GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
