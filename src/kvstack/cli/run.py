"""`kvstack run`: generate text with a compressed cache, and say what the cache cost.

On a GPU `kvstack.generate` does it where it can (which way was taken, and why, is said); else the model's own `generate`, which prints
the text as it is made. The text goes to standard output, the table about the cache to standard error, so that either can be kept
apart. With `--json` there is one object on standard output and nothing else. Prompts are given to the model as they are: no chat
template.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import TextStreamer

from kvstack import artefact
from kvstack.errors import BadInputError
from kvstack.hf import models
from kvstack.hf.cache import Cache
from kvstack.hf.generate import generate
from kvstack.hf.static import obstacle
from kvstack.lab.registry import load, load_profile
from kvstack.profile import Profile
from kvstack.recipe import Recipe

EXAMPLES = """
kvstack run bundled --prompt "def main():"
kvstack run bundled --recipe k4v2 --prompt - < long.txt
kvstack run Qwen/Qwen3-0.6B --recipe "polar4(window=128, sinks=4)" --prompt "Once" --json
"""


def run(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name, or `bundled`.")],
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads it from standard input.")],
    recipe: Annotated[str, typer.Option(help="A recipe, a preset, or a .yaml file with one.")] = "balanced",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token; above, tokens are drawn.")] = 0,
    profile: Annotated[Path | None, typer.Option(help="A calibrated profile of this model.")] = None,
    save_cache: Annotated[Path | None, typer.Option(help="Write the compressed cache to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text and table.")] = False,
) -> None:
    """Generate text with a compressed cache, and say what the cache cost."""
    stack = Recipe.load(recipe) if recipe.endswith((".yaml", ".yml")) else Recipe.parse(recipe)
    if save_cache:
        artefact.check_folder(save_cache.parent)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise BadInputError("The prompt is empty. Give some text to continue.")
    lm, tokenizer = load(model)
    calibrated = Profile.load(profile) if profile else load_profile(model)
    inputs = tokenizer(text, return_tensors="pt").to(lm.device)
    used = inputs["input_ids"].shape[1]
    remedy = f"The prompt has {used}. Shorten it or lower --max-new-tokens."
    models.check_context(lm, used + max_new_tokens, remedy)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ends = lm.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    why = _no_graph(lm, stack, calibrated, save_cache)
    start = time.perf_counter()
    if why is None:
        out = generate(
            lm,
            inputs["input_ids"],
            recipe=stack,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_token_id=ends,
            pad_token_id=pad,
            profile=calibrated,
        )
        new, seconds = out.tokens[0], time.perf_counter() - start
        at = torch.isin(new, torch.tensor(ends or [], device=new.device)).nonzero()
        new = new[: int(at[0]) + 1] if len(at) else new
        nbytes, ratio, path = out.nbytes, out.ratio, f"a CUDA graph per token, {out.path}"
    else:
        cache = Cache(lm, stack, profile=calibrated)
        sequence = lm.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            streamer=None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            pad_token_id=pad,
            **({"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}),
        )[0]
        new, seconds = sequence[used:], time.perf_counter() - start
        nbytes, ratio, path = cache.nbytes, cache.ratio, f"the model's own generate: {why}"
        if save_cache:
            cache.save(save_cache)
    found = {
        "model": model,
        "recipe": str(stack),
        "prompt_tokens": used,
        "new_tokens": len(new),
        "seconds": round(seconds, 3),
        "cache_bytes": nbytes,
        "ratio": ratio,
        "path": path,
    }
    answer = tokenizer.decode(new, skip_special_tokens=True)
    if why is None and not as_json:
        typer.echo(answer)
    if as_json:
        typer.echo(json.dumps({**found, "text": answer}, indent=1))
    else:
        Console(stderr=True).print(_table(found))


def _no_graph(model: Any, recipe: Recipe, profile: Profile | None, save_cache: Path | None) -> str | None:
    """Why `kvstack.generate` is not for this; None when it is."""
    if model.device.type != "cuda":
        return "the model is not on a GPU"
    return "the cache shall be saved" if save_cache else obstacle(model, recipe, profile)


def _table(found: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    said = {**found, "cache_bytes": f"{found['cache_bytes']:,}", "ratio": f"{found['ratio']:.2f}x smaller than bf16"}
    for name, value in said.items():
        table.add_row(name.replace("_", " "), str(value))
    return table
