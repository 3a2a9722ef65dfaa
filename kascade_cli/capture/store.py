"""The capture file: how it is written so that it survives kills and full disks. Imports no torch.

While a capture is being made, every prompt is a file of its own in `NAME.parts/`, written under a temporary
name, fsynced and renamed; `NAME` itself is a small index with links to them, replaced atomically. So `NAME`
can be opened at any moment and shows exactly the finished prompts. When the last prompt is in, the parts are
joined into one plain HDF5 file that replaces the index. docs/capture-format.md describes the format;
reader.py reads it, parts.py keeps the folder of the parts.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np

from kascade_cli.capture import parts as folders
from kascade_cli.capture.durable import DurableFile, sync_folder
from kascade_cli.capture.format import (
    ATTRIBUTES,
    JSON_ATTRIBUTES,
    MAX_JSON,
    SCHEMA_VERSION,
    capture_key,
    clean_text,
    compression,
    mass_chunk,
    prompt_id,
    prompt_seal,
    put_array,
    put_text,
    root_seal,
    token_sha256,
)
from kascade_cli.capture.parts import parts_folder
from kascade_cli.capture.reader import Capture, CapturedPrompt, open_capture, read_prompt
from kascade_cli.capture.untrusted import attribute, child, open_file
from kascade_cli.errors import KascadeError, UsageError

__all__ = [
    "SCHEMA_VERSION",
    "Capture",
    "CaptureStore",
    "CapturedPrompt",
    "PromptWriter",
    "compression",
    "describe_existing",
    "disk_free",
    "open_beside",
    "open_capture",
    "open_store",
    "parts_folder",
    "prompt_id",
    "stored_bytes",
    "token_sha256",
]

_JOIN_ROOM = 1 << 20  # bytes that joining may need beyond the sum of the parts


def stored_bytes(path: Path) -> int:
    """What a capture takes on the disk, its parts included; 0 if there is none."""
    files = [path, *parts_folder(path).glob("*.h5")]
    return sum(file.stat().st_size for file in files if file.is_file())


def disk_free(path: Path) -> int:
    """Free bytes on the disk that holds `path`'s folder."""
    return shutil.disk_usage(path.parent).free


class PromptWriter:
    """Takes one prompt's arrays as they are measured; `finish` makes them durable in one step."""

    def __init__(self, store: "CaptureStore", index: int, tokens: list[int], tiles: np.ndarray, n_tokens: int) -> None:
        name = prompt_id(index)
        self._store, self._index, self._tiles = store, index, tiles
        self._n_prompt, self._reserved = len(tokens), n_tokens
        self._shape = (len(store.profiled_layers), len(tiles), store.meta["kv_heads"], n_tokens)
        self._file = DurableFile(store.part(index), store.parts / f"{name}.tmp")
        self._tokens = token_sha256(tokens)
        self._group = self._file.h5.create_group(f"prompts/{name}")
        put_text(self._group.attrs, "token_ids_sha256", self._tokens)
        self._mass = self._create_mass("mass", self._shape)

    def _create_mass(self, name: str, shape: tuple[int, ...]) -> h5py.Dataset:
        chunks = (1, 1, *shape[2:])
        return self._group.create_dataset(name, shape, "<f2", chunks=chunks, fillvalue=0, **compression())

    def write_mass(self, layer: int, first_tile: int, mass: np.ndarray) -> None:
        """Stores f16 [t, G, n] for tiles [first_tile, first_tile + t) of the layer at position `layer`.

        n may be less than the prompt's tokens (the keys after it are 0). Raises OSError if the disk is full.
        """
        if mass.shape[-1] < self._reserved:
            mass = np.pad(mass, ((0, 0), (0, 0), (0, self._reserved - mass.shape[-1])))
        for tile, rows in enumerate(mass, first_tile):
            self._write_tile(self._mass, layer, tile, rows)
        try:
            self._file.check()
        except OSError:
            self.discard()
            raise

    def _write_tile(self, stored: h5py.Dataset, layer: int, tile: int, mass: np.ndarray) -> None:
        packed = mass_chunk(mass, int(self._tiles[tile].sum()))
        stored.id.write_direct_chunk((layer, tile, 0, 0), packed)

    def finish(self, importance: np.ndarray, top_mass: np.ndarray, n_tokens: int | None = None) -> None:
        """Writes the rest, marks the prompt complete and publishes it.

        `n_tokens` below the reserved number says that generation stopped early: the rows of tokens that were
        never generated are dropped. Raises OSError if the disk is full.
        """
        n_tokens = self._reserved if n_tokens is None else n_tokens
        try:
            if n_tokens < self._reserved:
                self._shrink(n_tokens)
            arrays = self._tiles.astype("<i4"), importance.astype("<f4"), top_mass.astype("<f4")
            for name, values in zip(("tiles", "importance", "top_mass"), arrays, strict=True):
                put_array(self._group, name, values)
            self._group.attrs["n_tokens"] = n_tokens
            self._group.attrs["n_prompt_tokens"] = self._n_prompt
            seal = prompt_seal(
                self._store.key, prompt_id(self._index), self._tokens, n_tokens, self._n_prompt, *arrays
            )
            put_text(self._group.attrs, "seal", seal)
            self._group.attrs["complete"] = True
        except BaseException:
            self.discard()
            raise
        self._file.commit()
        self._store.publish(self._index)

    def _shrink(self, n_tokens: int) -> None:
        count = int((self._tiles.sum(axis=1) <= n_tokens).sum())
        self._group.move("mass", "reserved")
        reserved, self._tiles = self._group["reserved"], self._tiles[:count]
        mass = self._create_mass("mass", (self._shape[0], count, self._shape[2], n_tokens))
        for layer in range(self._shape[0]):
            for tile in range(count):
                self._write_tile(mass, layer, tile, reserved[layer, tile, :, :n_tokens])
        del self._group["reserved"]

    def discard(self) -> None:
        """Leaves no trace of this prompt."""
        self._file.discard()


class CaptureStore:
    """The writing side; made by `open_store`. `done` and `remaining` are indices of prompts."""

    def __init__(self, path: Path, meta: dict[str, Any], profiled_layers: list[int]) -> None:
        self.path, self.profiled_layers = path, list(profiled_layers)
        self.meta = {name: clean_text(value) if isinstance(value, str) else value for name, value in meta.items()}
        for name in JSON_ATTRIBUTES:
            if len(json.dumps(meta[name])) > MAX_JSON:
                raise UsageError(f"{name} are longer than a capture can keep ({MAX_JSON} characters)")
        self.parts = parts_folder(path)
        self.done: list[int] = []
        self.share: Callable[[], None] = lambda: None  # lets processes of this run write beside this one
        self.key = capture_key(meta, self.profiled_layers)

    @property
    def remaining(self) -> list[int]:
        done = set(self.done)
        return [index for index in range(self.meta["num_prompts"]) if index not in done]

    def part(self, index: int) -> Path:
        return self.parts / f"{prompt_id(index)}.h5"

    def begin(self, index: int, tokens: list[int], tiles: np.ndarray, n_tokens: int) -> PromptWriter:
        """Starts prompt `index`: `tiles` int32 [T, 2], `n_tokens` its length plus the tokens to generate.

        Tiles of generated tokens come last, in order.
        """
        return PromptWriter(self, index, tokens, tiles, n_tokens)

    def publish(self, *indices: int) -> None:
        """Puts finished prompts into the index."""
        self.done = sorted({*self.done, *indices})
        self.write_index()

    def find_parts(self, prompts_sha256: list[str]) -> None:
        """Sets `done` to the prompts whose parts are there and good, whoever wrote them."""
        self.done = [i for i, sha256 in enumerate(prompts_sha256) if self._part_is_good(i, sha256)]

    def _write_head(self, file: h5py.File) -> None:
        for name, kind in ATTRIBUTES.items():
            if kind is str:
                put_text(file.attrs, name, self.meta[name])
            else:
                file.attrs[name] = self.meta[name]
        for name in JSON_ATTRIBUTES:
            put_text(file.attrs, name, json.dumps(self.meta[name], sort_keys=True))
        put_array(file, "profiled_layers", np.asarray(self.profiled_layers, "<i4"))
        put_text(file.attrs, "seal", root_seal(self.meta, self.profiled_layers))
        file.create_group("prompts")

    def write_index(self) -> None:
        """Replaces `path` by an index of the finished prompts. Raises OSError."""
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

        Raises OSError if the disk is too full for it; the capture stays readable as index and parts.
        """
        size = sum(self.part(index).stat().st_size for index in self.done)
        joined = DurableFile(self.path, self.parts / "joined.tmp")
        try:
            joined.reserve(size + size // 50 + _JOIN_ROOM)
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
        folders.remove(self.parts)

    def discard_if_empty(self) -> None:
        """After a failure: removes what a run without any finished prompt would leave behind."""
        if not self.done:
            folders.refuse_link(self.path)
            self.path.unlink(missing_ok=True)  # the index that `open_store` has put there
            folders.remove(self.parts)

    def _part_is_good(self, index: int, sha256: str) -> bool:
        """Whether prompt `index` is finished and of this capture. A damaged part is captured again."""
        name, path = prompt_id(index), self.part(index)
        try:
            with open_file(path) as part:
                group = child(child(part, "prompts", h5py.Group, str(path)), name, h5py.Group, str(path))
                prompt = read_prompt(group, name, self.meta, self.profiled_layers, self.key, path)
                return prompt.token_ids_sha256 == sha256 and attribute(group, "complete", bool, str(path))
        except KascadeError:
            return False


@contextlib.contextmanager
def open_store(
    path: Path,
    meta: dict[str, Any],
    profiled_layers: list[int],
    prompts_sha256: list[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[CaptureStore]:
    """Opens `path` for writing: new, resumed (model, dev set and options must be the same), or replaced.

    `meta` holds the root attributes (`ATTRIBUTES` and `JSON_ATTRIBUTES`), `prompts_sha256` the `token_sha256`
    of the prompts in order. Only one process at a time may write. Raises UsageError if `path` exists and
    neither flag is given, or differs on resume; KascadeError if it is damaged or being written by another
    process.
    """
    store = CaptureStore(path, meta, profiled_layers)
    meta = store.meta
    folders.refuse_link(path)
    started = folders.is_ours(store.parts)
    if (path.exists() or started) and not (resume or overwrite):
        raise UsageError(describe_existing(path))
    joined = False
    if resume and path.exists():
        with open_capture(path) as capture:
            check_same(capture, meta, store.profiled_layers)
            joined = capture.complete and not capture.has_parts
    if joined:
        if started:  # left by a kill between the joining and the removal
            with folders.only_writer(store.parts, str(path)):
                folders.remove(store.parts)
        store.done = list(range(meta["num_prompts"]))
        yield store
        return
    with folders.only_writer(store.parts, str(path)) as store.share:
        if not (resume or overwrite) and path.exists():  # made by another process since we looked
            folders.remove(store.parts)
            raise UsageError(describe_existing(path))
        folders.clear(store.parts, finished=overwrite)
        store.find_parts(prompts_sha256)
        try:
            store.write_index()
        except OSError:
            if not store.done:
                folders.remove(store.parts)
            raise
        sync_folder(path.parent)
        yield store


class PartStore(CaptureStore):
    """The writing side of a process beside the one that keeps the index; made by `open_beside`."""

    def __init__(self, path: Path, meta: dict[str, Any], layers: list[int], publish: Callable[[int], None]) -> None:
        super().__init__(path, meta, layers)
        self._tell = publish

    def publish(self, *indices: int) -> None:
        self.done = sorted({*self.done, *indices})
        for index in indices:
            self._tell(index)


@contextlib.contextmanager
def open_beside(
    path: Path, meta: dict[str, Any], profiled_layers: list[int], publish: Callable[[int], None]
) -> Iterator[PartStore]:
    """Opens for writing what another process of this run has opened and shares (`CaptureStore.share`).

    `meta`: as that process has it. `publish` is told of every part that is finished. Raises KascadeError where the
    folder is not seen from here, or another run has it.
    """
    store = PartStore(path, meta, profiled_layers, publish)
    with folders.writer_beside(store.parts, str(path)):
        yield store


def describe_existing(path: Path) -> str:
    """One line about an output that is already there, with the way out."""
    parts = parts_folder(path)
    if parts.is_dir() and folders.being_written(parts):
        return f"another process is writing {path}; wait for it, or stop it"
    if not path.exists():
        return f"{parts} is an unfinished capture; pass --resume to go on, or --overwrite"
    try:
        with open_capture(path) as capture:
            done, total = len(capture), capture.meta["num_prompts"]
            whole = capture.complete and not capture.has_parts
    except KascadeError as error:
        if "older version" in str(error):
            return f"{path} was made by an older version of kascade; pass --overwrite to capture again"
        return f"{path} exists and is not a capture; pass --overwrite to replace it"
    if whole and not parts.exists():
        return f"{path} is a complete capture ({total} prompts); pass --overwrite to make it again"
    if done == total:
        return f"{path} has all {total} prompts, but was stopped while joining them; pass --resume to finish it"
    return f"{path} is an unfinished capture ({done} of {total} prompts); pass --resume to go on, or --overwrite"


def check_options(capture: Capture, options: dict[str, Any]) -> None:
    """Raises UsageError naming the first of `options` (some of a capture's) that is not as it was in `capture`."""
    old = capture.meta["options"]
    for name in sorted(options):
        if old.get(name) != options[name]:
            option = "--" + name.replace("_", "-")
            _refuse(capture, option, *(_option_value(name, value) for value in (old.get(name), options[name])))


def check_same(capture: Capture, meta: dict[str, Any], profiled_layers: list[int]) -> None:
    """Raises UsageError naming the first difference if `capture` has another model, dev set or option."""
    old = capture.meta
    if old["model_fingerprint"] != meta["model_fingerprint"] or capture.profiled_layers != profiled_layers:
        _refuse(capture, "the model", *(f"{m['model_name']} ({m['model_fingerprint'][:15]}...)" for m in (old, meta)))
    check_options(capture, dict.fromkeys(old["options"]) | meta["options"])
    if old["dev_set_sha256"] != meta["dev_set_sha256"] or old["num_prompts"] != meta["num_prompts"]:
        sets = [f"{m['dev_set_name']}, {m['num_prompts']} prompts, {m['dev_set_sha256'][:8]}" for m in (old, meta)]
        _refuse(capture, "the dev set", *(f"({text})" for text in sets))


def _option_value(name: str, value: object) -> object:
    """A stored option as it was typed."""
    if name == "tiles_per_prompt" and value is None:
        return "all"
    if name == "chat_template" and value is not None:
        return "--chat-template" if value else "--no-chat-template"
    return "not given" if value is None else value


def _refuse(capture: Capture, what: str, was: object, now: object) -> NoReturn:
    line = f"cannot resume {capture.path}: {what} was {was}, now {now}"
    raise UsageError(f"{line}; repeat the old one, or pass --overwrite")
