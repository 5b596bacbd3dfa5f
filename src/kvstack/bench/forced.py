"""Make an engine of vLLM say given tokens, so that it tells how likely it finds each of them after those before it.

Tokens are said one at a time as any others are, and decode steps store them; in a prompt they would be a chunk, which sees its own
tokens exact. On GPUs vLLM has this itself (`enable_trace_replay`); on CPUs its model runner has not, and a logits processor does it.
Log-probabilities are those before it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

SAID = "kvstack_said"


def arguments() -> dict[str, Any]:
    """What `vllm.LLM` needs to know."""
    return dict(enable_trace_replay=True) if torch.cuda.is_available() else dict(logits_processors=[f"{__name__}:Forced"])


def parameters(said: Sequence[int]) -> SamplingParams:
    """Of a request that says these tokens, with the log-probability of each and of the likeliest."""
    how: dict[str, Any] = dict(trace_decode_token_ids=list(said)) if torch.cuda.is_available() else dict(extra_args={SAID: list(said)})
    return SamplingParams(max_tokens=len(said), temperature=0, ignore_eos=True, detokenize=False, logprobs=1, **how)


class Forced(LogitsProcessor):  # type: ignore[misc]
    """Leaves a request no token but the next of those it is to say."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, tuple[list[int], list[int]]] = {}  # of a batch: what is to be said, and what was

    def is_argmax_invariant(self) -> bool:
        """See vLLM: it changes which token is the likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """See vLLM: which requests came, went and moved."""
        process_dict_updates(
            self.rows, batch_update, lambda asked, _, said: (asked.extra_args[SAID], said) if asked.extra_args else None
        )

    def apply(self, logits: Tensor) -> Tensor:
        """`logits [rows, vocabulary]`, changed in place."""
        for row, (tokens, said) in self.rows.items():
            logits[row] = -torch.inf
            logits[row, tokens[len(said)]] = 0
        return logits
