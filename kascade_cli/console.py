"""Terminal output and the parsing of option values, in one place for all commands."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from kascade_cli.errors import KascadeError, UsageError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def progress(description: str = "", *, total: float | None = None):
    """A rich Progress on stderr with rate and time left; draws nothing when stderr is not a terminal.

    With `description`, a task is added at once and its id is the object's `first` attribute.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
    )
    bar.first = bar.add_task(description, total=total) if description else None
    return bar


def print_json(document: Any) -> None:
    """Prints one JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def parse_size(text: str | int, option: str = "") -> int:
    """`32k` -> 32768, `1m` -> 1048576, `4096` -> 4096. Raises UsageError, naming `option`, for anything else."""
    value = str(text).strip().lower()
    factor = {"k": 1024, "m": 1024**2}.get(value[-1:], 1)
    digits = value[:-1] if factor > 1 else value
    if not digits.isdecimal() or int(digits) < 1:
        place = f"{option}: " if option else ""
        raise UsageError(f"{place}'{text}' is not a size: use a whole number, 1 or more, such as 4096 or 32k")
    return int(digits) * factor


def parse_sizes(text: str, option: str = "") -> list[int]:
    """`1k,2k` -> [1024, 2048]. Raises UsageError, naming `option`, for anything else."""
    return [parse_size(part, option) for part in text.split(",")]


def parse_ints(text: str) -> list[int]:
    """`0,2,8` -> [0, 2, 8]. Raises UsageError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"'{text}' is not a list of whole numbers such as 0,2,8") from error


def parse_floats(text: str) -> list[float]:
    """`0.05,0.1` -> [0.05, 0.1]. Raises UsageError for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"'{text}' is not a list of numbers such as 0.05,0.1") from error


def format_size(length: int) -> str:
    """1024 -> `1k`; what `parse_size` reads back."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def format_bytes(count: float) -> str:
    """A byte count for people: `1.5 MB` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def check_output(path: str | Path, overwrite: bool) -> Path:
    """Refuses an output that exists (without `overwrite`), or whose folder does not or cannot be written to.

    Raises UsageError.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; pass --overwrite to replace it")
    if not path.parent.is_dir():
        raise UsageError(f"folder {path.parent} does not exist; create it first")
    _check_folder(path.parent)
    return path


def check_output_folder(path: str | Path) -> Path:
    """Refuses a folder for outputs that is a file, or where it cannot be made or written to. Raises UsageError."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; name a folder")
    _check_folder(next(folder for folder in (path, *path.absolute().parents) if folder.exists()))
    return path


def _check_folder(folder: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"cannot write into the folder {folder}: {_reason(error)}") from error


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Writes beside `path` and renames, so that a reader never sees half a file. Raises KascadeError."""
    path = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    try:
        _replace(path, payload)
    except OSError as error:
        raise KascadeError(f"cannot write {path}: {_reason(error)}") from error


def _replace(path: Path, payload: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def compiling(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar over kernels that are compiled; what it gives is called after each."""
    with progress("compiling kernels", total=total) as bar:
        yield lambda: bar.advance(bar.first)
