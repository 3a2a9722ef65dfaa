"""Prefills of one prompt under one layout after another, without running again the layers that do what they did.

Two anchor sets that agree up to layer p give the same hidden states up to there. `SharedPrefill` keeps those of the
last run, its cache and the keys that its anchors chose; the first layers of the next run hand them on. Nothing is
approximated: the layers from p on see what they would have seen, and a short prompt proves it for the model at hand.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kascade_cli.integrations.transformers import attach_setting
from kascade_cli.models import decoder_layers, describe, logits_at, text_config
from kascade_cli.schema import Profile
from kascade_cli.sparse import Setting

_MOST_BYTES = 4 << 30  # of hidden states kept
_PROOF = 256  # tokens of the prompt that proves it


@dataclass
class _Last:
    """The last run. outputs: what each layer returned; keys: what anchors chose; cache: of the whole prefill."""

    layout: list[Any] = field(default_factory=list)
    outputs: dict[int, Any] = field(default_factory=dict)
    keys: dict[int, Any] = field(default_factory=dict)
    cache: Any = None


def layout_of(profile: Profile) -> list[Any]:
    """What each layer's prefill depends on, beside its input: comparable between profiles, and in an order."""
    budget = str(profile.budget.model_dump())
    return [(budget, layer.role, reads_of(profile, index)) for index, layer in enumerate(profile.layers)]


def reads_of(profile: Profile, layer: int) -> list[tuple[int, int]]:
    """(anchor layer, anchor head) of every KV head of a reuse layer in prefill; -1 for the set of all heads, which
    anchors of a pooled profile choose as well."""
    entry = profile.layers[layer]
    if entry.mapped:
        return profile.head_map(layer, "prefill")
    if entry.role == "reuse":
        return [(entry.anchor, -1)]
    return [] if profile.heads_measured else [(layer, -1)]


class SharedPrefill:
    """Of one prompt. Runs must be of strategy `kascade`, one at a time."""

    def __init__(self, model: Any) -> None:
        self.layers = decoder_layers(model)
        self.last = _Last()
        self.run_layers = 0  # that were run, in all

    def __call__(
        self, model: Any, attached: Any, ids: Tensor, at: Sequence[int], use_cache: bool
    ) -> tuple[Tensor, Any]:
        """`logits_at(model, ids, at, use_cache=use_cache)` while `attached`."""
        profile = attached.strategy.profile
        layout = layout_of(profile)
        shared = self._shared(profile, layout)
        with self._standing_in(attached, shared), self._recording(attached, shared):
            logits, output = logits_at(model, ids, at, use_cache=use_cache)
        self.run_layers += len(layout) - max(0, shared - 1)
        self.last.layout, self.last.cache = layout, output.past_key_values if use_cache else None
        if use_cache:  # decoding appends: new tensors, so that these stay what they are
            self.last.cache = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        return logits, output

    def _shared(self, profile: Profile, layout: list[Any]) -> int:
        """How many first layers need not run again (but the very first, which begins the pass)."""
        same = 0
        for mine, theirs in zip(layout, self.last.layout, strict=False):
            if mine != theirs:
                break
            same += 1
        same = min(same, len(layout) - 1)  # the last one ends the pass
        # An anchor that nobody read last time has left no keys.
        while missing := [
            anchor
            for layer in range(same, len(layout))
            if profile.layers[layer].role == "reuse"
            for anchor, _ in reads_of(profile, layer)
            if 0 < anchor < same and anchor not in self.last.keys
        ]:
            same = min(missing)
        return same

    @contextlib.contextmanager
    def _standing_in(self, attached: Any, shared: int) -> Iterator[None]:
        """Layers 1 .. shared - 1 hand on what they gave last time."""
        with contextlib.ExitStack() as undo:
            for index in range(1, shared):
                module = self.layers[index]
                own = module.__dict__.get("forward")
                module.forward = self._stand_in(attached, index)
                undo.callback(_restore, module, own)
            yield

    def _stand_in(self, attached: Any, index: int) -> Any:
        output, keys = self.last.outputs[index], self.last.keys.get(index)

        def forward(*_: Any, past_key_values: Any = None, **__: Any) -> Any:
            if past_key_values is not None:
                past_key_values.update(*self.last.cache[index], index)
            if keys is not None:
                attached.state.keep(index, keys, 0)
            return output

        return forward

    @contextlib.contextmanager
    def _recording(self, attached: Any, shared: int) -> Iterator[None]:
        """Notes what layers from `shared` on return, and what anchors among them choose."""
        with contextlib.ExitStack() as undo:
            for index, module in self.layers.items():
                if index >= max(1, shared):
                    self.last.outputs.pop(index, None)
                    self.last.keys.pop(index, None)

                    def note(_: Any, __: Any, output: Any, index: int = index) -> None:
                        self.last.outputs[index] = output
                        if attached.state is not None and index in attached.state.keys:
                            self.last.keys[index] = attached.state.keys[index]

                    undo.callback(module.register_forward_hook(note).remove)
            yield


def _restore(module: Any, own: Any) -> None:
    del module.forward
    if own is not None:
        module.forward = own


@torch.no_grad()
def can_share(model: Any, profiles: Sequence[Profile], ids: Sequence[int], backend: str = "auto") -> bool:
    """Whether a run that shares gives what one that does not gives, tried with two of `profiles` on the first tokens
    of a prompt; False also where hidden states would not fit."""
    from transformers.cache_utils import DynamicLayer

    info, config = describe(model), text_config(model)
    devices = {parameter.device for parameter in model.parameters()}
    hidden = len(ids) * config.hidden_size * info.layers * model.dtype.itemsize
    plain = info.profiled_layers == list(range(info.layers)) == list(decoder_layers(model))
    if not plain or len(devices) > 1 or hidden > _MOST_BYTES:
        return False
    ordered = sorted(profiles, key=layout_of)
    first, second = max(zip(ordered, ordered[1:], strict=False), key=lambda pair: _agree(*pair), default=(None, None))
    if first is None or _agree(first, second) < 2:
        return False
    tokens = torch.tensor([list(ids[:_PROOF])], device=devices.pop())
    places, prefill, found = [tokens.shape[1] // 2, tokens.shape[1] - 1], SharedPrefill(model), []
    for profile, way in ((first, prefill), (second, prefill), (second, SharedPrefill(model))):
        with attach_setting(model, Setting(profile=profile, backend=backend)) as attached:
            try:
                logits, output = way(model, attached, tokens, places, True)
            except (AttributeError, TypeError, KeyError):  # a layer or cache of another make
                return False
            cache = output.past_key_values.layers
            found.append([logits, *(layer.keys for layer in cache), *(layer.values for layer in cache)])
        if not all(type(layer) is DynamicLayer for layer in cache):
            return False
    return all(torch.equal(shared, alone) for shared, alone in zip(found[1], found[2], strict=True))


def _agree(first: Profile, second: Profile) -> int:
    """Layers up to the first that differs."""
    pairs = zip(layout_of(first), layout_of(second), strict=True)
    return next((index for index, (mine, theirs) in enumerate(pairs) if mine != theirs), 0)
