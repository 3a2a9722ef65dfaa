"""Compile the kernels of a model's shape before its first call: all at once in parallel.

What has been compiled is noted beside TileLang's cache, so that the next start costs nothing and loads from there.
"""

import contextlib
import functools
import hashlib
import logging
import platform
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import tilelang
import torch

from kascade_cli.kernels.contract import HEAD_DIMS, MAX_GROUP, TILES, Progress
from kascade_cli.kernels.tilelang.arguments import DTYPES
from kascade_cli.kernels.tilelang.compile import Spec, cache_dir, prebuild
from kascade_cli.kernels.tilelang.prefill_common import PAGES
from kascade_cli.kernels.tilelang.prefill_specs import prefill_specs
from kascade_cli.kernels.tilelang.specs import decode_specs, select_specs

log = logging.getLogger("kascade")
_tried: set[str] = set()  # once a process: the call that needs one that failed says why
_lock = threading.Lock()  # a second thread waits for the kernels of the first


def shape_specs(group: int, head_dim: int, dtype: torch.dtype, tile: int, page: int = 0) -> list[Spec]:
    """Kernels of a cache, decode and prefill, in pages of `page` slots or contiguous (0); empty for a shape that these
    kernels do not take."""
    fits = dtype in DTYPES and head_dim in HEAD_DIMS and 1 <= group <= MAX_GROUP
    if not fits or page not in (0, *PAGES):
        return []
    found = [*select_specs(), *decode_specs(group, head_dim, DTYPES[dtype], page)]
    return found + (prefill_specs(group, head_dim, DTYPES[dtype], tile, page) if tile in TILES else [])


def missing(found: Iterable[Spec]) -> list[Spec]:
    """Those that `note` has not seen since the kernels' sources or TileLang changed."""
    return [spec for spec in found if not _mark(spec).exists()]


def note(spec: Spec) -> None:
    """Remembers that `spec` is in TileLang's cache."""
    path = _mark(spec)
    with contextlib.suppress(OSError):  # a cache that cannot be written to: the next start asks again
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def compile_ahead(found: Iterable[Spec], progress: Progress | None = None) -> None:
    """Compiles what is missing, in parallel processes. One that fails is left to the call that needs it."""
    with _lock:
        waiting = [spec for spec in missing(found) if str(spec) not in _tried]
        if not waiting or not tilelang.env.is_cache_enabled():  # nothing would remain of it
            return
        _tried.update(map(str, waiting))
        log.info("compiling %d kernels for this shape into %s", len(waiting), cache_dir())
        with progress(len(waiting)) if progress else contextlib.nullcontext() as advance:

            def done(spec: Spec, seconds: float, error: str) -> None:
                if not error:
                    note(spec)
                if advance:
                    advance()

            prebuild(waiting, done=done)


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256(f"{tilelang.__version__} {sys.platform} {platform.machine()}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _mark(spec: Spec) -> Path:
    name = hashlib.sha256(str(spec).encode()).hexdigest()[:16]
    return cache_dir() / "kascade-compiled" / _sources() / name
