"""What identifies a model: its configuration and a sample of its weights."""

import hashlib
import json

import torch
from torch import nn

from kascade_cli.models.tree import text_config


def fingerprint(model: nn.Module) -> str:
    """`sha256:...` over the attention geometry and a sample of the weights, the same on every device and dtype.

    The sample is the first 256 elements of every parameter in bfloat16 (so that a checkpoint loaded in float32 or
    bfloat16 has one fingerprint).
    """
    config = text_config(model)
    essentials = {
        key: getattr(config, key, None)
        for key in (
            "model_type",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "hidden_size",
        )
    }
    digest = hashlib.sha256(json.dumps(essentials, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        sample = parameter.detach().reshape(-1)[:256].to("cpu", torch.float32).to(torch.bfloat16)
        digest.update(name.encode())
        digest.update(str(tuple(parameter.shape)).encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
