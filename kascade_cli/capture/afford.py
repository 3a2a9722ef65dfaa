"""What the machine does in minutes, for a capture and a verification whose sizes nobody gave."""

import os
from typing import Any

import torch

LONGEST_GPU, LONGEST_CPU, SHORTEST = 16384, 4096, 1024
# Of a forward pass in float32 on one core, as measured on two models of 0.1 and 0.5 B parameters.
_FLOPS_PER_CORE = 80e9
_SECONDS = 300.0


def forward_seconds(model: Any, tokens: int) -> float:
    """Seconds that a forward pass of `tokens` tokens takes on this machine's cores, estimated.

    From the number of parameters and cores alone, so that a machine always gives the same.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 * max(parameters, 1) * tokens / (_FLOPS_PER_CORE * min(cores, torch.get_num_threads()))


def affordable_length(model: Any, num_prompts: int, limit: int | None) -> int:
    """A power of two: 16k on a GPU; on a CPU what `num_prompts` prompts take in about five minutes, 1k to 4k.

    Never more than `limit`, the tokens that the model takes.
    """
    if model.device.type == "cpu":
        tokens = _SECONDS / forward_seconds(model, num_prompts)
        length = 1 << int(max(tokens, 1)).bit_length() - 1
        length = min(max(length, SHORTEST), LONGEST_CPU)
    else:
        length = LONGEST_GPU
    return length if limit is None else max(1, min(length, limit))
