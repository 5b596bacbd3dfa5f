"""Engines of vLLM in this process, for the tests of this folder: one at a time, with small caches, and what transformers says beside
it."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
}  # fmt: skip

from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.attention import selector

from kvstack.lab.registry import bundled_model

MODEL = str(bundled_model())
SPACE = 2**27  # bytes of a cache
WINDOW = 100
KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * 2  # layers of `windowed_model`


@contextmanager
def engine(asked: Any, model: str = MODEL, **arguments: Any) -> Iterator[LLM]:
    """An engine with what KVSTACK_RECIPE can hold, or none."""
    selector._cached_get_attn_backend.cache_clear()  # a process has one engine, else
    before = os.environ.pop("KVSTACK_RECIPE", None)
    if asked is not None:
        os.environ["KVSTACK_RECIPE"] = asked if isinstance(asked, str) else json.dumps(asked)
    plain = dict(
        dtype="float32", max_model_len=1024, max_num_seqs=8, enforce_eager=True, kv_cache_memory_bytes=SPACE, disable_log_stats=True
    )
    llm = None
    try:
        llm = LLM(model, **plain | arguments)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        os.environ.pop("KVSTACK_RECIPE", None)
        if before is not None:
            os.environ["KVSTACK_RECIPE"] = before


def greedy(tokens: int) -> SamplingParams:
    """So many of the likeliest tokens, whatever they are."""
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)


def generated(llm: LLM, prompts: Sequence[Any], tokens: int) -> list[list[int]]:
    """The new tokens of every prompt."""
    return [list(o.outputs[0].token_ids) for o in llm.generate(list(prompts), greedy(tokens), use_tqdm=False)]


def transformers_model() -> Any:
    """The model of the tests, in float32."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def alone(model: Any, ids: Sequence[int], tokens: int, cache: Any = None) -> list[int]:
    """The new tokens that transformers generates for one prompt."""
    x = torch.tensor([list(ids)])
    mask = torch.ones_like(x)
    out = model.generate(x, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None, past_key_values=cache)
    return [int(t) for t in out[0, x.shape[1] :]]


def windowed_model(kinds: Sequence[str]) -> Any:
    """A small model with random weights, whose layers are of these kinds. Norms make so much of what attention finds that it does not
    say one token again and again."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=len(kinds), layer_types=list(kinds),
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, sliding_window=WINDOW, max_position_embeddings=1024,
        query_pre_attn_scalar=4, initializer_range=0.3,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    for layer in model.model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            torch.nn.init.constant_(norm.weight, 5.0)
    return model


def less_likely(model: Any, cache: Any, ids: Sequence[int], said: Sequence[int]) -> tuple[float, int]:
    """How much less likely transformers with a cache finds the first token of `said` that it would not say itself, in nats, 0 when
    there is none; and how many different tokens it says."""
    x = torch.tensor([list(ids)], device=model.device)
    out = model.generate(
        x, attention_mask=torch.ones_like(x), max_new_tokens=len(said), do_sample=False, eos_token_id=None, output_logits=True,
        past_key_values=cache, return_dict_in_generate=True,
    )  # fmt: skip
    own = out.sequences[0, len(ids) :].tolist()
    first = next((i for i, (a, b) in enumerate(zip(said, own, strict=True)) if a != b), None)
    if first is None:
        return 0.0, len(set(own))
    logits = out.logits[first][0]
    assert logits.max() - logits.median() > 2, "all tokens are as likely, so nothing is known"
    return float(logits.max() - logits[said[first]]), len(set(own))


def copy_of(model: str, to: Path, asked: dict[str, Any]) -> str:
    """A copy of a model's folder with a `kvstack.json`."""
    shutil.copytree(model, to)
    (to / "kvstack.json").write_text(json.dumps(asked))
    return str(to)
