"""How long prompts may be that nobody gave a length for: what the machine captures in minutes."""

import os
from typing import Any

import torch

LONGEST_GPU, LONGEST_CPU, SHORTEST = 16384, 4096, 1024
# Of a dense forward pass in float32 on one core, as measured on several models; the capture adds a seventh.
_FLOPS_PER_CORE = 150e9
_SECONDS = 300.0


def affordable_length(model: Any, num_prompts: int, limit: int | None) -> int:
    """A power of two: 16k on a GPU; on a CPU what `num_prompts` prompts take in about five minutes, 1k to 4k.

    Never more than `limit`, the tokens that the model takes. Depends on the number of parameters and cores alone, so
    that a machine always gives the same.
    """
    if model.device.type == "cpu":
        parameters = sum(parameter.numel() for parameter in model.parameters())
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = min(cores, torch.get_num_threads())
        tokens = _SECONDS * _FLOPS_PER_CORE * cores / (2 * max(parameters, 1) * num_prompts)
        length = 1 << int(max(tokens, 1)).bit_length() - 1
        length = min(max(length, SHORTEST), LONGEST_CPU)
    else:
        length = LONGEST_GPU
    return length if limit is None else max(1, min(length, limit))
