"""The keys that `kascade-refresh` carries from one decode step to the next.

Everything else of a forward pass is dropped when it ends (attention/forward.py), so that no pass can read the keys of
another sequence. Here that has to be proved instead: a step reads kept keys only if the cache layer that it is about
to extend holds the very tensors that the last step left there, not written to since. Whatever else happens between
two steps (a prefill, another cache, another batch, reordering by beam search, cropping) makes the step a refresh.
What no host code can see (a replayed CUDA graph, an attention mask that hides keys that were visible before) is
compared on the device and reported afterwards.
"""

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kascade_cli.errors import KascadeError, UsageError

if TYPE_CHECKING:
    from kascade_cli.attention.forward import Forward

KINDS = ("refresh", "between")


class Refresh:
    """Key sets of all anchors, chosen every `every` decode steps and grown by one key in each step between.

    A pass calls `begin`, in a refresh `keep` for every anchor, and `finish`; one that stops in the middle leaves
    nothing to read. counts: int32 [B], entries in use of every set. The tensors stay where they are as long as batch,
    slots and budget do, so that CUDA graphs of both kinds of step can share them.
    """

    def __init__(self, every: int, anchors: Iterable[int]):
        self.every = every
        self.counts: Tensor | None = None
        self._place = {layer: place for place, layer in enumerate(anchors)}
        self._sets: Tensor | None = None  # int32 [anchors, B, G or 1, K + every - 1]
        self._lengths: Tensor | None = None  # int32 [2, B]: kv_start and kv_len of the last step
        self._tally: Tensor | None = None  # int64 [3]: refreshes, steps between, rows that did not continue
        self._forced: str | None = None
        self._layer: Any = None  # of the cache, during a pass
        self._snapshot: dict[str, tuple[Any, int | None]] = {}
        self._continues = False
        self.forget()

    def forget(self) -> None:
        """The next decode step refreshes."""
        self._complete = False
        self._age = self._slots = 0
        self._written: set[int] = set()

    @contextlib.contextmanager
    def only(self, kind: str) -> Iterator[None]:
        """Decode steps inside are all of one kind, `refresh` or `between`: for capturing each in a CUDA graph.

        The caller answers for the order: a refresh, then at most `every - 1` steps between, all of one sequence.
        Outside again, the next step refreshes. Raises UsageError for another kind.
        """
        if kind not in KINDS:
            raise UsageError(f"a decode step is of the kind {' or '.join(KINDS)}, not '{kind}'")
        before, self._forced = self._forced, kind
        try:
            yield
        finally:
            # Such steps may be replayed without this code: nothing is known of the step after them.
            self._forced, self._snapshot = before, {}

    def watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the first full-attention layer: its cache before the step's key is added."""
        layers = getattr(kwargs.get("past_key_values"), "layers", ())
        self._layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
        # A cache of another kind (quantised, offloaded) or none: nothing can be proved, so every step refreshes.
        self._continues = bool(self._snapshot) and _same(self._snapshot, self._layer)

    def begin(self, forward: "Forward", key: Tensor) -> bool:
        """Decides what a pass is, from what the host knows: True for a decode step that reads kept keys.

        key [B, G, S, D]: the first layer's, this step's own included. Raises KascadeError for a step forced to read
        kept keys where there are none.
        """
        between = forward.phase == "decode" and self._may_read(forward)
        age = self._age + 1 if between else 0
        self.forget()
        self._age, self._slots = age, forward.slots
        if getattr(self._layer, "keys", None) is not key:
            self._layer = None
        if forward.phase == "prefill":
            return False
        if between:
            self._written = set(self._place)
            self._append(forward)
        else:
            self._start(forward)
        return between

    def _may_read(self, forward: "Forward") -> bool:
        sets = self._sets
        shape = (forward.batch, forward.sets, forward.kv_len.device)
        fits = self._complete and (sets.shape[1], sets.shape[2], sets.device) == shape
        fits = fits and forward.slots >= self._slots
        if self._forced is None:
            return fits and self._continues and self._age + 1 < self.every
        if self._forced == "between" and not fits:
            raise KascadeError("no keys are kept for a step between refreshes: run a refresh of this batch first")
        return self._forced == "between"

    def _start(self, forward: "Forward") -> None:
        """Room for the sets that the anchors of this pass will choose."""
        shape = (len(self._place), forward.batch, forward.sets, forward.width + self.every - 1)
        device = forward.kv_len.device
        if self._sets is None or self._sets.shape != shape or self._sets.device != device:
            # Not inference tensors, which a later step outside inference mode could not write to.
            with torch.inference_mode(False):
                # Every anchor's set begins at a multiple of 128 bytes, as a tensor of its own would.
                size = math.prod(shape[1:])
                flat = torch.empty(shape[0], -(-size // 32) * 32, dtype=torch.int32, device=device)
                self._sets = flat[:, :size].unflatten(1, shape[1:])
                self.counts = torch.zeros(forward.batch, dtype=torch.int32, device=device)
                self._lengths = torch.zeros(2, forward.batch, dtype=torch.int32, device=device)
                if self._tally is None:
                    self._tally = torch.zeros(3, dtype=torch.int64, device=device)
        self._sets[..., forward.width :].fill_(-1)
        self.counts.copy_(forward.counts)
        self._note(forward, 0)

    def keep(self, layer: int, indices: Tensor) -> None:
        """What anchor `layer` chose in a refresh, int32 [B, G or 1, K]: the first counts[b] entries, then -1."""
        self._sets[self._place[layer], ..., : indices.shape[-1]].copy_(indices)
        self._written.add(layer)

    def _append(self, forward: "Forward") -> None:
        """Adds the step's own key to every set, on the device. A row whose query is padding adds nothing."""
        newest = forward.kv_start + forward.kv_len - 1
        real = forward.query_start == newest
        follows = (forward.kv_start == self._lengths[0]) & (forward.kv_len == self._lengths[1] + 1)
        width = self._sets.shape[-1]
        self._tally[2].add_((real & ~(follows & (self.counts < width))).sum())
        # Full sets (more steps than `every` allows, replayed graphs only) lose their last entry, not their memory.
        place = self.counts.clamp_max(width - 1).long()[:, None, None].expand(*self._sets.shape[:3], 1)
        self._sets.scatter_(-1, place, torch.where(real, newest, -1)[:, None, None].expand_as(place))
        self.counts.add_(real.int()).clamp_max_(width)
        self._note(forward, 1)

    def _note(self, forward: "Forward", kind: int) -> None:
        self._lengths[0].copy_(forward.kv_start)
        self._lengths[1].copy_(forward.kv_len)
        self._tally[kind].add_(1)

    @property
    def indices(self) -> dict[int, Tensor]:
        """The kept set of every anchor: int32 [B, G or 1, K + every - 1], -1 past counts[b], not in order."""
        return {layer: self._sets[place] for layer, place in self._place.items()}

    def finish(self) -> None:
        """The last layer has run: what was kept may be read."""
        self._complete = self._written == set(self._place)
        self._snapshot = {} if self._layer is None else _tensors(self._layer)
        self._layer, self._continues = None, False

    def report(self) -> dict[str, int]:
        """Decode steps of both kinds so far, replays of graphs included.

        Raises KascadeError if steps between did not continue the sequence that their keys were chosen for.
        """
        refreshes, between, broken = self._tally.tolist() if self._tally is not None else (0, 0, 0)
        if broken:
            raise KascadeError(
                f"{broken} rows of decode steps between refreshes did not follow the step before them by one token, "
                "so keys of another text may have been read: refresh first whenever the cache or its mask changes"
            )
        return {"every": self.every, "refreshes": refreshes, "between": between}

    def reset(self) -> None:
        """Forgets the counts of `report`."""
        if self._tally is not None:
            self._tally.zero_()


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
