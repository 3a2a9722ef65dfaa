"""Tokens behind a cache, for models whose cache does not count them."""

import functools
import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kascade_cli.models import logits_at, text_config, unwrap


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


_CONTINUES: "weakref.WeakKeyDictionary[nn.Module, dict[str, bool]]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def continues_in_chunks(model: nn.Module) -> bool:
    """Whether several tokens behind a cache give what they give in one pass.

    Jamba's recurrent layers (transformers 5.23) take up their state only for one token at a time, and say nothing.
    Asked once of models that have such layers, with eight tokens; anew for another attention implementation (MiniMax'
    own mask is wrong there, ours is not).
    """
    model = unwrap(model)
    known, attention = _CONTINUES.setdefault(model, {}), text_config(model)._attn_implementation
    if attention not in known:
        known[attention] = not _recurrent(model) or _measured(model)
    return known[attention]


def _recurrent(model: nn.Module) -> bool:
    layers = DynamicCache(config=text_config(model)).layers
    return any(not isinstance(layer, DynamicLayer) or hasattr(layer, "conv_states") for layer in layers)


def _measured(model: nn.Module) -> bool:
    ids = torch.arange(8, device=model.device)[None] % text_config(model).vocab_size
    whole = logits_behind(model, ids, None, 0, 4)[0]
    _, output = logits_behind(model, ids[:, :4], None, 0)
    parts = logits_behind(model, ids[:, 4:], output.past_key_values, 4, 4)[0]
    return bool((parts - whole).abs().max() <= 0.1 * whole.std())
