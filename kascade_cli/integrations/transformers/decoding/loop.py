"""The decode loop: steps until all rows have ended, looking only now and then whether they have."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from kascade_cli.integrations.transformers.decoding.runner import Runner

LOOK = 8  # steps between two looks; each waits for the device

Choose = Callable[[Tensor, Tensor], Tensor]
Seen = Callable[[Tensor], None]


@torch.no_grad()
def decode(
    runner: Runner,
    steps: int,
    *,
    stops: Collection[int] = (),
    choose: Choose | None = None,
    seen: Seen | None = None,
) -> Tensor:
    """The token that the runner was loaded with and those after it: int64 [B, up to steps].

    It ends with the token at which the last row has come to one of `stops`; what ran beyond is not counted.
    choose(logits [B, V], tokens so far [B, n]) -> int64 [B]: the next token (None: the likeliest). seen(tokens [B, n])
    is told of new ones, on the CPU, a few at a time.
    """
    looking = _Look(runner, stops, seen)
    if looking.over(1) or steps < 2:
        return runner.slots.token.clone()
    runner.prepare()
    count = 1
    while count < steps:
        so_far = _tokens(runner, count) if choose is not None else None
        runner.step()
        count += 1
        looking.mark(count)
        if choose is not None:
            runner.slots.token[:, 0].copy_(choose(runner.logits[:, -1], so_far))
        if (count == steps or count % LOOK == 1) and looking.over(count):
            break
    return _tokens(runner, count)[:, : looking.end].clone()


def _tokens(runner: Runner, count: int) -> Tensor:
    """All `count` tokens, int64 [B, count]; the newest enters the history only when the next step reads it."""
    slots = runner.slots
    end = slots.first + count
    slots.history[:, end - 1 : end].copy_(slots.token)
    return slots.history[:, slots.first : end]


class _Look:
    """What the host knows of the tokens. end: how many there are, once every row has come to a stop."""

    def __init__(self, runner: Runner, stops: Collection[int], seen: Seen | None):
        self.runner, self.stops, self.seen = runner, torch.tensor(sorted(stops)), seen
        self.tally = runner.attachment.tally if runner.attachment is not None and stops else None
        self.end: int | None = None
        self._known = 0
        self._marks: dict[int, Any] = {}
        self._stopped: Tensor | None = None  # int64 [B]: tokens up to the row's first stop, 0 without one

    def mark(self, count: int) -> None:
        """There are `count` tokens: what has been counted so far, should they turn out to be the last."""
        if self.tally is not None:
            self._marks[count] = self.tally.mark()

    def over(self, count: int) -> bool:
        """Looks at the first `count` tokens. True if no row goes on."""
        if not len(self.stops) and self.seen is None:
            return False
        new = _tokens(self.runner, count)[:, self._known :].cpu()
        if len(self.stops):
            self.end = self._end(new)
        if self.seen is not None:
            self.seen(new if self.end is None else new[:, : self.end - self._known])
        if self.end is not None and self.tally is not None and self.end in self._marks:
            self.tally.back_to(self._marks[self.end])
        self._known = count
        self._marks.clear()
        return self.end is not None

    def _end(self, new: Tensor) -> int | None:
        if self._stopped is None:
            self._stopped = torch.zeros(len(new), dtype=torch.int64)
        found = torch.isin(new, self.stops)
        first = self._known + found.int().argmax(1) + 1
        self._stopped = torch.where((self._stopped == 0) & found.any(1), first, self._stopped)
        return int(self._stopped.max()) if bool((self._stopped > 0).all()) else None
