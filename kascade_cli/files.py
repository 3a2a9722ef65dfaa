"""Writing files so that a reader, a kill or a second process never meets half of one. Knows no terminal."""

import contextlib
import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from kascade_cli.errors import KascadeError, UsageError

_LONGEST_NAME = 255  # bytes of one part of a path, on nearly every file system
# What open(O_TMPFILE) says where the kernel or the file system has no files without a name.
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def check_name(name: str | Path, what: str = "") -> None:
    """Raises UsageError for a path that no system call takes: a NUL in it, or a part longer than 255 bytes."""
    text = os.fspath(name)
    place = f"{what}: " if what else ""
    if "\x00" in text:
        raise UsageError(f"{place}a name cannot hold a NUL character")
    try:
        longest = max(os.fsencode(text).split(os.fsencode(os.sep)), key=len)
    except UnicodeEncodeError as error:
        raise UsageError(f"{place}'{text}' cannot be a name: it is no valid text") from error
    if len(longest) > _LONGEST_NAME or len(text) > 4000:
        raise UsageError(
            f"{place}'{text[:40]}...' is too long for a name: {len(longest)} bytes, at most {_LONGEST_NAME}"
        )


def check_output(path: str | Path, overwrite: bool, inputs: Iterable[str | Path | None] = ()) -> Path:
    """Refuses an output that exists (without `overwrite`), that is one of the files it is made from (with it too), or
    whose folder does not or cannot be written to.

    A link counts as existing, wherever it leads. inputs: what may name a file, or None. Raises UsageError.
    """
    path = Path(path)
    check_name(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if path.exists() and any(given is not None and _is_file(given) and path.samefile(given) for given in inputs):
        raise UsageError(f"{path} would replace a file that it is made from: name another output")
    if os.path.lexists(path) and not overwrite:
        raise UsageError(_exists(path))
    if not path.parent.is_dir():
        raise UsageError(f"folder {path.parent} does not exist; create it first")
    _check_folder(path.parent)
    return path


def _is_file(name: str | Path) -> bool:
    """Whether what may as well be the name of a model or a task is a file here."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long for a name, or no name
        return False


def check_output_folder(path: str | Path) -> Path:
    """Refuses a folder for outputs that is a file, or where it cannot be made or written to. Raises UsageError."""
    path = Path(path)
    check_name(path)
    if os.path.lexists(path) and not path.is_dir():
        raise UsageError(f"{path} is {'a file' if path.exists() else 'a link to nothing'}; name a folder")
    _check_folder(next(folder for folder in (path, *path.absolute().parents) if folder.exists()))
    return path


def _exists(path: Path) -> str:
    what = "exists" if path.exists() else "is a link to a file that is not there"
    return f"{path} {what}; pass --overwrite to replace it"


def _check_folder(folder: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"cannot write into the folder {folder}: {disk_reason(error, folder)}") from error


def read_bounded(path: str | Path, most: int, what: str) -> bytes:
    """The bytes of a file of at most `most` bytes. Raises KascadeError, naming it as `what`, for anything else.

    Pipes and devices, which may block or never end, are not opened for reading.
    """
    where = f"cannot read {what} {path}"
    try:
        check_name(path)
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise KascadeError(f"{where}: it is {'a folder' if os.path.isdir(path) else 'not a regular file'}")
            data = file.read(most + 1)
    except OSError as error:
        raise KascadeError(f"{where}: {error.strerror or error}") from error
    if len(data) > most:
        raise KascadeError(f"{where}: it has more than {most} bytes, so it is none")
    return data


def disk_reason(error: OSError, folder: str | Path) -> str:
    """Why writing into `folder` failed; tells a full disk from one without free inodes and from a quota."""
    if error.errno == errno.ENOSPC:
        with contextlib.suppress(OSError, AttributeError):
            disk = os.statvfs(folder)
            if disk.f_files and not disk.f_favail:
                return "the disk has no free inodes, it holds too many files"
        return "the disk is full"
    if error.errno == errno.EDQUOT:
        return "the disk quota is used up"
    return error.strerror or str(error)


def atomic_write(path: str | Path, data: str | bytes, *, overwrite: bool = True) -> None:
    """Writes a file whole or not at all. Raises KascadeError if that fails, and leaves nothing behind.

    Without `overwrite`, of several processes that write the same `path` one succeeds and the others raise
    UsageError, as for any `path` that exists. With it, a link is replaced by the file and its target left alone.
    """
    path = Path(path)
    try:
        payload = data.encode() if isinstance(data, str) else data
    except UnicodeEncodeError as error:
        raise KascadeError(f"cannot write {path}: the text holds half a character ({error.reason})") from error
    try:
        with _nameless(path) as (handle, source):
            with os.fdopen(handle, "wb", closefd=False) as file:
                file.write(payload)
                file.flush()
                os.fsync(handle)
            _publish(handle, source, path, overwrite)
        _sync_folder(path.parent)
    except FileExistsError as error:
        raise UsageError(_exists(path)) from error
    except OSError as error:
        raise KascadeError(f"cannot write {path}: {disk_reason(error, path.parent)}") from error


@contextlib.contextmanager
def _nameless(path: Path) -> Iterator[tuple[int, str]]:
    """(descriptor, a name that it can be linked from) of a new file in `path`'s folder.

    Where the system can, the file has no name until it is linked, so that a kill leaves nothing. Elsewhere it has a
    temporary one and a lock that dies with the process; what dead processes left of this `path` is removed.
    """
    try:
        handle = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_TMPFILE:
            raise
        handle = -1
    source = f"/proc/self/fd/{handle}"
    if handle >= 0 and os.path.exists(source):
        try:
            yield handle, source
        finally:
            os.close(handle)
        return
    if handle >= 0:
        os.close(handle)
    _sweep(path)
    handle, source = _locked(path)
    try:
        yield handle, source
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(source)
        os.close(handle)


def _temporary(path: Path) -> str:
    # Cut, so that a name of 255 bytes has a temporary one too.
    return os.path.join(path.parent, f".{path.name[:40]}.{secrets.token_hex(6)}.kascade")


def _locked(path: Path) -> tuple[int, str]:
    """Makes and locks a temporary file; again if another process swept it away in between."""
    while True:
        source = _temporary(path)
        handle = os.open(source, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _lock(handle, wait=True)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(source)):
                return handle, source
        os.close(handle)


def _lock(handle: int, *, wait: bool) -> bool:
    """Whether `handle` could be locked; True where there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return wait  # without locks nothing is known of other processes: their files stay
    return True


def _sweep(path: Path) -> None:
    """Removes temporary files of this `path` whose writers are dead."""
    prefix = f".{path.name[:40]}."
    with contextlib.suppress(OSError):
        for entry in os.scandir(path.parent):
            if not (entry.name.startswith(prefix) and entry.name.endswith(".kascade")):
                continue
            with contextlib.suppress(OSError):
                handle = os.open(entry.path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
                try:
                    if _lock(handle, wait=False):
                        os.unlink(entry.path)
                finally:
                    os.close(handle)


def _publish(handle: int, source: str, path: Path, overwrite: bool) -> None:
    """Gives the file `source` the name `path`. Raises FileExistsError if it is taken and `overwrite` is not set."""
    nameless = source.startswith("/proc/")
    try:
        _link(handle, source, path)
        return
    except FileExistsError:
        if not overwrite:
            raise
    except OSError as error:
        if nameless or error.errno not in _NO_LINKS:
            raise
        if not overwrite:  # claim the name; the rename below replaces the empty file
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    if nameless:
        named = _temporary(path)
        _link(handle, source, named)
        source = named
    try:
        os.replace(source, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(source)
        raise


def _link(handle: int, source: str, path: str | Path) -> None:
    # Only linkat() follows the link in /proc, and Python calls it only where a folder's descriptor is given; of an
    # absolute path the descriptor means nothing.
    os.link(os.path.abspath(source), path, src_dir_fd=handle)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
