"""The loop of a capture: prompts -> probe -> store, in one process or in each of several."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from kascade_cli.capture.durable import disk_reason
from kascade_cli.capture.probe import Probe
from kascade_cli.capture.store import CaptureStore, PartStore
from kascade_cli.devset import DevSet
from kascade_cli.errors import KascadeError
from kascade_cli.models import ModelInfo
from kascade_cli.processes import Ended, Team

_CLAIMS = "prompts"
_FINISHED = -1  # what a process sends when no prompt is left for it; else the number of a prompt that is in


def capture_prompts(
    model: nn.Module,
    info: ModelInfo,
    devset: DevSet,
    decode_tokens: int,
    tiles: Sequence[np.ndarray],
    store: CaptureStore,
    *,
    report: Callable[[int, int], None],
    team: Team | None = None,
    sha256: list[str] | None = None,
) -> None:
    """Captures what remains; with a `team`, what the others leave, and waits for theirs.

    `report(done, total)` counts tokens. sha256: the prompts' `token_sha256`, to find what the others have written.
    Raises KascadeError that says what is kept.
    """
    lengths = [len(prompt) for prompt in devset.prompts]
    others = _Others(team, store) if team else None

    def show(index: int | None = None, share: float = 0.0) -> None:
        if others:
            others.collect()
        done = sum(lengths[number] for number in store.done)
        report(done + (int(share * lengths[index]) if index is not None else 0), sum(lengths))

    try:
        show()
        with _reasons(store, lengths) as at:
            with Probe(model, info) as probe:
                for index in _in_turn(store.remaining, lengths, team):
                    at[:] = [index]
                    _capture_prompt(
                        probe, store, index, devset.prompts[index], tiles[index], decode_tokens,
                        lambda share, index=index: show(index, share),
                    )  # fmt: skip
                    show()
            while others and others.working:
                team.pause()
                show()
    except BaseException as error:
        if others:
            team.halt(getattr(error, "exit_code", 1))
            store.find_parts(sha256)
            if store.done:
                with contextlib.suppress(OSError):
                    store.write_index()
        if isinstance(error, Ended):
            raise stopped(store, str(error)) from error
        if isinstance(error, _Reason):
            raise stopped(store, error.reason, error.advice) from error.__cause__
        raise


def capture_beside(
    model: nn.Module,
    info: ModelInfo,
    devset: DevSet,
    decode_tokens: int,
    tiles: Sequence[np.ndarray],
    store: PartStore,
    remaining: Sequence[int],
    team: Team,
) -> int:
    """The part of a process that is not the leader; returns how many prompts it captured.

    The leader adds what is kept to what goes wrong here; where the leader is gone, the error says it.
    """
    lengths = [len(prompt) for prompt in devset.prompts]
    try:
        with _reasons(store, lengths) as at, Probe(model, info) as probe:
            for index in _in_turn(remaining, lengths, team):
                at[:] = [index]
                _capture_prompt(
                    probe, store, index, devset.prompts[index], tiles[index], decode_tokens, lambda share: team.check()
                )
        team.send(_FINISHED)
    except Ended as error:
        store.done = [index for index in range(len(lengths)) if store.part(index).exists()]
        raise stopped(store, str(error)) from error
    except _Reason as error:
        raise KascadeError(f"{error.reason}: {error.advice}") from error.__cause__
    return len(store.done)


def run_along(
    model: nn.Module,
    info: ModelInfo,
    devset: DevSet,
    decode_tokens: int,
    tiles: Sequence[np.ndarray],
    remaining: Sequence[int],
) -> None:
    """What every process beside the leader does where they share the model: its heads of every prompt."""
    with Probe(model, info) as probe:
        for index in remaining:
            probe.run(devset.prompts[index], tiles[index], lambda *_: None, decode_tokens=decode_tokens)


class _Others:
    """What the other processes have finished, for the leader."""

    def __init__(self, team: Team, store: CaptureStore) -> None:
        self.team, self.store = team, store
        self.working = set(range(1, team.size)) if store.remaining else set()

    def collect(self) -> None:
        """Raises Ended where a process is gone before it is through."""
        found = self.team.receive()
        self.working -= {rank for rank, index in found if index == _FINISHED}
        if finished := [index for _, index in found if index != _FINISHED]:
            self.store.publish(*finished)


class _Reason(Exception):
    """Why the loop stopped, and what would help."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


@contextlib.contextmanager
def _reasons(store: CaptureStore, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Names what a full disk and short memory are. What it gives holds the prompt that is being captured."""
    at: list[int] = []
    try:
        yield at
    except OSError as error:
        raise _Reason(disk_reason(error, store.path.parent), "make room") from error
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, a bare RuntimeError on a CPU
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        place = f"at prompt {at[0]} ({lengths[at[0]]} tokens)" if at else "before the first prompt"
        raise _Reason(f"out of memory {place}", "take another --device, or a lower --max-length") from error


def _in_turn(remaining: Sequence[int], lengths: Sequence[int], team: Team | None) -> Iterator[int]:
    """The prompts of this process. Of several, whoever is free takes the longest that is left: so none waits long at
    the end."""
    if team is None:
        yield from remaining
        return
    order = sorted(remaining, key=lambda index: (-lengths[index], index))
    for place in team.claims(_CLAIMS, len(order)):
        yield order[place]


def _capture_prompt(
    probe: Probe,
    store: CaptureStore,
    index: int,
    tokens: list[int],
    tiles: np.ndarray,
    decode_tokens: int,
    on_share: Callable[[float], Any],
) -> None:
    total = len(tokens) + decode_tokens
    generated = np.arange(len(tokens), total, dtype=np.int32)
    rows = np.stack([generated, np.ones_like(generated)], axis=1)
    writer = store.begin(index, tokens, np.concatenate([tiles, rows]), total)

    def sink(layer: int, first: int, mass: np.ndarray) -> None:
        writer.write_mass(layer, first, mass)
        on_share((layer + 1) / len(store.profiled_layers) if first < len(tiles) else 1.0)

    try:
        measured = probe.run(tokens, tiles, sink, decode_tokens=decode_tokens)
    except BaseException:
        writer.discard()
        raise
    writer.finish(measured.importance, measured.top_mass, len(tokens) + len(measured.generated))


def stopped(store: CaptureStore, reason: str, advice: str = "") -> KascadeError:
    """The line that says what is kept."""
    if not store.done:
        return KascadeError(f"{store.path}: {reason}; no prompt was finished" + (f": {advice}" if advice else ""))
    kept = f"{len(store.done)} of {store.meta['num_prompts']} prompts are finished and kept"
    return KascadeError(f"{store.path}: {reason}; {kept}: {advice + ', and ' * bool(advice)}run again with --resume")
