"""Why a model's decode steps run eagerly, as they do in transformers: one line, or None where graphs can be tried."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kascade_cli.models import text_config, unwrap

# Positions that are counted on the host, in every step.
_HOST_ROPE = ("dynamic", "longrope")
_NEEDED = ("attention_mask", "position_ids", "past_key_values")


def why_not_here(device: torch.device) -> str | None:
    """Of the machine."""
    return None if device.type == "cuda" else f"the model is on {device.type}, and CUDA graphs need a GPU"


def why_not(model: nn.Module, attachment: Any) -> str | None:
    """Of a model and what it runs under."""
    plain = unwrap(model)
    if attachment is None:
        return "nothing is attached"
    if attachment.partition is not None:
        return "its heads are spread over processes"
    memory = attachment.memory
    if memory is not None and not hasattr(memory, "kinds"):
        return f"strategy {attachment.strategy.name} carries a state from step to step that graphs do not know"
    if len({parameter.device for parameter in plain.parameters()}) > 1:
        return "it is spread over several devices"
    taken = inspect.signature(type(plain).forward).parameters
    missing = [name for name in _NEEDED if name not in taken]
    if missing:
        return f"{type(plain).__name__} takes no {missing[0]}"
    config = text_config(plain)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind in _HOST_ROPE:
        return f"its rotary embedding ({kind}) depends on a length that the host must know"
    return why_not_cache(DynamicCache(config=config), attachment.strategy.layers)


def why_not_cache(cache: Any, layers: Any = None) -> str | None:
    """Of a cache: it must be keys and values of full attention in every layer, and nothing else.

    A layer of another kind says so with `only_keys_and_values`. layers: those that the strategy attends to.
    """
    if type(cache) is not DynamicCache:
        return f"its cache is a {type(cache).__name__}"
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "is_sliding", False):
            return f"layer {index} keeps a sliding window of its keys"
        if type(layer) is not DynamicLayer and not getattr(layer, "only_keys_and_values", False):
            return f"layer {index} keeps more than keys and values ({type(layer).__name__})"
        if layers is not None and index not in layers:
            return f"layer {index} attends in its own way"
    return None
