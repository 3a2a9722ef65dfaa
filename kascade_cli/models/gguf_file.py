"""GGUF files: which one a name means, and what its header says. Reads kilobytes, never the weights."""

import re
import struct
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from kascade_cli.errors import KascadeError, require_extra

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
# Bounds that only a damaged file exceeds, so that one never asks for gigabytes of memory.
_MOST_ENTRIES, _LONGEST, _MOST_DIMENSIONS = 1 << 20, 1 << 26, 8
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table: `shape` in torch's order, `kind` ggml's name of the type, `start` in the file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (an array of strings as its length) and tensor table of a GGUF file whose data is all there."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own: `get("block_count")` is `llama.block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @cached_property
    def quantization(self) -> str | None:
        """What people call the file, `Q4_K_M`; the commonest block type if it does not say; None for plain floats."""
        from gguf.constants import LlamaFileType

        size: Counter[str] = Counter()
        for tensor in self.tensors:
            if tensor.kind not in _FLOATS:
                size[tensor.kind] += tensor.bytes
        if not size:
            return None
        named = {int(kind): kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType}
        return named.get(self.metadata.get("general.file_type"), size.most_common(1)[0][0])

    @cached_property
    def float_type(self) -> str | None:
        """What the weights were saved in, None if in blocks. Norms are float32 beside half-precision matrices."""
        kinds = {tensor.kind for tensor in self.tensors}
        if not kinds <= set(_FLOATS):
            return None
        return next(_FLOATS[kind] for kind in ("BF16", "F16", "F32") if kind in kinds or kind == "F32")


def find_gguf(source: str, name: str) -> Path | None:
    """The GGUF file that `source` is or, as a folder without other weights, holds; None for any other model.

    Errors say `name`. Raises KascadeError for a .gguf that is not there, a part of a split one, and a folder with
    several of them.
    """
    path = Path(source)
    if path.suffix.lower() == ".gguf":
        if path.is_file():
            return _whole(path, name)
        if path.is_dir():
            raise KascadeError(f"{name}: a folder; name the .gguf file")
        raise KascadeError(f"{name}: no such file. Of a GGUF on the hub, download the file and name it")
    if not path.is_dir():
        return None
    found = [entry for entry in sorted(path.glob("*.gguf")) if not entry.name.startswith("mmproj")]
    saved = (path / "config.json").is_file()
    if not found or saved and any(next(path.glob(pattern), None) for pattern in ("*.safetensors*", "*.bin*")):
        return None
    if len(found) > 1 and not all(_SHARD.search(entry.name) for entry in found):
        names = ", ".join(entry.name for entry in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise KascadeError(f"{name}: holds several models ({names}{more}); name the one file")
    return _whole(found[0], name)


def _whole(path: Path, name: str) -> Path:
    if _SHARD.search(path.name):
        raise KascadeError(
            f"{name}: {path.name} is a part of a split GGUF, which transformers cannot read; join the parts first "
            "(llama-gguf-split --merge)"
        )
    return path


def read_header(path: Path, name: str) -> GgufHeader:
    """Reads and checks what stands before the weights. `name` is the model's, for errors.

    Raises KascadeError if gguf is not installed, or the file is none, is damaged or ends too early.
    """
    sizes = _type_sizes()
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            if (magic := file.read(4)) != b"GGUF":
                what = "empty" if not magic else "not a GGUF file"
                raise KascadeError(f"{name}: {what} (one begins with the letters GGUF); is the download complete?")
            version, count, entries = _unpack(file, "<IQQ")
            if version not in _VERSIONS:
                shown = "of the other byte order" if version & 0xFFFF == 0 else f"version {version}"
                raise KascadeError(f"{name}: a GGUF {shown}; versions 2 and 3 can be read, little-endian")
            _bound(count, _MOST_ENTRIES)
            _bound(entries, _MOST_ENTRIES)
            metadata = dict(_entry(file) for _ in range(entries))
            table = [_tensor(file) for _ in range(count)]
            alignment = metadata.get("general.alignment", _ALIGNMENT)
            start = -(-file.tell() // alignment) * alignment
    except OSError as error:
        raise KascadeError(f"{name}: cannot be read: {error.strerror or error}") from error
    except (_Damaged, struct.error, UnicodeDecodeError, MemoryError, TypeError, ZeroDivisionError) as error:
        raise KascadeError(f"{name}: the GGUF's header is damaged or cut off; download the file again") from error
    if not isinstance(metadata.get("general.architecture"), str) or not table:
        raise KascadeError(f"{name}: a GGUF without weights or without general.architecture, not a language model")
    if (parts := metadata.get("split.count", 0)) and parts > 1:
        raise KascadeError(f"{name}: one of {parts} parts of a split GGUF; join them first (llama-gguf-split --merge)")
    tensors = []
    for tensor, shape, code, offset in table:
        if code not in sizes:
            raise KascadeError(f"{name}: {tensor} is of ggml type {code}, which the installed gguf does not know")
        kind, per_block, block = sizes[code]
        tensors.append(GgufTensor(tensor, shape, kind, start + offset, prod(shape) // per_block * block))
    if (end := max(tensor.start + tensor.bytes for tensor in tensors)) > length:
        raise KascadeError(
            f"{name}: cut off: {length:,} bytes of the {end:,} that its header promises; download the file again"
        )
    return GgufHeader(path, metadata, tuple(tensors))


class _Damaged(Exception):
    """A length or a type that no GGUF has."""


def _type_sizes() -> dict[int, tuple[str, int, int]]:
    """ggml's type -> (name, elements of a block, bytes of a block)."""
    constants = require_extra("gguf.constants", "gguf")
    return {int(kind): (kind.name, *size) for kind, size in constants.GGML_QUANT_SIZES.items()}


def _bound(value: int, most: int) -> int:
    if value > most:
        raise _Damaged
    return value


def _unpack(file: BinaryIO, form: str) -> tuple:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _text(file: BinaryIO) -> str:
    length = _bound(*_unpack(file, "<Q"), _LONGEST)
    data = file.read(length)
    if len(data) < length:
        raise _Damaged
    return data.decode()


def _entry(file: BinaryIO) -> tuple[str, Any]:
    key = _text(file)
    return key, _value(file, *_unpack(file, "<I"))


def _value(file: BinaryIO, kind: int) -> Any:
    if kind in _SCALARS:
        return _unpack(file, f"<{_SCALARS[kind]}")[0]
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        raise _Damaged
    inner, count = _unpack(file, "<IQ")
    _bound(count, _LONGEST)
    if inner in _SCALARS:
        return list(_unpack(file, f"<{count}{_SCALARS[inner]}"))
    if inner != _STRING:
        raise _Damaged
    for _ in range(count):
        file.seek(_bound(*_unpack(file, "<Q"), _LONGEST), 1)
    return count


def _tensor(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _text(file)
    dimensions = _bound(*_unpack(file, "<I"), _MOST_DIMENSIONS)
    shape = _unpack(file, f"<{dimensions}Q")
    return name, tuple(reversed(shape)), *_unpack(file, "<IQ")
