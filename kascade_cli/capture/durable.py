"""Writing files that a crash, a kill or a full disk cannot leave half done under their final name."""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py

from kascade_cli.errors import KascadeError


class _Patient(io.FileIO):
    """A file for HDF5's file-object driver that keeps the first write error and goes on.

    HDF5 cannot close a file whose flush failed: it stays open inside the library, and a later call crashes
    the process. So the library never sees a failed write; whoever opened the file asks `error` and discards
    it.
    """

    error: OSError | None = None

    def write(self, data) -> int:
        rest = memoryview(data).cast("B")
        total = len(rest)
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = self.error or error
            super().seek(len(rest), os.SEEK_CUR)
        return total

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0


class DurableFile:
    """An HDF5 file written under a temporary name; `commit` fsyncs it and renames it onto `path`.

    `check` raises the OSError (disk full, quota, ...) that a write met so far; `discard` gives the file up.
    """

    def __init__(self, path: Path, temporary: Path) -> None:
        self.path, self.temporary = path, temporary
        self._raw = _Patient(str(temporary), "w+")
        self.h5 = h5py.File(self._raw, "w", libver=("v110", "v110"))

    def check(self) -> None:
        if self._raw.error is not None:
            raise self._raw.error

    def reserve(self, size: int) -> None:
        """Claims `size` bytes of disk now, so that later writes cannot run out. Raises OSError."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._raw.fileno(), 0, size)

    def commit(self) -> None:
        try:
            self.h5.close()
            self.check()
            os.fsync(self._raw.fileno())
            self._raw.close()
            os.replace(self.temporary, self.path)
        except BaseException:
            self.discard()
            raise
        sync_folder(self.path.parent)

    def discard(self) -> None:
        with contextlib.suppress(Exception):
            self.h5.close()
        with contextlib.suppress(OSError):
            self._raw.close()
        self.temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut (where the system can)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(folder: Path, what: str) -> Iterator[None]:
    """Holds a lock on `folder` that dies with the process. Raises KascadeError if another process has it."""
    try:
        import fcntl
    except ImportError:  # no flock on this system: go without
        yield
        return
    with open(folder / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise KascadeError(f"another process is writing {what}; wait for it, or stop it") from error
        except OSError:
            pass  # a network file system without locks
        yield
