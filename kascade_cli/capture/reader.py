"""Reading a capture, finished or not. Imports no torch. Import it through `kascade_cli.capture.store`."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kascade_cli.errors import KascadeError

SCHEMA_VERSION = 1
# Root attributes: name -> type. JSON ones are stored as text and read back as objects.
ATTRIBUTES = {
    "schema_version": int, "tool_version": str, "model_name": str, "model_fingerprint": str,
    "layers": int, "query_heads": int, "kv_heads": int, "head_dim": int, "tile": int, "seed": int,
    "dtype": str, "device": str, "dev_set_name": str, "dev_set_sha256": str, "num_prompts": int,
    "max_length": int,
}  # fmt: skip
JSON_ATTRIBUTES = ("options", "versions", "top_mass_keys")


def token_sha256(tokens: list[int] | np.ndarray) -> str:
    """sha256 of token ids as little-endian int64."""
    return hashlib.sha256(np.asarray(tokens, "<i8").tobytes()).hexdigest()


def prompt_id(index: int) -> str:
    """17 -> `000017`."""
    return f"{index:06d}"


@dataclass(frozen=True)
class Prompt:
    """One finished prompt of an open capture.

    tiles int32 [T, 2] (start, length; length 1: a decode row), importance f32 [Lp], top_mass f32 [Lp, H, K].
    """

    id: str
    n_tokens: int
    n_prompt_tokens: int
    token_ids_sha256: str
    tiles: np.ndarray
    importance: np.ndarray
    top_mass: np.ndarray
    mass: h5py.Dataset

    def read_tile(self, t: int) -> np.ndarray:
        """Pooled mass of tile `t`: f16 [Lp, G, n_tokens]. Raises KascadeError if the data are damaged."""
        with _readable(f"{self.mass.file.filename}: prompt {self.id}"):
            return self.mass[:, t]


class Capture:
    """An open capture, complete or not. Iterates over its finished prompts; a context manager.

    `meta` holds the root attributes (JSON ones decoded), `profiled_layers` the absolute layer index of each
    position on axis 0 of the data, `prompts` the ids of the finished prompts in order.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self._file = path, file
        self.meta = _read_meta(path, file)
        self.profiled_layers: list[int] = [int(layer) for layer in file["profiled_layers"][:]]
        self.prompts: list[str] = [name for name in sorted(file["prompts"]) if _is_complete(file, name)]

    @property
    def has_parts(self) -> bool:
        """Whether the prompts still lie in files of their own beside this one."""
        links = (self._file["prompts"].get(name, getlink=True) for name in self._file["prompts"])
        return any(isinstance(link, h5py.ExternalLink) for link in links)

    @property
    def complete(self) -> bool:
        """Whether every prompt of the dev set is in."""
        return len(self.prompts) == self.meta["num_prompts"]

    def prompt(self, name: str) -> Prompt:
        """The finished prompt with this id. Raises KascadeError if it is missing or damaged."""
        if name not in self.prompts:
            raise KascadeError(f"{self.path}: no finished prompt {name}")
        with _readable(f"{self.path}: prompt {name}"):
            group = self._file["prompts"][name]
            found = Prompt(
                id=name,
                n_tokens=int(group.attrs["n_tokens"]),
                n_prompt_tokens=int(group.attrs["n_prompt_tokens"]),
                token_ids_sha256=str(group.attrs["token_ids_sha256"]),
                tiles=group["tiles"][:],
                importance=group["importance"][:],
                top_mass=group["top_mass"][:],
                mass=group["mass"],
            )
        filters = found.mass.id.get_create_plist()
        if not all(h5py.h5z.filter_avail(filters.get_filter(i)[0]) for i in range(filters.get_nfilters())):
            raise KascadeError(f"{self.path} is compressed with Blosc: pip install 'kascade-cli[compress]'")
        expected = (len(self.profiled_layers), len(found.tiles), self.meta["kv_heads"], found.n_tokens)
        if found.mass.shape != expected:
            raise KascadeError(f"{self.path}: prompt {name}: mass has shape {found.mass.shape}, not {expected}")
        ends = found.tiles.sum(axis=1)
        if (found.tiles[:, 0] < 0).any() or (found.tiles[:, 1] < 1).any() or (ends > found.n_tokens).any():
            raise KascadeError(f"{self.path}: prompt {name}: a tile lies outside its {found.n_tokens} tokens")
        return found

    def __iter__(self) -> Iterator[Prompt]:
        return (self.prompt(name) for name in self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Capture":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_capture(path: str | Path) -> Capture:
    """Opens a capture for reading, also one that is being written (it shows the prompts finished so far).

    Raises KascadeError with one line if the file is missing, truncated, or not a capture.
    """
    path = Path(path)
    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401  (registers the Blosc filter)
    if not path.is_file():
        raise KascadeError(f"{path}: no such file" if not path.exists() else f"{path} is not a file")
    try:
        file = h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        raise KascadeError(f"{path}: {_open_problem(error)}") from error
    try:
        with _readable(str(path)):
            return Capture(path, file)
    except BaseException:
        file.close()
        raise


def _open_problem(error: OSError) -> str:
    text = " ".join(str(error).split())
    if "truncated" in text:
        return "truncated HDF5 file; copy it again, or capture again with --overwrite"
    if "signature not found" in text:
        return "not an HDF5 file; a capture is what `kascade profile` writes"
    return f"cannot be opened as HDF5: {text[:200]}"


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise KascadeError(f"{where}: damaged or not a capture ({text[:200]})") from error


def _read_meta(path: Path, file: h5py.File) -> dict[str, Any]:
    version = file.attrs.get("schema_version")
    if version is None or "prompts" not in file:
        raise KascadeError(f"{path}: an HDF5 file, but not a capture made by `kascade profile`")
    if int(version) != SCHEMA_VERSION:
        raise KascadeError(f"{path}: capture format {int(version)}, this kascade reads {SCHEMA_VERSION}; upgrade it")
    missing = [name for name in (*ATTRIBUTES, *JSON_ATTRIBUTES) if name not in file.attrs]
    if missing:
        raise KascadeError(f"{path}: attribute {missing[0]} is missing, so this is not a capture")
    meta: dict[str, Any] = {name: kind(file.attrs[name]) for name, kind in ATTRIBUTES.items()}
    return meta | {name: json.loads(file.attrs[name]) for name in JSON_ATTRIBUTES}


def _is_complete(file: h5py.File, name: str) -> bool:
    try:
        return bool(file["prompts"][name].attrs.get("complete", False))
    except (OSError, KeyError):  # a link to a part that is gone
        return False
