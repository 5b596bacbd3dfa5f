"""Engines on a GPU, with its kernels and CUDA graphs: they say what the transformers cache says, or what that finds nearly as likely,
since every kernel rounds otherwise in bf16."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import KINDS, MODEL, engine, generated, less_likely, windowed_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from triton.runtime.jit import JITFunction

import kvstack
from kvstack.lab.registry import load_profile
from kvstack.vllm.backend import Backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SOURCE = Path(kvstack.__file__).with_name("recipe.py").read_text("utf-8")
NEARLY = 0.5  # nats; tokens that say something else are several away
SHARED: dict[str, Any] = {"dtype": "bfloat16", "gpu_memory_utilization": 0.1}  # the GPU may have other work


def prompts(ids: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": x} for x in ids]


def our_kernels() -> list[Any]:
    """Those that were imported, each once."""
    ours = [m for name, m in sys.modules.items() if name.startswith("kvstack.kernels.")]
    return [x for m in ours for x in vars(m).values() if isinstance(x, JITFunction) and x.module == m.__name__]


def compiled() -> dict[str, int]:
    """How many variants of each kernel there are."""
    return {f"{x.module}.{x.__name__}": sum(len(cache[0]) for cache in x.device_caches.values()) for x in our_kernels()}


@pytest.mark.parametrize("recipe", ["polar4", "k4v2", "fp8", "tri(256)+polar4"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_tokens_are_those_of_the_transformers_cache_or_nearly_as_likely(recipe: str, eager: bool) -> None:
    """Also when evictions came in between, some in the prompt."""
    tok, tokens = AutoTokenizer.from_pretrained(MODEL), 300 if "tri" in recipe else 80
    # 896 tokens, from which both evict in the prompt, and fewer than the 384 at which both begin to.
    ids = [tok(text)["input_ids"][:896] for text in (SOURCE[:900], SOURCE[:4000], "def main(", SOURCE[2000:2600])]
    assert [len(x) for x in ids if len(x) >= 384] == [896]
    asked = {"recipe": recipe, "profile": f"{MODEL}/profile/profile.safetensors"}
    with engine(asked, **SHARED, enforce_eager=eager, enable_prefix_caching=False, max_model_len=2048) as llm:
        found = generated(llm, prompts(ids), tokens)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval().cuda()
    for x, said in zip(ids, found, strict=True):
        gap, _ = less_likely(model, kvstack.Cache(model, recipe, profile=load_profile("bundled")), x, said)
        assert gap < NEARLY


@pytest.mark.parametrize("recipe", ["exact", "fp8", "polar4"])
def test_a_model_with_sliding_windows(recipe: str, tmp_path: Path) -> None:
    """Of which every layer with a window has the attention that vLLM chose for it, in pages as large as ours. Its weights are random,
    and rounding alone moves its logits by one, so what it says only has to be likelier than what it says to other prompts."""
    model = windowed_model(KINDS)
    model.save_pretrained(tmp_path)
    draw = torch.Generator().manual_seed(0)
    ids = [[int(x) for x in torch.randint(3, 512, (n,), generator=draw)] for n in (300, 40, 130)]
    with engine(recipe, str(tmp_path), **SHARED, skip_tokenizer_init=True, enforce_eager=False) as llm:
        layers: list[Any] = list(llm.llm_engine.vllm_config.compilation_config.static_forward_context.values())
        assert [issubclass(layer.attn_backend, Backend) for layer in layers] == [kind == "full_attention" for kind in KINDS]
        ours, others = layers[2].kv_cache, layers[0].kv_cache
        assert ours.shape[0] == others.shape[0] and ours[0].is_contiguous()
        found = generated(llm, prompts(ids), 40)
    model = model.to(torch.bfloat16).cuda()
    gaps, wrong = (
        [less_likely(model, kvstack.Cache(model, recipe), x, found[i - shift])[0] for i, x in enumerate(ids)] for shift in (0, 1)
    )
    assert max(gaps) < 0.75 * min(wrong), (gaps, wrong)


@pytest.mark.parametrize("recipe", ["polar4", "fp8"])
def test_no_request_waits_for_a_compiler(recipe: str) -> None:
    """Short prompts and long ones, whole and in chunks, with and without a cached prefix, beside others that decode."""
    for kernel in our_kernels():
        kernel.device_caches.clear()  # of other tests
    draw = torch.Generator().manual_seed(0)
    ids = [[int(x) for x in torch.randint(3, 512, (n,), generator=draw)] for n in (1, 5, 17, 40, 128, 300, 900, 1500)]
    with engine(recipe, **SHARED, enforce_eager=False, max_model_len=2048, max_num_batched_tokens=256) as llm:
        ready = compiled()
        for _ in range(2):
            generated(llm, prompts(ids), 40)
        assert compiled() == ready and any(ready.values())
