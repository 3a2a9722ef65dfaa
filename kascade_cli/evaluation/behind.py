"""Tokens behind a cache, for models whose cache does not count them."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from kascade_cli.models import logits_at, unwrap


@functools.cache
def _takes_position_ids(kind: type[nn.Module]) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters


def logits_behind(model: nn.Module, ids: Tensor, cache: Any, seen: int, at: Any = 1) -> tuple[Tensor, Any]:
    """`logits_at` for ids [B, T] behind the `seen` tokens of `cache` (None: a new one), positions told as `generate`
    does: MiniMax would count them from 0 again, as its first layer keeps no keys."""
    options = {}
    if seen and _takes_position_ids(type(unwrap(model))):
        options["position_ids"] = torch.arange(seen, seen + ids.shape[1], device=ids.device).expand(len(ids), -1)
    return logits_at(model, ids, at, past_key_values=cache, use_cache=True, **options)
