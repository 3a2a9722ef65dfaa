"""What really ran while a model was attached: passes, keys read and visible."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError
from kascade_cli.schema import PHASES
from kascade_cli.sparse import Pass

Mark = tuple[int, int, list[tuple[Tensor, Tensor]]]


class Tally:
    """Counts of all passes, of all threads. Sums stay on the device, so that replays of a CUDA graph count too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memories: list[Any] = []
        self._totals: dict[str, Tensor | None] = dict.fromkeys(PHASES)
        self.reset()

    def reset(self) -> None:
        """Forgets what has run so far."""
        with self._lock:
            # Where there are totals, CUDA graphs may add to them: they stay where they are.
            for total in self._totals.values():
                if total is not None:
                    total.zero_()
            self._forwards = self._passes = 0
            for memory in self._memories:
                memory.reset()

    def add_memory(self, memory: Any) -> None:
        """What a strategy carries from pass to pass: it has `reset()` and `report(memories)`."""
        if memory is not None:
            with self._lock:
                self._memories.append(memory)

    def forward(self) -> None:
        """The model has run, whatever its attention was."""
        with self._lock:
            self._forwards += 1

    def add(self, state: Pass) -> None:
        """A pass has run through."""
        with self._lock:
            self._passes += 1
            total = self._totals[state.batch.phase]
            if total is None:
                # Not an inference tensor, which a later pass outside inference mode could not add to.
                with torch.inference_mode(False):
                    total = torch.zeros(2, dtype=torch.float64, device=state.batch.device)
                self._totals[state.batch.phase] = total
            total += state.totals()

    # -- steps in CUDA graphs --

    def replayed(self) -> None:
        """A graph of one pass has been replayed: the device has counted its keys, the host has seen nothing."""
        with self._lock:
            self._forwards += 1
            self._passes += 1

    def mark(self) -> "Mark":
        """All counts as they are now, without waiting for the device."""
        with self._lock:
            return self._forwards, self._passes, [(tensor, tensor.clone()) for tensor in self._tensors()]

    def back_to(self, mark: "Mark") -> None:
        """Forgets what has been counted since."""
        with self._lock:
            self._forwards, self._passes, counted = mark
            known = {id(tensor): before for tensor, before in counted}
            for tensor in self._tensors():
                tensor.copy_(known[id(tensor)]) if id(tensor) in known else tensor.zero_()

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What runs inside is not counted."""
        mark = self.mark()
        try:
            yield
        finally:
            self.back_to(mark)

    def _tensors(self) -> list[Tensor]:
        counts = [*self._totals.values(), *(getattr(memory, "counted", None) for memory in self._memories)]
        return [tensor for tensor in counts if tensor is not None]

    def check(self) -> dict[str, Any]:
        """Raises KascadeError if what ran was not what was asked for; what the strategy's memories report."""
        with self._lock:
            if self._forwards and not self._passes:
                raise KascadeError(
                    f"the model ran {self._forwards} times, but none of its attention went through kascade; "
                    "its attention implementation was changed while attached"
                )
            return type(self._memories[0]).report(self._memories) if self._memories else {}

    def report(self) -> dict[str, Any]:
        """Passes, and keys read and visible, per phase and in all."""
        more = self.check()
        phases: dict[str, dict[str, float]] = {}
        for phase, total in self._totals.items():
            if total is not None:
                read, visible = total.tolist()
                if visible:
                    phases[phase] = _counted(read, visible)
        read, visible = (sum(entry[name] for entry in phases.values()) for name in ("keys_read", "keys_visible"))
        return more | {"forward_passes": self._passes, "phases": phases} | _counted(read, visible)


def _counted(read: float, visible: float) -> dict[str, float]:
    return {"keys_read": read, "keys_visible": visible, "density": read / visible if visible else float("nan")}
