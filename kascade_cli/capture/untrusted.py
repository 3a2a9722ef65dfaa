"""HDF5 objects of a file that nobody vouches for. Every function raises KascadeError with one line.

Only what `kascade profile` writes is opened: groups and datasets behind hard links, chunked, of exactly the expected
type, size and filters. Links to elsewhere, external storage and virtual datasets are refused before they are
followed, and sizes are checked before anything of that size is made. Chunks are inflated here with zlib, whose own
checksum is verified, so HDF5's filters never see the file's data.
"""

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from kascade_cli.errors import KascadeError

TYPES = {"<f2": h5py.h5t.IEEE_F16LE, "<f4": h5py.h5t.IEEE_F32LE, "<i4": h5py.h5t.STD_I32LE}
_FILTERS = (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32)
_RATIO = 1040  # deflate makes nothing smaller than 1/1032
_CHECKSUM = 4  # bytes that Fletcher32 appends to a chunk


@contextlib.contextmanager
def readable(where: str) -> Iterator[None]:
    """Turns whatever HDF5, h5py, NumPy or json raise over bad data into one line that begins with `where`."""
    try:
        yield
    except KascadeError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise KascadeError(f"{where}: damaged or not a capture ({text[:200]})") from error


def open_file(path: Path) -> h5py.File:
    """Opens a regular file for reading."""
    if not path.is_file():
        raise KascadeError(f"{path}: no such file" if not path.exists() else f"{path} is not a file")
    try:
        return h5py.File(path, "r", locking="best-effort")
    except Exception as error:
        raise KascadeError(f"{path}: {_open_problem(error)}") from error


def _open_problem(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "truncated" in text:
        return "truncated HDF5 file; copy it again, or capture again with --overwrite"
    if "signature not found" in text:
        return "not an HDF5 file; a capture is what `kascade profile` writes"
    return f"cannot be opened as HDF5: {text[:200]}"


def attribute(owner: h5py.Group, name: str, kind: type, where: str, limit: int = 0) -> int | str | bool:
    """A scalar attribute: int, bool, or text of fixed length up to `limit` bytes."""
    with readable(f"{where}: attribute {name}"):
        if not h5py.h5a.exists(owner.id, name.encode()):
            raise KascadeError(f"{where}: attribute {name} is missing, so this is not a capture")
        found = h5py.h5a.open(owner.id, name.encode())
        if found.shape != () or found.get_space().get_simple_extent_type() != h5py.h5s.SCALAR:
            raise KascadeError(f"{where}: attribute {name} is not a single value")
        kinds = {int: "iu", str: "S", bool: "b"}[kind]
        if found.dtype.kind not in kinds or (kind is str and found.get_type().is_variable_str()):
            raise KascadeError(f"{where}: attribute {name} is not {_NAMES[kind]}")
        if kind is str and found.dtype.itemsize > limit:
            raise KascadeError(f"{where}: attribute {name} is longer than {limit} bytes")
        value = np.empty((), found.dtype)
        found.read(value)
        return value[()].decode("utf-8") if kind is str else kind(value[()])


_NAMES = {int: "a whole number", str: "text of a fixed length", bool: "true or false"}


def child(group: h5py.Group, name: str, kind: type, where: str) -> h5py.Group | h5py.Dataset:
    """The group or dataset `name`, if it lies in this file."""
    with readable(f"{where}: {name}"):
        encoded = name.encode()
        if not group.id.links.exists(encoded):
            raise KascadeError(f"{where}: {name} is missing, so this is not a capture")
        if group.id.links.get_info(encoded).type != h5py.h5l.TYPE_HARD:
            raise KascadeError(f"{where}: {name} is a link to somewhere else, which a capture does not have")
        wanted = h5py.h5g.GroupID if kind is h5py.Group else h5py.h5d.DatasetID
        found = h5py.h5o.open(group.id, encoded)
        if not isinstance(found, wanted):
            raise KascadeError(f"{where}: {name} is not a {'group' if kind is h5py.Group else 'dataset'}")
        return kind(found)


def dataset(group: h5py.Group, name: str, dtype: str, rank: int, where: str) -> h5py.Dataset:
    """A dataset of `dtype` with `rank` axes, stored the way captures are. Nothing of it is read yet."""
    found = child(group, name, h5py.Dataset, where)
    with readable(f"{where}: {name}"):
        plist = found.id.get_create_plist()
        if plist.get_layout() != h5py.h5d.CHUNKED or plist.get_external_count():
            raise KascadeError(f"{where}: {name} is not stored in chunks inside the file, as captures are")
        if tuple(plist.get_filter(i)[0] for i in range(plist.get_nfilters())) != _FILTERS:
            raise KascadeError(f"{where}: {name} is not stored with shuffle, gzip and Fletcher32, as captures are")
        if not found.id.get_type().equal(TYPES[dtype]):
            raise KascadeError(f"{where}: {name} is not {np.dtype(dtype).name}")
        shape, chunks = found.shape, found.chunks
        if len(shape) != rank or 0 in shape:
            raise KascadeError(f"{where}: {name} has shape {_short(shape)}, not {rank} axes with something in them")
        split = 2 if rank == 4 else 0  # the mass: a chunk for every (layer, tile); the rest: one chunk
        if chunks != (1,) * split + shape[split:]:
            raise KascadeError(f"{where}: {name} has chunks {_short(chunks)}, not as captures have")
        if found.id.get_storage_size() * _RATIO < _size(shape, dtype):
            raise KascadeError(f"{where}: {name} has shape {_short(shape)}, but not the data for it")
        return found


def _size(shape: tuple[int, ...], dtype: str) -> int:
    size = np.dtype(dtype).itemsize
    for length in shape:
        size *= int(length)
    return size


def _short(shape: tuple[int, ...]) -> str:
    return str(tuple(int(length) for length in shape))[:60]


def small(group: h5py.Group, name: str, dtype: str, rank: int, where: str) -> np.ndarray:
    """All of a dataset that is one chunk."""
    found = dataset(group, name, dtype, rank, where)
    return chunk(found, (0,) * rank, where)


def chunk(stored: h5py.Dataset, position: tuple[int, ...], where: str) -> np.ndarray:
    """The chunk that begins at `position`, without its leading axes of length 1 if it is not the whole dataset."""
    shape = stored.chunks if stored.chunks == stored.shape else stored.chunks[2:]
    planes = inflate(stored, position, where)
    count = planes.shape[1]
    out = np.empty((count, len(planes)), np.uint8)
    out[:] = planes.T
    return out.reshape(-1).view(stored.dtype).reshape(shape)


def inflate(stored: h5py.Dataset, position: tuple[int, ...], where: str) -> np.ndarray:
    """The bytes of a chunk as they were compressed: uint8 [itemsize, values], one plane for each byte of a value.

    `stored` must come from `dataset`. Raises KascadeError if the chunk is missing or damaged.
    """
    width, size = stored.dtype.itemsize, _size(stored.chunks, stored.dtype.str)
    with readable(where):
        info = stored.id.get_chunk_info_by_coord(position)
        # Level 1 stores what does not compress, at five bytes in 16 kB; a size beyond that is not one of ours.
        if not info.size or info.filter_mask or not _CHECKSUM < info.size <= size + size // 1000 + 1024:
            raise KascadeError(f"{where}: missing data, or data of a wrong size; the file is damaged")
        _, data = stored.id.read_direct_chunk(position)
        inflater = zlib.decompressobj()
        try:
            plain = inflater.decompress(data, size + 1)
        except zlib.error as error:
            raise KascadeError(f"{where}: unreadable, the file is damaged ({error})") from error
        if len(plain) != size or not inflater.eof or len(inflater.unused_data) != _CHECKSUM:
            raise KascadeError(f"{where}: unreadable, the file is damaged (a chunk has another length)")
        return np.frombuffer(plain, np.uint8).reshape(width, -1)
