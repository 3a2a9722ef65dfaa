"""One decode step of a model on a static cache, ready to be replayed."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from kascade_cli.integrations.transformers.decoding import graph
from kascade_cli.integrations.transformers.decoding.compiled import TOGETHER, compiled_layers
from kascade_cli.integrations.transformers.decoding.slots import Slots

Replays = dict[str | None, tuple[Callable[[], None], Tensor]]  # per kind of step: the graph, and where its logits are


class Runner:
    """Steps of `model` over `slots`, greedy unless `slots.token` is written over between two steps.

    attachment: what the model runs under, or None. capture: record the steps in CUDA graphs; where that fails,
    `reason` says why and the steps run eagerly. compile: compile the decoder layers for them, which fuses what is not
    attention and rounds differently; where that fails, `uncompiled` says why, and `apart` where it only fails for
    layers in a row, which run one by one then. stay: every step runs at the same place (for benchmarks). Each step
    leaves `logits` [B, 1, V] of the token after it. seconds: what preparing took since loading.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        attachment: Any = None,
        *,
        capture: bool = True,
        compile: bool = False,
        stay: bool = False,
    ):
        self.model, self.slots, self.attachment = model, slots, attachment
        self.reason: str | None = None if capture else "not asked for"
        self.compile, self.uncompiled = compile, None if compile else "not asked for"
        self.apart: str | None = None
        self.logits: Tensor | None = None
        self.seconds = 0.0
        self._replays: Replays = {}
        self._stay, self._run = stay, 0
        self._kept: Any = None  # what only the graphs read
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
        self.seconds = 0.0
        if self._replays and [id(tensor) for tensor in self._held] != [id(tensor) for tensor in self._buffers()]:
            self._replays = {}  # eager steps of another shape have run in between

    def _buffers(self) -> list[Tensor]:
        return [] if self.memory is None else self.memory.buffers()

    def prepare(self) -> None:
        """Records the steps, once; nothing that has been loaded or counted changes."""
        if self._replays or self.reason is not None:
            return
        began = time.perf_counter()
        # One by one, and nothing but layers, where a model allows no more.
        for together in (TOGETHER, 1) if self.compile else ():
            if not self._replays:
                how = compiled_layers(self.model, self.slots, together=together)
                self.apart = self.uncompiled  # of the attempt before
                self._replays, self.uncompiled = self._record(how)
        if not self._replays:
            self._replays, self.reason = self._record(contextlib.nullcontext())
        self._held = self._buffers()
        self.seconds = time.perf_counter() - began

    def _record(self, how: AbstractContextManager) -> tuple[Replays, str | None]:
        """A graph per kind of step; none, and why."""
        device = self.slots.token.device
        kinds = [None] if self.memory is None else self.memory.kinds()
        replays: Replays = {}
        reason = None
        with self.undone():
            try:
                with how as self._kept:
                    # In the order in which they follow each other: the second may read what the first has kept.
                    graph.warm_up([self._as_step(kind) for kind in kinds], device)
                    for kind in kinds:
                        replays[kind] = graph.record(self._as_step(kind), device), self.logits
            except Exception as error:
                torch.cuda.synchronize(device)
                replays, reason = {}, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        torch.cuda.synchronize(device)
        return replays, reason

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
        """Whether steps are replayed."""
        return bool(self._replays)

    @property
    def compiled(self) -> bool:
        """Whether the layers in them are compiled."""
        return self.captured and self.uncompiled is None
