"""Proves that a step's cache is the one of the last step, untouched (for `Batch.continues`).

A step continues the last one only if the cache layer that it is about to extend holds the very tensors that the last
step left there, not written to since. Whatever else happens between two steps (a prefill, another cache, another
batch, reordering by beam search, cropping) breaks that.
"""

import weakref
from typing import Any

from torch import Tensor, nn


class Continuity:
    """Of the passes of one thread. `watch`, then `continues`, then `end`."""

    def __init__(self) -> None:
        self._layer: Any = None
        self._snapshot: dict[str, tuple[Any, int | None]] = {}
        self._same = False

    def watch(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        """Before the first full-attention layer runs: its cache, the step's key not yet in it."""
        layers = getattr(kwargs.get("past_key_values"), "layers", ())
        self._layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
        # A cache of another kind (quantised, offloaded) or none: nothing can be proved.
        self._same = bool(self._snapshot) and _same(self._snapshot, self._layer)
        self._snapshot = {}

    def continues(self, key: Tensor) -> bool:
        """Whether the pass that sees `key` (the step's own included) goes on where the last one ended."""
        if getattr(self._layer, "keys", None) is not key:  # caches that hand out copies prove nothing
            self._layer = None
        return self._same

    def end(self) -> None:
        """The pass has run through."""
        self._snapshot = {} if self._layer is None else _tensors(self._layer)
        self._layer, self._same = None, False


def _tensors(layer: Any) -> dict[str, tuple[Any, int | None]]:
    """The tensors of a cache layer, by name: a weak reference (a cache may be large) and how often it was written."""
    held = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor)}
    # Tensors made in inference mode do not count their writes.
    return {name: (weakref.ref(t), None if t.is_inference() else t._version) for name, t in held.items()}


def _same(snapshot: dict[str, tuple[Any, int | None]], layer: Any) -> bool:
    now = {} if layer is None else _tensors(layer)
    return now.keys() == snapshot.keys() and all(
        now[name][0]() is ref() and now[name][1] == version for name, (ref, version) in snapshot.items()
    )
