"""Speculative decoding: steps of four tokens a row, of which some are rejected and written over by the next.

This file is also the program of the engine's process. vLLM's n-gram drafts load numba, and where that is loaded no other engine starts
on a CPU, since a scan of vLLM over all modules (`triton_utils.dispatcher`) stumbles over llvmlite.
"""

import json
import subprocess
import sys
from pathlib import Path

from engines import MODEL, alone, engine, generated, transformers_model
from transformers import AutoTokenizer

import kvstack

TOKENS = 24


def prompts() -> list[list[int]]:
    """Source code, which says things again."""
    source, tok = Path(kvstack.__file__).with_name("recipe.py").read_text("utf-8"), AutoTokenizer.from_pretrained(MODEL)
    return [tok(text)["input_ids"] for text in (source[:900], source[2000:2600])]


def main() -> None:
    """Print what the engine says, and how many drafts it accepted and made."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine("exact", speculative_config=drafts, enable_prefix_caching=False, disable_log_stats=False) as llm:
        said = generated(llm, [{"prompt_token_ids": ids} for ids in prompts()], TOKENS)
        metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    counts = [metrics[f"vllm:spec_decode_num_{what}_tokens"] for what in ("accepted", "draft")]
    print(json.dumps([said, *counts]), flush=True)


def test_drafts_that_are_rejected_leave_no_trace() -> None:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, accepted, drafted = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("[[")))
    model = transformers_model()
    assert said == [alone(model, ids, TOKENS) for ids in prompts()]
    assert 0 < accepted < drafted


if __name__ == "__main__":
    main()
