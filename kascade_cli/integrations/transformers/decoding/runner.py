"""One decode step of a model on a static cache, ready to be replayed."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kascade_cli.integrations.transformers.decoding import graph
from kascade_cli.integrations.transformers.decoding.slots import Slots


class Runner:
    """Steps of `model` over `slots`, greedy unless `slots.token` is written over between two steps.

    attachment: what the model runs under, or None. capture: record the steps in CUDA graphs; where that fails,
    `reason` says why and the steps run eagerly. stay: every step runs at the same place (for benchmarks). Each step
    leaves `logits` [B, 1, V] of the token after it. seconds: what preparing took.
    """

    def __init__(
        self, model: nn.Module, slots: Slots, attachment: Any = None, *, capture: bool = True, stay: bool = False
    ):
        self.model, self.slots, self.attachment = model, slots, attachment
        self.reason: str | None = None if capture else "not asked for"
        self.logits: Tensor | None = None
        self.seconds = 0.0
        self._replays: dict[str | None, tuple[Callable[[], None], Tensor]] = {}
        self._stay, self._run = stay, 0
        self._held: list[Tensor] = []  # what the graphs share with eager steps

    @property
    def memory(self) -> Any:
        """What the strategy carries from step to step."""
        return None if self.attachment is None else self.attachment.memory

    def kind(self, step: int) -> str | None:
        """Steps of one kind run the same kernels; None where there is only one."""
        return None if self.memory is None else self.memory.kind(step)

    @torch.no_grad()
    def load(self, layers: Sequence[tuple[Tensor, Tensor]], token: Tensor, lengths: Tensor | None = None) -> None:
        """A prefilled cache to go on from (`Slots.load`); the next step is the first behind it."""
        self.slots.load(layers, token, lengths)
        self.restart()
        if self._replays and [id(tensor) for tensor in self._held] != [id(tensor) for tensor in self._buffers()]:
            self._replays = {}  # eager steps of another shape have run in between

    def _buffers(self) -> list[Tensor]:
        return [] if self.memory is None else self.memory.buffers()

    def prepare(self) -> None:
        """Records the steps, once; nothing that has been loaded or counted changes."""
        if self._replays or self.reason is not None:
            return
        began = time.perf_counter()
        device = self.slots.token.device
        kinds = [None] if self.memory is None else self.memory.kinds()
        with self.undone():
            try:
                # In the order in which they follow each other: the second kind may read what the first has kept.
                graph.warm_up([self._as_step(kind) for kind in kinds], device)
                self._replays = {kind: (graph.record(self._as_step(kind), device), self.logits) for kind in kinds}
                self._held = self._buffers()
            except Exception as error:
                torch.cuda.synchronize(device)
                self._replays = {}
                self.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        torch.cuda.synchronize(device)
        self.seconds = time.perf_counter() - began

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Steps that run inside leave nothing but keys and values, which the next ones write over."""
        saved = [tensor.clone() for tensor in self.slots.state()]
        tally = contextlib.nullcontext() if self.attachment is None else self.attachment.tally.uncounted()
        with tally:
            yield
        with torch.no_grad():
            for tensor, before in zip(self.slots.state(), saved, strict=True):
                tensor.copy_(before)

    def _as_step(self, kind: str | None) -> Callable[[], None]:
        return lambda: self._step(kind)

    @torch.no_grad()
    def _step(self, kind: str | None) -> None:
        slots = self.slots
        slots.history.index_copy_(1, slots.slot, slots.token)
        with contextlib.nullcontext() if kind is None else self.memory.only(kind):
            self.logits = self.model(
                input_ids=slots.token,
                past_key_values=slots.cache,
                use_cache=True,
                attention_mask=slots.mask,
                position_ids=slots.positions,
            ).logits
        torch.argmax(self.logits[:, -1], -1, keepdim=True, out=slots.token)
        if not self._stay:
            slots.advance()

    def restart(self) -> None:
        """The next step is the first behind a prefill."""
        self._run = 0

    def step(self) -> None:
        """One step for all rows."""
        kind = self.kind(self._run)
        self._run += 1
        if kind not in self._replays:
            self._step(kind)
            return
        replay, self.logits = self._replays[kind]
        replay()
        if self.attachment is not None:
            self.attachment.tally.replayed()

    @property
    def captured(self) -> bool:
        return bool(self._replays)
