"""What writer and reader of a capture agree on: names, limits, checksums, seals. docs/capture-format.md has the words.

Imports no torch.
"""

import hashlib
import json
import re
import zlib
from typing import Any

import h5py
import numpy as np

SCHEMA_VERSION = 2
# Root attributes: name -> type. JSON ones are stored as text and read back as objects.
ATTRIBUTES = {
    "schema_version": int, "tool_version": str, "model_name": str, "model_fingerprint": str,
    "layers": int, "query_heads": int, "kv_heads": int, "head_dim": int, "tile": int, "seed": int,
    "dtype": str, "device": str, "dev_set_name": str, "dev_set_sha256": str, "num_prompts": int,
    "max_length": int,
}  # fmt: skip
JSON_ATTRIBUTES = ("options", "versions", "top_mass_keys")
# Far beyond any model; what a file says within them is safe to loop over and to allocate for.
RANGES = {
    "layers": (1, 1024), "query_heads": (1, 1024), "kv_heads": (1, 1024), "head_dim": (1, 4096), "tile": (2, 1 << 16),
    "seed": (0, (1 << 63) - 1), "num_prompts": (1, 999_999), "max_length": (1, (1 << 31) - 1),
}  # fmt: skip
MAX_TEXT = 4096  # bytes of a name
MAX_JSON = 1 << 15  # bytes of a JSON attribute
MAX_TOP_KEYS = 64
_PROMPT_ID = re.compile(r"[0-9]{6}")


def token_sha256(tokens: list[int] | np.ndarray) -> str:
    """sha256 of token ids as little-endian int64."""
    return hashlib.sha256(np.asarray(tokens, "<i8").tobytes()).hexdigest()


def prompt_id(index: int) -> str:
    """17 -> `000017`."""
    return f"{index:06d}"


def is_prompt_id(name: str) -> bool:
    return _PROMPT_ID.fullmatch(name) is not None


def compression() -> dict[str, Any]:
    """Dataset options of everything stored. Any HDF5 library reads it, and zlib never crashes on bad input."""
    return {"compression": "gzip", "compression_opts": 1, "shuffle": True, "fletcher32": True}


def mass_chunk(mass: np.ndarray, end: int) -> bytes:
    """One tile's mass f16 [G, n], zero from key `end` on, as HDF5's shuffle, gzip and Fletcher32 would leave it.

    The low bytes of the visible keys are noise: they go in as they are, which inflates a third faster than level 1
    over everything and costs 2 % of the size.
    """
    low, high = (np.ascontiguousarray(plane) for plane in np.moveaxis(_octets(mass), -1, 0))
    parts = [b"\x78\x01"]
    for row in low:
        for level, data in ((0, row[:end]), (1, row[end:])):
            packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
            parts += packer.compress(data), packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    parts += packer.compress(high), packer.flush()
    parts.append(zlib.adler32(high, zlib.adler32(low)).to_bytes(4, "big"))
    packed = b"".join(parts)
    return packed + fletcher32(packed).to_bytes(4, "little")


def _octets(mass: np.ndarray) -> np.ndarray:
    """f16 [G, n] -> uint8 [G, n, 2], the low byte first."""
    return np.ascontiguousarray(mass, "<f2").view(np.uint8).reshape(*mass.shape, 2)


def fletcher32(data: bytes) -> int:
    """HDF5's checksum: 16-bit words, high byte first, summed in ones' complement; an odd byte is a high one."""
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2").astype(np.uint64)
    sums = int((words * np.arange(len(words), 0, -1, dtype=np.uint64)).sum()), int(words.sum())
    second, first = (value and (value - 1) % 0xFFFF + 1 for value in sums)  # zero is 0xFFFF, but for no sum at all
    return second << 16 | first


def clean_text(text: str) -> str:
    """What a capture keeps of a name: valid UTF-8 without NUL, at most `MAX_TEXT` bytes."""
    data = text.replace("\0", "\\0").encode("utf-8", "backslashreplace")
    return data[:MAX_TEXT].decode("utf-8", "ignore")


def put_text(attributes: h5py.AttributeManager, name: str, text: str) -> None:
    """Stores text at a fixed length, which HDF5 keeps under a checksum (text of variable length it does not)."""
    data = text.encode()
    attributes.create(name, np.bytes_(data), dtype=h5py.string_dtype("utf-8", max(1, len(data))))


def put_array(group: h5py.Group, name: str, values: np.ndarray) -> None:
    """Stores a small array as one chunk under checksums."""
    group.create_dataset(name, data=values, chunks=values.shape, **compression())


def capture_key(meta: dict[str, Any], profiled_layers: list[int]) -> str:
    """What a prompt must have been made from to belong to a capture: model, dev set, options, layers."""
    identity = [meta["model_fingerprint"], meta["dev_set_sha256"], meta["options"], list(profiled_layers)]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def root_seal(meta: dict[str, Any], profiled_layers: list[int]) -> str:
    """sha256 of the root: JSON of its attributes and layers, keys sorted."""
    known = {name: meta[name] for name in (*ATTRIBUTES, *JSON_ATTRIBUTES)}  # names are `clean_text`
    return hashlib.sha256(json.dumps([known, list(profiled_layers)], sort_keys=True).encode()).hexdigest()


def prompt_seal(
    key: str, name: str, token_ids_sha256: str, n_tokens: int, n_prompt_tokens: int, *arrays: np.ndarray
) -> str:
    """sha256 of a prompt's place and small data: JSON of the first five, then the bytes of tiles, importance and
    top_mass. The mass has checksums of its own.
    """
    head = json.dumps([key, name, token_ids_sha256, n_tokens, n_prompt_tokens])
    return hashlib.sha256(head.encode() + b"".join(array.tobytes() for array in arrays)).hexdigest()
