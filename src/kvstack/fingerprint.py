"""The fingerprint of a model: a short name of its weights, by which artefacts know whom they belong to.

It is a hash over the model type, how its RoPE turns and, of every parameter, the name, the shape and up to 64 values spread over it,
rounded to bfloat16. So a checkpoint has one fingerprint on every device and whether it is loaded in its own type, float32 or bfloat16;
one that is *converted* to float16 rounds twice and is another. It is no proof of integrity: two models that differ in a few weights
only may share it.
"""

import hashlib
import json
from typing import Any

import torch

SAMPLES = 64


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """Sixteen hexadecimal digits that name the weights of `model`."""
    config = model.config.get_text_config()
    digest = hashlib.sha256(json.dumps([config.model_type, _rope(getattr(config, "rope_parameters", None))], sort_keys=True).encode())
    for name, p in model.named_parameters():
        flat = p.detach().flatten()
        at = torch.linspace(0, max(0, flat.numel() - 1), min(SAMPLES, flat.numel()), dtype=torch.float64, device=flat.device)
        values = flat[at.long()].to(torch.bfloat16).cpu()
        digest.update(json.dumps([name, list(p.shape)]).encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _rope(parameters: Any) -> Any:
    """What of RoPE's parameters decides how keys are turned; nested where layers differ."""
    if not isinstance(parameters, dict):
        return None
    nested = {name: _rope(value) for name, value in parameters.items() if isinstance(value, dict)}
    return nested | {name: parameters.get(name) for name in ("rope_type", "rope_theta", "factor") if not nested}
