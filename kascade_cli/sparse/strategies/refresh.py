"""An approximation of Kascade's decode, off by default (docs/decisions.md): keys are chosen every N steps only.

Everything else of a pass is dropped when it ends, so that no pass can read the keys of another sequence. Here that has
to be proved instead, by the engine (`Batch.continues`). What no host code can see (a replayed CUDA graph, a mask that
hides keys that were visible before) is compared on the device and reported afterwards.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.schema import Phase
from kascade_cli.sparse.batch import Batch
from kascade_cli.sparse.layer import Keys, Layer
from kascade_cli.sparse.state import Pass
from kascade_cli.sparse.strategies.kascade import Kascade
from kascade_cli.sparse.strategy import Option, whole_number

KINDS = ("refresh", "between")


class Refresh(Kascade):
    """Between two choices, all layers but the first read the keys chosen last and all newer ones."""

    name, rank = "kascade-refresh", 9
    summary = "kascade that chooses keys every N decode steps; between, those and all newer ones (approximate)"
    options = {"refresh": Option(whole_number(1), 8, "decode steps from one choice of keys to the next")}

    def memory(self) -> "Memory":
        return Memory(self.refresh, self.profile.anchors)

    def reads(self, layer: int, phase: Phase) -> Iterable[int]:
        # Between refreshes an anchor reads its own kept keys. The memory holds those of the dense layer like the
        # others' (gathered from all processes), whether or not a layer reads them.
        own = (layer,) if phase == "decode" and self.role(layer) in ("anchor", "dense") else ()
        return (*super().reads(layer, phase), *own)

    def begin(self, state: Pass) -> None:
        for layer, keys in state.memory.begin(state.batch).items():
            state.keys[layer] = keys

    def end(self, state: Pass) -> None:
        state.memory.finish()

    def attend(self, layer: Layer) -> Tensor:
        memory = layer.state.memory
        if layer.phase == "prefill" or not memory.between:
            return super().attend(layer)
        role = self.role(layer.index)
        if role == "dense":
            return layer.dense_and_hint(hint=False)[0]
        if role == "reuse":
            return layer.attend(self.reused(layer))
        return layer.attend(layer.state.kept(layer.index, layer.index).to(layer.query.device))

    def keep(self, layer: Layer, keys: Keys) -> None:
        super().keep(layer, keys)
        if layer.phase == "decode":
            sets = layer.state.keys.get(layer.index, keys)
            layer.state.memory.keep(layer.index, sets.indices, layer.state.batch)


class Memory:
    """Key sets of all anchors, chosen every `every` decode steps and grown by one key in each step between.

    A pass that stops in the middle leaves nothing to read. counts: int32 [B], entries in use of every set. The
    tensors stay where they are as long as batch, slots and budget do, so that CUDA graphs of both kinds of step can
    share them.
    """

    def __init__(self, every: int, anchors: Iterable[int]):
        self.every, self.between = every, False
        self.counts: Tensor | None = None
        self._place = {layer: place for place, layer in enumerate(anchors)}
        self._sets: Tensor | None = None  # int32 [anchors, B, G or 1, K + every - 1]
        self._lengths: Tensor | None = None  # int32 [2, B]: kv_start and kv_len of the last step
        self._tally: Tensor | None = None  # int64 [3]: refreshes, steps between, rows that did not continue
        self._forced: str | None = None
        self._graphed = False  # steps may have been replayed without this code since
        self._forget()

    def _forget(self) -> None:
        self._complete, self._age, self._slots = False, 0, 0
        self._written: set[int] = set()

    def kinds(self) -> list[str]:
        """The kinds of decode steps that there are, in the order in which they first come."""
        return list(KINDS[: min(self.every, 2)])

    def kind(self, step: int) -> str:
        """The kind of the decode step with this number, counted from 0 behind a prefill."""
        return KINDS[0] if step % self.every == 0 else KINDS[1]

    def buffers(self) -> list[Tensor]:
        """What steps share: graphs of them hold as long as these are the same tensors."""
        return [tensor for tensor in (self._sets, self.counts, self._lengths) if tensor is not None]

    @property
    def counted(self) -> Tensor | None:
        """The counts of `report`, on the device."""
        return self._tally

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
            self._forced, self._graphed = before, True

    def begin(self, batch: Batch) -> dict[int, Keys]:
        """A pass starts: the keys that it may read instead of choosing, none where it must choose.

        Raises KascadeError for a step forced to read kept keys where there are none.
        """
        self.between = batch.phase == "decode" and self._may_read(batch)
        age = self._age + 1 if self.between else 0
        self._forget()
        self._age, self._slots = age, batch.slots
        self._graphed = self._graphed and self._forced is not None
        if not self.between:
            return {}
        self._written = set(self._place)
        self._append(batch)
        return {layer: Keys(self._sets[place], self.counts) for layer, place in self._place.items()}

    def _may_read(self, batch: Batch) -> bool:
        fits = self._complete and (self._sets.shape[1], self._sets.device) == (batch.rows, batch.device)
        fits = fits and batch.slots >= self._slots
        if self._forced is None:
            return fits and batch.continues and not self._graphed and self._age + 1 < self.every
        if self._forced == "between" and not fits:
            raise KascadeError("no keys are kept for a step between refreshes: run a refresh of this batch first")
        return self._forced == "between"

    def keep(self, layer: int, indices: Tensor, batch: Batch) -> None:
        """What anchor `layer` chose in a refresh, int32 [B, G or 1, K]: the first counts[b] entries, then -1."""
        if not self._written:
            self._make_room(indices, batch)
        self._sets[self._place[layer], ..., : indices.shape[-1]].copy_(indices)
        self._written.add(layer)

    def _make_room(self, indices: Tensor, batch: Batch) -> None:
        rows, sets, width = indices.shape
        shape = (len(self._place), rows, sets, width + self.every - 1)
        if self._sets is None or self._sets.shape != shape or self._sets.device != batch.device:
            # Not inference tensors, which a later step outside inference mode could not write to.
            with torch.inference_mode(False):
                # Every anchor's set begins at a multiple of 128 bytes, as a tensor of its own would.
                size = math.prod(shape[1:])
                flat = torch.empty(shape[0], -(-size // 32) * 32, dtype=torch.int32, device=batch.device)
                self._sets = flat[:, :size].unflatten(1, shape[1:])
                self.counts = torch.zeros(rows, dtype=torch.int32, device=batch.device)
                self._lengths = torch.zeros(2, rows, dtype=torch.int32, device=batch.device)
                if self._tally is None:
                    self._tally = torch.zeros(3, dtype=torch.int64, device=batch.device)
        self._sets[..., width:].fill_(-1)
        self.counts.copy_(batch.counts)
        self._note(batch, 0)

    def _append(self, batch: Batch) -> None:
        """Adds the step's own key to every set, on the device. A row whose query is padding adds nothing."""
        query_start, kv_start, kv_len = batch.lengths
        newest = kv_start + kv_len - 1
        real = query_start == newest
        follows = (kv_start == self._lengths[0]) & (kv_len == self._lengths[1] + 1)
        width = self._sets.shape[-1]
        self._tally[2].add_((real & ~(follows & (self.counts < width))).sum())
        # Full sets (more steps than `every` allows, replayed graphs only) lose their last entry, not their memory.
        place = self.counts.clamp_max(width - 1).long()[:, None, None].expand(*self._sets.shape[:3], 1)
        self._sets.scatter_(-1, place, torch.where(real, newest, -1)[:, None, None].expand_as(place))
        self.counts.add_(real.int()).clamp_max_(width)
        self._note(batch, 1)

    def _note(self, batch: Batch, kind: int) -> None:
        self._lengths[0].copy_(batch.lengths.kv_start)
        self._lengths[1].copy_(batch.lengths.kv_len)
        self._tally[kind].add_(1)

    def finish(self) -> None:
        """The last layer has run: what was kept may be read."""
        self._complete = self._written == set(self._place)

    @property
    def indices(self) -> dict[int, Tensor]:
        """The kept set of every anchor: int32 [B, G or 1, K + every - 1], -1 past counts[b], not in order."""
        return {layer: self._sets[place] for layer, place in self._place.items()}

    @staticmethod
    def report(memories: list["Memory"]) -> dict[str, Any]:
        """Decode steps of both kinds so far, replays of graphs included.

        Raises KascadeError if steps between did not continue the sequence that their keys were chosen for.
        """
        tallies = [memory._tally.tolist() for memory in memories if memory._tally is not None]
        refreshes, between, broken = (sum(column) for column in zip(*tallies, strict=True)) if tallies else (0, 0, 0)
        if broken:
            raise KascadeError(
                f"{broken} rows of decode steps between refreshes did not follow the step before them by one token, "
                "so keys of another text may have been read: refresh first whenever the cache or its mask changes"
            )
        return {"refresh": {"every": memories[0].every, "refreshes": refreshes, "between": between}}

    def reset(self) -> None:
        """Forgets the counts of `report`."""
        if self._tally is not None:
            self._tally.zero_()
