"""The public names and the options of the commands: changing one is a decision, not an accident."""

import inspect
from importlib import import_module
from typing import Any

import pytest

import kvstack
from kvstack.cli.main import COMMANDS, LAB_COMMANDS
from kvstack.recipe import PRESETS, WORDS, Recipe

NAMES = {"ArtefactError", "BadInputError", "Cache", "KVStackError", "Profile", "Recipe", "RecipeError", "UnsupportedModelError"}
NAMES |= {"generate"}
SIGNATURES = {
    "generate": [
        "model", "input_ids", "attention_mask", "recipe", "max_new_tokens", "temperature", "top_p", "eos_token_id", "pad_token_id",
        "profile", "graph",
    ],
    "Cache": ["model", "recipe", "profile", "prefill"],
    "Profile": [
        "key_centre", "value_centre", "query_mean_real", "query_mean_imag", "query_norm", "rope_frequency", "fingerprint", "source",
        "tokens", "query_covariance", "forecast_hidden", "forecast_hidden_bias", "forecast_out", "forecast_out_bias", "forecast_fit",
    ],
    "Recipe": ["precision", "window", "sinks", "selection"],
}  # fmt: skip
CACHE = {"bf16_nbytes", "load", "model", "nbytes", "ratio", "report", "reset", "save"}
OPTIONS = {
    "demo": ["out"],
    "run": ["model", "prompt", "recipe", "max_new_tokens", "temperature", "profile", "save_cache", "as_json"],
    "compare": [
        "model", "recipes", "budgets", "tasks", "task_options", "length", "text", "text_sequences", "samples", "batch", "seed",
        "profile", "profile_for", "ratio_at", "against", "workers", "json_out", "plot",
    ],
    "calibrate": [
        "model", "out", "data", "tokens", "length", "covariance", "forecast", "tasks", "task_options", "samples", "upstream",
        "from_upstream",
    ],
    "convert": [
        "model", "rank", "corpus_file", "out", "to", "tokens", "compare", "distil_tokens", "distil_batch", "lr", "json_out",
    ],
    "inspect": ["profile", "plot", "layer", "as_json"],
    "qjl": ["model", "length", "text_sequences", "task_samples", "seeds", "out", "no_model", "as_json"],
    "serve": ["model", "recipe", "profile", "arguments"],
    "doctor": ["as_json"],
    "corpus": ["out", "max_bytes"],
    "pretrain": [
        "out", "attention", "corpus_file", "tokens", "batch", "optimizer", "matrix_lr", "other_lr", "per_head", "seed", "data_seed",
        "parallel", "checkpointing", "resume", "stop", "small_run",
    ],
    "architectures": ["runs", "json_out", "plot"],
    "rates": ["runs", "json_out"],
    "train": ["out", "small_model", "attention", "minutes", "seed", "muon_lr", "adam_lr", "resume"],
    "eval": ["model", "lengths", "samples", "text_sequences", "json_out", "card"],
}  # fmt: skip
SELECTION = ["budget", "interval", "heads", "prompt"]
WORDS_AND_FIELDS = {
    "bf16": ["dtype"], "fp16": ["dtype"], "exact": ["dtype"], "fp8": [],
    "polar#": ["k", "v", "scale", "codebook", "search", "centre", "seed"],
    "k#v#": ["k", "v", "scale", "codebook", "search", "centre", "seed"],
    "polar": ["k", "v", "scale", "codebook", "search", "centre", "seed"],
    "int#": ["bits"], "int": ["bits"], "kivi#": ["bits", "group"], "kivi": ["bits", "group"],
    "turboquant#": ["bits", "sketch", "seed"], "turboquant": ["bits", "sketch", "seed"], "turboquant_4bit_nc": [],
    "tri": SELECTION, "forecast": SELECTION, "streaming": SELECTION, "knorm": SELECTION, "keydiff": SELECTION, "h2o": SELECTION,
    "snapkv": [*SELECTION, "queries", "kernel", "pool"], "rkv": [*SELECTION, "queries", "kernel", "weight"],
    "expected": [*SELECTION, "future"], "random": [*SELECTION, "seed"], "oracle": SELECTION,
}  # fmt: skip


def parameters(f: Any) -> list[str]:
    return [name for name in inspect.signature(f).parameters if name != "self"]


def test_names() -> None:
    assert set(kvstack.__all__) == NAMES
    for name in NAMES:
        assert getattr(kvstack, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Cash'"):
        _ = kvstack.Cash


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    assert parameters(getattr(kvstack, name)) == SIGNATURES[name]


def test_what_a_cache_can_do_beyond_transformers() -> None:
    own = {name for name in vars(kvstack.Cache) if not name.startswith("_")}
    assert own == CACHE


@pytest.mark.parametrize("name", [*COMMANDS, *LAB_COMMANDS])
def test_options(name: str) -> None:
    module, _, function = {**COMMANDS, **LAB_COMMANDS}[name][0].partition(":")
    assert parameters(getattr(import_module(module), function)) == OPTIONS[name]


def test_words_of_recipes() -> None:
    assert {word: parameters(row.build) for word, row in WORDS.items()} == WORDS_AND_FIELDS
    assert set(PRESETS) == {"balanced", "max_quality", "max_context"}
    assert str(Recipe.parse("balanced")) == "polar4(window=128, sinks=4)"
