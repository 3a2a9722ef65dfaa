"""The capture file: how it is written (and survives kills), and how it is read. Imports no torch.

While a capture is being made, every prompt is a file of its own in `NAME.parts/`, written under a temporary name,
fsynced and renamed; `NAME` itself is a small index with links to them, replaced atomically. So `NAME` can be opened
at any moment, and shows exactly the finished prompts. When the last prompt is in, the parts are joined into one plain
HDF5 file that replaces the index. The format is described in docs/capture-format.md.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kascade_cli.capture.durable import DurableFile, only_writer, remove, sync_folder
from kascade_cli.errors import KascadeError, UsageError

SCHEMA_VERSION = 1
# Root attributes: name -> type. JSON ones are stored as text and read back as objects.
_ATTRIBUTES = {
    "schema_version": int, "tool_version": str, "model_name": str, "model_fingerprint": str, "layers": int,
    "query_heads": int, "kv_heads": int, "head_dim": int, "tile": int, "seed": int, "dtype": str, "device": str,
    "dev_set_name": str, "dev_set_sha256": str, "num_prompts": int, "max_length": int,
}  # fmt: skip
_JSON_ATTRIBUTES = ("options", "versions", "top_mass_keys")
_INDEX_ROOM = 1 << 20  # what joining may need beyond the sum of the parts


def token_sha256(tokens: list[int] | np.ndarray) -> str:
    """sha256 of token ids as little-endian int64."""
    return hashlib.sha256(np.asarray(tokens, "<i8").tobytes()).hexdigest()


def parts_folder(path: Path) -> Path:
    """Where the finished prompts of an unfinished capture lie."""
    return path.with_name(path.name + ".parts")


def prompt_id(index: int) -> str:
    """17 -> `000017`."""
    return f"{index:06d}"


def compression() -> dict[str, Any]:
    """Dataset options: Blosc (zstd, bitshuffle) with hdf5plugin, else gzip and shuffle."""
    try:
        import hdf5plugin
    except ImportError:
        return {"compression": "gzip", "compression_opts": 4, "shuffle": True}
    return dict(hdf5plugin.Blosc(cname="zstd", clevel=3, shuffle=hdf5plugin.Blosc.BITSHUFFLE))


# --- reading --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One finished prompt of an open capture.

    tiles int32 [T, 2] (start, length; length 1 is a decode row), importance f32 [Lp], top_mass f32 [Lp, H, K].
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

    `meta` holds the root attributes (JSON ones decoded), `profiled_layers` the absolute layer indices of axis 0,
    `prompts` the ids of the finished prompts in order.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self._file = path, file
        self.meta = _read_meta(path, file)
        self.profiled_layers: list[int] = [int(layer) for layer in file["profiled_layers"][:]]
        self.prompts: list[str] = [name for name in sorted(file["prompts"]) if _is_complete(file, name)]

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
        expected = (len(self.profiled_layers), len(found.tiles), self.meta["kv_heads"], found.n_tokens)
        if found.mass.shape != expected:
            raise KascadeError(f"{self.path}: prompt {name}: mass has shape {found.mass.shape}, not {expected}")
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
    """Opens a capture for reading, also one that is being written (it then shows the prompts finished so far).

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
        return "truncated HDF5 file (a copy that broke off?); copy it again, or capture again with --overwrite"
    if "signature not found" in text:
        return "not an HDF5 file; a capture is what `kascade profile` writes"
    return f"cannot be opened as HDF5: {text[:200]}"


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if "required filter" in text or "filter" in text and "not registered" in text:
            line = "compressed with Blosc: pip install 'kascade-cli[compress]'"
        else:
            line = f"damaged or not a capture ({text[:200]})"
        raise KascadeError(f"{where}: {line}") from error


def _read_meta(path: Path, file: h5py.File) -> dict[str, Any]:
    version = file.attrs.get("schema_version")
    if version is None or "prompts" not in file:
        raise KascadeError(f"{path}: an HDF5 file, but not a capture made by `kascade profile`")
    if int(version) != SCHEMA_VERSION:
        raise KascadeError(f"{path}: capture format {int(version)}; this version reads {SCHEMA_VERSION}: upgrade kascade")
    missing = [name for name in (*_ATTRIBUTES, *_JSON_ATTRIBUTES) if name not in file.attrs]
    if missing:
        raise KascadeError(f"{path}: attribute {missing[0]} is missing, so this is not a capture")
    meta: dict[str, Any] = {name: kind(file.attrs[name]) for name, kind in _ATTRIBUTES.items()}
    return meta | {name: json.loads(file.attrs[name]) for name in _JSON_ATTRIBUTES}


def _is_complete(file: h5py.File, name: str) -> bool:
    try:
        return bool(file["prompts"][name].attrs.get("complete", False))
    except (OSError, KeyError):  # a link to a part that is gone
        return False


# --- writing --------------------------------------------------------------------------------------------------


class PromptWriter:
    """Takes one prompt's arrays as they are measured; `finish` makes them durable in one step."""

    def __init__(
        self, store: "CaptureStore", index: int, tokens: list[int], tiles: np.ndarray, n_tokens: int
    ) -> None:
        meta = store.meta
        self._store, self._index = store, index
        self._n_prompt, self._reserved = len(tokens), n_tokens
        name = prompt_id(index)
        self._file = DurableFile(store.part(index), store.parts / f"{name}.tmp")
        self._group = self._file.h5.create_group(f"prompts/{name}")
        self._group.attrs["token_ids_sha256"] = token_sha256(tokens)
        self._tiles = tiles
        self._shape = (len(store.profiled_layers), len(tiles), meta["kv_heads"], n_tokens)
        self._mass = self._dataset("mass", self._shape)

    def _dataset(self, name: str, shape: tuple[int, ...]) -> h5py.Dataset:
        chunks = (1, 1, *shape[2:])
        return self._group.create_dataset(name, shape, "f2", chunks=chunks, fillvalue=0, **compression())

    def write_mass(self, layer: int, first_tile: int, mass: np.ndarray) -> None:
        """Stores f16 [t, G, n] for tiles [first_tile, first_tile + t) of the layer at position `layer`; n may be
        shorter than the prompt (keys after it are 0). Raises OSError if the disk is full."""
        for offset, tile in enumerate(mass):
            row = np.zeros(self._shape[2:], np.float16)
            row[:, : tile.shape[-1]] = tile
            self._mass[layer, first_tile + offset] = row
        self._file.check()

    def finish(self, importance: np.ndarray, top_mass: np.ndarray, n_tokens: int | None = None) -> None:
        """Writes the rest, marks the prompt complete, and publishes it. `n_tokens` below the reserved number says
        that generation stopped early: rows of tokens that were never generated are dropped. Raises OSError."""
        n_tokens = self._reserved if n_tokens is None else n_tokens
        if n_tokens < self._reserved:
            self._shrink(n_tokens)
        self._group["tiles"] = self._tiles.astype(np.int32)
        self._group["importance"] = importance.astype(np.float32)
        self._group["top_mass"] = top_mass.astype(np.float32)
        self._group.attrs["n_tokens"] = n_tokens
        self._group.attrs["n_prompt_tokens"] = self._n_prompt
        self._group.attrs["complete"] = True
        self._file.commit()
        self._store._publish(self._index)

    def _shrink(self, n_tokens: int) -> None:
        kept = self._tiles.sum(axis=1) <= n_tokens
        count = int(kept.sum())
        if not kept[:count].all():
            raise ValueError("rows of generated tokens must come last")
        self._group.move("mass", "reserved")
        reserved, self._tiles = self._group["reserved"], self._tiles[kept]
        mass = self._dataset("mass", (self._shape[0], count, self._shape[2], n_tokens))
        for layer in range(self._shape[0]):
            for tile in range(count):
                mass[layer, tile] = reserved[layer, tile, :, :n_tokens]
        del self._group["reserved"]

    def discard(self) -> None:
        """Leaves no trace of this prompt."""
        self._file.discard()


class CaptureStore:
    """The writing side. Use `open_store`; `remaining` are the indices of prompts still to capture."""

    def __init__(self, path: Path, meta: dict[str, Any], profiled_layers: list[int]) -> None:
        self.path, self.meta, self.profiled_layers = path, meta, list(profiled_layers)
        self.parts = parts_folder(path)
        self.done: list[int] = []

    @property
    def remaining(self) -> list[int]:
        return [index for index in range(self.meta["num_prompts"]) if index not in set(self.done)]

    def part(self, index: int) -> Path:
        return self.parts / f"{prompt_id(index)}.h5"

    def begin(self, index: int, tokens: list[int], tiles: np.ndarray, n_tokens: int) -> PromptWriter:
        """Starts prompt `index`: `tiles` int32 [T, 2], `n_tokens` the prompt's length plus tokens to generate."""
        return PromptWriter(self, index, tokens, tiles, n_tokens)

    def _publish(self, index: int) -> None:
        self.done = sorted({*self.done, index})
        self._write_index()

    def _write_head(self, file: h5py.File) -> None:
        for name in _ATTRIBUTES:
            file.attrs[name] = self.meta[name]
        for name in _JSON_ATTRIBUTES:
            file.attrs[name] = json.dumps(self.meta[name], sort_keys=True)
        file["profiled_layers"] = np.asarray(self.profiled_layers, np.int32)
        file.create_group("prompts")

    def _write_index(self) -> None:
        index = DurableFile(self.path, self.parts / "index.tmp")
        try:
            self._write_head(index.h5)
            for number in self.done:
                name = prompt_id(number)
                link = h5py.ExternalLink(f"{self.parts.name}/{name}.h5", f"/prompts/{name}")
                index.h5["prompts"][name] = link
        except BaseException:
            index.discard()
            raise
        index.commit()

    def join(self) -> None:
        """Makes one plain file of the finished prompts and removes the parts.

        Raises OSError if the disk is too full for it; the capture stays complete and readable as index and parts.
        """
        size = sum(self.part(index).stat().st_size for index in self.done)
        joined = DurableFile(self.path, self.parts / "joined.tmp")
        try:
            joined.reserve(size + size // 50 + _INDEX_ROOM)
            self._write_head(joined.h5)
            for index in self.done:
                name = prompt_id(index)
                with h5py.File(self.part(index), "r", locking="best-effort") as part:
                    part.copy(part[f"prompts/{name}"], joined.h5["prompts"], name)
                joined.check()
        except BaseException:
            joined.discard()
            raise
        joined.commit()
        remove(self.parts)

    def discard_if_empty(self) -> None:
        """After a failure: removes what a run without any finished prompt would leave behind."""
        if not self.done:
            remove(self.path)
            remove(self.parts)


@contextlib.contextmanager
def open_store(
    path: Path, meta: dict[str, Any], profiled_layers: list[int], prompts_sha256: list[str], *,
    resume: bool = False, overwrite: bool = False,
) -> Iterator[CaptureStore]:  # fmt: skip
    """Opens `path` for writing: new, resumed (after checking that model, dev set and options are the same), or
    replaced. `prompts_sha256` are the `token_sha256` of the prompts in order. One process at a time.

    Raises UsageError if `path` exists and neither flag is given, or differs on resume; KascadeError if it is damaged.
    """
    store = CaptureStore(path, meta, profiled_layers)
    exists = path.exists() or store.parts.exists()
    if exists and not (resume or overwrite):
        raise UsageError(describe_existing(path))
    finished = None
    if resume and path.exists():
        with open_capture(path) as capture:
            check_same(capture, meta, profiled_layers)
            if capture.complete and not store.parts.exists():
                store.done = list(range(meta["num_prompts"]))
                finished = store
    if finished:
        yield finished
        return
    store.parts.mkdir(exist_ok=True)
    with only_writer(store.parts, str(path)):
        for stale in store.parts.glob("*" if overwrite else "*.tmp"):
            if stale.name != "lock":
                remove(stale)
        store.done = [index for index in range(meta["num_prompts"]) if _part_is_good(store, index, prompts_sha256)]
        if resume and _is_joined(path, meta["num_prompts"]):  # killed between joining and removing the parts
            store.done = list(range(meta["num_prompts"]))
            remove(store.parts)
        else:
            store._write_index()
            sync_folder(path.parent)
        yield store


def _is_joined(path: Path, num_prompts: int) -> bool:
    if not path.exists():
        return False
    with h5py.File(path, "r", locking="best-effort") as file:
        links = [file["prompts"].get(name, getlink=True) for name in file["prompts"]]
    return len(links) == num_prompts and all(isinstance(link, h5py.HardLink) for link in links)


def _part_is_good(store: CaptureStore, index: int, prompts_sha256: list[str]) -> bool:
    """Whether prompt `index` is finished. A part that a power cut damaged is captured again."""
    try:
        with h5py.File(store.part(index), "r", locking="best-effort") as part:
            attributes = part[f"prompts/{prompt_id(index)}"].attrs
            return bool(attributes["complete"]) and attributes["token_ids_sha256"] == prompts_sha256[index]
    except (OSError, KeyError):
        return False


def describe_existing(path: Path) -> str:
    """One line about an output that is already there, with the way out."""
    try:
        with open_capture(path) as capture:
            done, total = len(capture), capture.meta["num_prompts"]
    except KascadeError:
        return f"{path} exists; pass --overwrite to replace it"
    if done == total:
        return f"{path} is a complete capture ({total} prompts); pass --overwrite to make it again"
    return f"{path} is an unfinished capture ({done} of {total} prompts); pass --resume to go on, or --overwrite"


def check_same(capture: Capture, meta: dict[str, Any], profiled_layers: list[int]) -> None:
    """Raises UsageError, naming the first difference, unless `capture` was made from the same model, dev set and
    options as `meta` describes."""
    old = capture.meta

    def refuse(what: str, was: object, now: object) -> None:
        raise UsageError(f"cannot resume {capture.path}: {what} was {was}, now {now}; repeat the old one or --overwrite")

    if old["model_fingerprint"] != meta["model_fingerprint"] or capture.profiled_layers != list(profiled_layers):
        short = [f"{m['model_name']} ({m['model_fingerprint'][:15]}...)" for m in (old, meta)]
        refuse("the model", *short)
    for name in sorted({*old["options"], *meta["options"]}):
        was, now = old["options"].get(name), meta["options"].get(name)
        if was != now:
            refuse("--" + name.replace("_", "-"), was, now)
    if old["dev_set_sha256"] != meta["dev_set_sha256"] or old["num_prompts"] != meta["num_prompts"]:
        short = [f"{m['dev_set_name']} ({m['num_prompts']} prompts, {m['dev_set_sha256'][:8]}...)" for m in (old, meta)]
        refuse("the dev set", *short)


def disk_free(path: Path) -> int:
    """Free bytes on the disk that holds `path`'s folder."""
    stats = os.statvfs(path.parent if str(path.parent) else ".")
    return stats.f_bavail * stats.f_frsize
