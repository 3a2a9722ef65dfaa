"""The folder `NAME.parts` of an unfinished capture: made, locked and removed without touching what is not ours.

It is ours if its `lock` file holds our marker, or if it is empty (a kill right after it was made). Only names that
we write are ever removed from it. A symbolic link, or a folder that holds anything else, is refused.
"""

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from kascade_cli.errors import KascadeError, UsageError

MARKER = b"kascade capture parts\n"
_LOCK = "lock"
_OURS = re.compile(r"[0-9]{6}\.(h5|tmp)|index\.tmp|joined\.tmp")


def parts_folder(path: Path) -> Path:
    """Where the finished prompts of an unfinished capture lie."""
    return path.with_name(path.name + ".parts")


def refuse_link(path: Path) -> None:
    """Raises UsageError if `path` is a symbolic link: what it points to is not ours to replace."""
    if path.is_symlink():
        raise UsageError(f"{path} is a symbolic link; name what it points to, or move it away")


def is_ours(folder: Path) -> bool:
    """Whether there is such a folder. Raises UsageError if something else stands in its place."""
    refuse_link(folder)
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UsageError(f"{folder} is in the way; move it away, or choose another --output")
    with os.scandir(folder) as entries:
        found = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    foreign = sorted(name for name, plain in found.items() if not plain or not _known(name))
    if foreign or (found and not _marked(folder, alone=len(found) == 1)):
        what = f"holds {ascii(foreign[0])}" if foreign else "is not marked as one"
        raise UsageError(
            f"{folder} is not a folder that kascade made ({what}); move it away, or choose another --output"
        )
    return True


def _known(name: str) -> bool:
    return name == _LOCK or _OURS.fullmatch(name) is not None


def _marked(folder: Path, alone: bool) -> bool:
    """Whether the lock file bears our marker; an empty one that is `alone` was made right before a kill."""
    try:
        with open(folder / _LOCK, "rb") as file:
            head = file.read(len(MARKER) + 1)
    except OSError:
        return False
    return head == MARKER or (not head and alone)


def clear(folder: Path, *, finished: bool) -> None:
    """Removes half-written files, and the `finished` parts too, from a folder that `is_ours`."""
    for name in sorted(os.listdir(folder)):
        if _OURS.fullmatch(name) and (finished or name.endswith(".tmp")):
            path = folder / name
            if stat.S_ISREG(path.lstat().st_mode):
                os.unlink(path)


def remove(folder: Path) -> None:
    """Removes the folder and all that we wrote there, the marker last. What others put there stays."""
    if not is_ours(folder):
        return
    clear(folder, finished=True)
    (folder / _LOCK).unlink(missing_ok=True)
    os.rmdir(folder)


@contextlib.contextmanager
def only_writer(folder: Path, what: str) -> Iterator[Callable[[], None]]:
    """Makes `folder` if need be and holds a lock on it that dies with the process.

    What it gives shares the lock from then on with processes that write beside this one (`writer_beside`). Raises
    KascadeError if another process has it, UsageError if the folder is not ours.
    """
    while True:
        if not is_ours(folder):
            folder.mkdir(exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            handle = os.open(folder / _LOCK, flags, 0o666)
        except FileNotFoundError:
            continue  # the folder was removed by a writer that has just ended
        with os.fdopen(handle, "r+b") as file:
            _lock(file, what)
            if not _still_there(file.fileno(), folder / _LOCK):
                continue  # that writer removed it between our two steps
            if not file.read(1):
                file.write(MARKER)
                file.flush()
                os.fsync(file.fileno())
            yield lambda file=file: _lock(file, what, shared=True)
            return


@contextlib.contextmanager
def writer_beside(folder: Path, what: str) -> Iterator[None]:
    """Shares the lock that another process of this run holds and shares; as long as one of them is there, nobody else
    writes. Raises KascadeError if the folder is not seen here, or another run has it.
    """
    try:
        file = open(folder / _LOCK, "rb")  # noqa: SIM115
    except OSError as error:
        raise KascadeError(
            f"{folder} is not seen by every process: name an --output in a folder that all of them share"
        ) from error
    with file:
        _lock(file, what, shared=True)
        yield


def _lock(file, what: str, shared: bool = False) -> None:
    try:
        import fcntl
    except ImportError:  # no flock on this system: go without
        return
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise KascadeError(f"another process is writing {what}; wait for it, or stop it") from error
    except OSError:
        pass  # a network file system without locks


def being_written(folder: Path) -> bool:
    """Whether a process holds the lock right now."""
    try:
        with open(folder / _LOCK, "rb") as file:
            _lock(file, "")
    except KascadeError:
        return True
    except OSError:
        pass
    return False


def _still_there(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except OSError:
        return False
