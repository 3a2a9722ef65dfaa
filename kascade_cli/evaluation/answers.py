"""Greedy answers to many questions about one context: the context is prefilled once, questions run as a batch.

The shared part of the context ends on a tile's edge, and the rest of it goes before every question. So each question
sees exactly the tiles that it would see alone, and its answer is that of `model.generate` on context + question.
Models that cannot go on behind a cache with several tokens (Jamba) read the context anew for every question.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kascade_cli.evaluation.behind import continues_in_chunks, logits_behind
from kascade_cli.integrations.transformers.decoding import decode_behind
from kascade_cli.models import logits_at

# Bytes of repeated cache held at a time, by device type.
_CACHE_BYTES = {"cpu": 1024**3, "cuda": 16 * 1024**3}


def cache_bytes(device: torch.device) -> int:
    """How much of a device's memory the caches of a batch may take."""
    return _CACHE_BYTES.get(device.type, _CACHE_BYTES["cpu"])


class SlotsLayer(DynamicLayer):
    """A cache layer that writes into slots allocated beforehand, where DynamicLayer would copy all keys each step."""

    only_keys_and_values = True

    def __init__(self, keys: Tensor, values: Tensor, filled: int):
        super().__init__()
        self.key_slots, self.value_slots = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._show(filled)

    def _show(self, filled: int) -> None:
        self.keys, self.values = self.key_slots[:, :, :filled], self.value_slots[:, :, :filled]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """key_states, value_states [B, G, T, D] go behind what is there; returns all keys and values so far."""
        begin = self.keys.shape[2]
        end = begin + key_states.shape[2]
        self.key_slots[:, :, begin:end] = key_states
        self.value_slots[:, :, begin:end] = value_states
        self._show(end)
        return self.keys, self.values


class Repeated:
    """A prefilled cache of one row, as caches of several rows with room for `extra` tokens each.

    Plain layers are repeated once and written over by each `take`; others (sliding windows, linear attention) are
    copied every time.
    """

    def __init__(self, cache: Any, rows: int, extra: int):
        self.cache, self.filled = cache, cache.get_seq_length()
        self.slots = [self._allocate(layer, rows, extra) for layer in cache.layers]

    def _allocate(self, layer: Any, rows: int, extra: int) -> tuple[Tensor, Tensor] | None:
        if type(layer) is not DynamicLayer or not layer.is_initialized:
            return None
        pair = []
        for tensor in (layer.keys, layer.values):
            _, groups, filled, size = tensor.shape
            wide = tensor.new_empty(rows, groups, filled + extra, size)
            wide[:, :, :filled] = tensor
            pair.append(wide)
        return pair[0], pair[1]

    def take(self, rows: int) -> Any:
        """A cache of `rows` rows, valid until the next call."""
        taken = copy.copy(self.cache)
        taken.layers = []
        for layer, slots in zip(self.cache.layers, self.slots, strict=True):
            if slots is None:
                layer = copy.deepcopy(layer)
                # Selects the first row again and again; only full-attention layers have a method for repeating.
                layer.reorder_cache(torch.zeros(rows, dtype=torch.long))
            else:
                layer = SlotsLayer(slots[0][:rows], slots[1][:rows], self.filled)
            taken.layers.append(layer)
        return taken


def _repeatable(cache: Any) -> bool:
    """Whether its layers can be repeated; a cache class of the model's own may keep its state elsewhere."""
    return type(cache) is DynamicCache


def _row_bytes(cache: Any, extra: int) -> int:
    """Bytes of one row of the cache with `extra` more tokens."""
    total = 0
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, Tensor) and tensor.dim() == 4:
                total += tensor.numel() // max(tensor.shape[2], 1) * (tensor.shape[2] + extra) * tensor.element_size()
    return total


def shared_tokens(context: int, shortest: int, tile: int) -> int:
    """How many tokens of a context can be prefilled once for questions of `shortest` tokens and more.

    A multiple of `tile` that leaves every question a chunk of two tokens: a chunk of one would run as a decode step.
    """
    shared = context // tile * tile
    if context + shortest - shared < 2:
        shared -= tile
    return shared if shared >= 2 else 0


def read_context(
    model: nn.Module, context: Sequence[int], questions: Sequence[Sequence[int]], tile: int
) -> tuple[int, Any]:
    """(tokens of the context that all questions share, the model's own cache of them); (0, None) if there are none."""
    shared = 0
    if continues_in_chunks(model):
        shared = shared_tokens(len(context), min(map(len, questions)), tile)
    if not shared:
        return 0, None
    ids = torch.tensor([list(context[:shared])], device=model.device)
    return shared, logits_at(model, ids, use_cache=True)[1].past_key_values


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    context: Sequence[int],
    questions: Sequence[Sequence[int]],
    new_tokens: Sequence[int],
    *,
    tile: int,
    max_bytes: int | None = None,
    read: tuple[int, Any] | None = None,
) -> list[list[int]]:
    """For each question, the first `new_tokens[i]` tokens that greedy decoding writes after context + question.

    Runs whatever attention the model has attached. An answer ends before the model's end-of-sequence token. Rows of a
    batch share the question's length; `max_bytes` bounds the repeated cache (default: 1 GB, 16 GB on a GPU).
    `read`: what read_context gave, if the context has been read.
    """
    chunks = continues_in_chunks(model)
    shared, cache = read_context(model, context, questions, tile) if read is None else read
    rest = list(context[shared:])
    by_length: dict[int, list[int]] = {}
    for index, question in enumerate(questions):
        by_length.setdefault(len(question), []).append(index)
    limit = max_bytes or cache_bytes(model.device)
    answers: list[list[int]] = [[] for _ in questions]
    for length, members in by_length.items():
        extra = len(rest) + length + max(new_tokens[index] for index in members)
        batch, repeated = len(members) if chunks else 1, None
        if cache is not None and _repeatable(cache):
            batch = max(1, min(batch, limit // max(_row_bytes(cache, extra), 1)))
            repeated = Repeated(cache, batch, extra)
        elif cache is not None:
            batch = 1
        for begin in range(0, len(members), batch):
            part = members[begin : begin + batch]
            rows = repeated.take(len(part)) if repeated else copy.deepcopy(cache)
            chunk = torch.tensor([rest + list(questions[index]) for index in part], device=model.device)
            written = _decode(model, rows, shared, chunk, max(new_tokens[index] for index in part))
            for index, tokens in zip(part, written.tolist(), strict=True):
                answers[index] = until_end(tokens[: new_tokens[index]], model)
    return answers


def _decode(model: nn.Module, cache: Any, seen: int, chunk: Tensor, steps: int) -> Tensor:
    """Prefills chunk [B, T] behind the `seen` tokens of the cache and decodes greedily: int64 [B, steps]."""
    tokens = []
    for step in range(steps):
        logits, output = logits_behind(model, chunk, cache, seen)
        seen += chunk.shape[1]
        cache, chunk = output.past_key_values, logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(chunk)
        if step == 0:
            written = decode_behind(model, cache, chunk[:, 0], steps, stops=ends(model))
            if written is not None:
                return written
    return torch.cat(tokens, 1)


def ends(model: nn.Module) -> set[int]:
    """The tokens that end what the model writes."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {found} if isinstance(found, int) else set(found or ())


def until_end(tokens: list[int], model: nn.Module) -> list[int]:
    stops = ends(model)
    stop = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:stop]
