"""The profile of a served model, and the part of it that belongs to the heads of this process.

Weights of a server are fused and divided, so that a fingerprint cannot be taken of them: sizes are compared instead, and whose profile
it is remains the user's to know.
"""

from functools import cache
from typing import Any

from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from kvstack.errors import ArtefactError
from kvstack.profile import Profile
from kvstack.vllm.settings import Settings


def profile_of(settings: Settings, model: Any) -> Profile | None:
    """The profile that is asked for, None for none. model: vLLM's ModelConfig. Raises ArtefactError when it is of another size."""
    if settings.profile is None:
        return None
    found = _load(settings.profile)
    sizes = model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size()
    if tuple(found.key_centre.shape) != sizes:
        raise ArtefactError(
            f"{settings.profile} is of a model with (layers, KV heads, head size) {tuple(found.key_centre.shape)}, and this one has "
            f"{sizes}. Calibrate one on your model."
        )
    return found


def own_heads(x: Tensor, heads: int) -> Tensor:
    """Of `x [all heads, ...]` the `heads` that this process has; where there are more processes than heads, neighbours share one."""
    start = get_tensor_model_parallel_rank() * len(x) // get_tensor_model_parallel_world_size()
    return x[start : start + heads]


_load = cache(Profile.load)  # every layer asks
