"""What really ran, in the log and in a file: at the exit, and every so many seconds where that is asked for."""

import json
import logging
import os
import signal
import threading
import time
from collections import Counter
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any

from kascade_cli.errors import KascadeError
from kascade_cli.files import atomic_write
from kascade_cli.integrations.transformers.report import Tally
from kascade_cli.sparse import Pass

if TYPE_CHECKING:
    from kascade_cli.integrations.vllm.served import Served

log = logging.getLogger("kascade")


class Reporter:
    """Adds up passes and steps of one process."""

    def __init__(self, served: "Served") -> None:
        self.served, self.tally, self.counts = served, Tally(), Counter()
        self._last, self._started, self._warm = time.monotonic(), False, False

    def start(self) -> None:
        """Says what will run, and sees to the report at the exit."""
        if self._started:
            return
        self._started, served = True, self.served
        if served.heads.rank:
            return  # one voice for all
        log.info(
            "kascade: strategy %s on %s, %s of the keys, layers %s; %s",
            served.strategy.name, served.ops.name, served.budget.describe(), _roles(served), served.heads.describe(),
        )  # fmt: skip
        # Not atexit, which vLLM's workers, children of multiprocessing, do not run.
        Finalize(None, self.emit, exitpriority=0)
        self._listen()

    def _listen(self) -> None:
        """Reports when it is asked to from outside: kill -USR2."""
        if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGUSR2):
            return  # not ours to take
        # In a thread of its own: the signal may come while a step holds what the report needs.
        signal.signal(signal.SIGUSR2, lambda *_: threading.Thread(target=self.emit).start())
        if self.served.heads.rank == 0:
            log.info("kascade: kill -USR2 %d for a report of what ran", os.getpid())

    def add(self, state: Pass) -> None:
        """A pass has run through."""
        self.tally.add(state)

    def captured(self) -> None:
        """vLLM captures CUDA graphs: what ran so far was to warm up."""
        self._warm = True

    def reset(self) -> None:
        """Counting begins anew."""
        self._warm = False
        self.tally.reset()
        self.counts.clear()

    def step(self, counts: dict[str, int]) -> None:
        """A step begins. Reports if it is time."""
        if self._warm:
            self.reset()
        self.counts.update(counts)
        every = self.served.settings.log
        if every and time.monotonic() - self._last >= every:
            self.emit()

    def report(self) -> dict[str, Any]:
        """As `Attachment.report`, with what is vLLM's own."""
        served, counted = self.served, self.tally.report()
        del counted["forward_passes"]  # of a graph that is replayed the host knows nothing; `steps` has them
        if not counted["keys_visible"]:
            counted["density"] = None  # JSON has no NaN
        return {
            "strategy": served.strategy.name,
            "backend": served.ops.name,
            "fallbacks": dict(served.ops.fallbacks),
            "budget": served.budget.model_dump(),
            "roles": _roles(served),
            **served.strategy.facts(),
            "tensor_parallel": {"processes": served.heads.world, "gathered_anchors": list(served.heads.gathers)},
            "steps": dict(self.counts),
            **counted,
        }

    def emit(self) -> None:
        """To the log, and to the file of the settings."""
        self._last = time.monotonic()
        if self.served.heads.rank:
            return
        found = self.report()
        log.info("kascade: %s", summary(found))
        if path := self.served.settings.report:
            first = self.served.layers[0]
            # Every stage of a pipeline has a file of its own.
            path = path if first == self.served.info.profiled_layers[0] else f"{path}.{first}"
            try:
                atomic_write(path, json.dumps(found, indent=1, sort_keys=True) + "\n", overwrite=True)
            except KascadeError as error:  # of a full disk, say; serving goes on
                log.warning("the report cannot be written: %s", error)


def _roles(served: "Served") -> dict[str, list[int]]:
    roles: dict[str, list[int]] = {}
    for layer in served.layers:
        roles.setdefault(served.strategy.role(layer), []).append(layer)
    return roles


def summary(report: dict[str, Any]) -> str:
    """One line of what ran."""
    parts = [f"{report['strategy']} on {report['backend']}"]
    if not report["keys_visible"]:
        return f"{parts[0]}: nothing ran"
    for phase, counted in report["phases"].items():
        parts.append(f"{phase} read {100 * counted['density']:.2f} % of the keys visible")
    steps = report["steps"]
    parts.append(
        f"{steps.get('steps', 0)} steps, {steps.get('mixed_steps', 0)} mixed, {steps.get('prefill_chunks', 0)} chunks"
    )
    parts.append("roles " + ", ".join(f"{role} {len(layers)}" for role, layers in report["roles"].items()))
    fallbacks = report["fallbacks"]
    parts.append(
        "fallbacks " + "; ".join(f"{op}: {why}" for op, why in fallbacks.items()) if fallbacks else "no fallback"
    )
    return "; ".join(parts)
