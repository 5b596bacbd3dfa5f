"""What vLLM calls when it loads plugins, once in every process and perhaps again: it registers, and changes nothing yet.

Whether a server uses kvstack is decided later and for each engine, by `choice`, which sees the configuration. A vLLM whose registry
looks otherwise than we know is refused when a recipe is set in the environment, and else a warning.
"""

import logging
import os

from kvstack.errors import KVStackError
from kvstack.vllm.settings import VARIABLE


def register() -> None:
    """Put our names into vLLM's registry of attention backends. Raises KVStackError when that cannot be done and a recipe is set."""
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        from kvstack.vllm import choice

        for name in choice.NAMES + choice.OTHERS:
            register_backend(AttentionBackendEnum[name], f"{choice.__name__}.{name}")
    except (ImportError, AttributeError, KeyError) as e:
        why = f"This vLLM has no registry that kvstack knows ({type(e).__name__}: {e}). Install vLLM 0.32."
        if os.environ.get(VARIABLE):
            raise KVStackError(f"{VARIABLE} is set. {why}") from e
        logging.getLogger("vllm.kvstack").warning("%s Whatever recipe is given elsewhere is not followed.", why)
