"""Writing files that a crash, a kill or a full disk cannot leave half done under their final name."""

import contextlib
import errno
import io
import os
from pathlib import Path

import h5py


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


def disk_reason(error: OSError, folder: Path) -> str:
    """Why a write into `folder` failed, in words. ENOSPC also stands for a disk without inodes."""
    if error.errno == errno.EDQUOT:
        return "the disk quota is used up"
    if error.errno == errno.EFBIG:
        return "the file would be larger than this system allows"
    if error.errno != errno.ENOSPC:
        return f"cannot write ({error.strerror or error})"
    with contextlib.suppress(OSError, AttributeError):
        room = os.statvfs(folder)
        if room.f_files and not room.f_favail and room.f_bavail:
            return "the disk takes no more files (it is out of inodes)"
    return "the disk is full"
