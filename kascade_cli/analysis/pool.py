"""One function over every prompt of a capture, in worker processes where that pays."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from kascade_cli.capture.store import Capture, open_capture

_SMALL_CAPTURE = 400 << 20  # raw bytes below which starting worker processes costs more than it gives
_open: dict[str, Capture] = {}


def default_workers(raw_bytes: int) -> int:
    """One process for a small capture, else one per available core up to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if raw_bytes < _SMALL_CAPTURE else min(cores, 8)


def each_prompt(
    capture: Capture, function: Callable[..., Any], arguments: Sequence[Any], workers: int | None = None
) -> Iterator[Any]:
    """`function(prompt, *arguments)` of every finished prompt, in order. workers: None is `default_workers`.

    function and arguments travel to other processes: a function of a module, and what can be pickled.
    """
    if workers is None:
        workers = default_workers(sum(prompt.mass.size * 2 for prompt in capture))
    workers = min(len(capture), workers)
    if workers <= 1:
        for prompt in capture:
            yield function(prompt, *arguments)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_work, str(capture.path), name, function, arguments) for name in capture.prompts]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _work(path: str, name: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Runs in a worker process, which keeps the file open between prompts."""
    if path not in _open:
        _open[path] = open_capture(path)
    return function(_open[path].prompt(name), *arguments)
