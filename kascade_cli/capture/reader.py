"""Reading a capture, finished or not. Imports no torch. Import it through `kascade_cli.capture.store`.

Nothing in the file is believed: untrusted.py opens and inflates, plausible.py looks at the numbers.
"""

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kascade_cli.capture import plausible
from kascade_cli.capture.format import (
    ATTRIBUTES,
    JSON_ATTRIBUTES,
    MAX_JSON,
    MAX_TEXT,
    SCHEMA_VERSION,
    capture_key,
    is_prompt_id,
    prompt_seal,
    root_seal,
)
from kascade_cli.capture.untrusted import attribute, child, dataset, inflate, open_file, readable, small
from kascade_cli.errors import KascadeError

_SHA256 = 64


@dataclass(frozen=True)
class CapturedPrompt:
    """One finished prompt of an open capture.

    tiles int32 [T, 2] (start, length; length 1: a decode row), importance f32 [Lp], top_mass f32 [Lp, H, K].
    `mass` is the dataset f16 [Lp, T, G, n]; read it through `read_bits` or `read_tile`, which check it.
    """

    id: str
    n_tokens: int
    n_prompt_tokens: int
    token_ids_sha256: str
    tiles: np.ndarray
    importance: np.ndarray
    top_mass: np.ndarray
    mass: h5py.Dataset
    path: Path
    layers: list[int]

    def where(self, layer: int, tile: int) -> str:
        """`capture.h5: prompt 000017, layer 3, tile 5` for positions on the first two axes of `mass`."""
        return f"{self.path}: prompt {self.id}, layer {self.layers[layer]}, tile {tile}"

    def read_bits(self, layer: int, tile: int, out: np.ndarray) -> None:
        """Fills `out`, uint16 [G, end], with the float16 patterns of the mass on the keys before the tile's end.

        Raises KascadeError if the data are damaged, are not finite and >= 0, or lie on later keys. That a row
        sums to 1 is left to the caller (`plausible.check_rows`), who needs the numbers as floats anyway.
        """
        where = self.where(layer, tile)
        planes = inflate(self.mass, (layer, tile, 0, 0), where).reshape(2, -1, self.n_tokens)
        low, high = planes
        end = out.shape[1]
        if planes[:, :, end:].any():
            raise KascadeError(f"{where}: mass on keys after the tile's last query; capture again")
        np.left_shift(high[:, :end], np.uint16(8), out=out, dtype=np.uint16)
        np.bitwise_or(out, low[:, :end], out=out)
        plausible.check_bits(out, where)

    def read_tile(self, t: int) -> np.ndarray:
        """Pooled mass of tile `t`: f16 [Lp, G, n_tokens]. Raises KascadeError if the data are damaged or cannot be."""
        layers, _, heads, n_tokens = self.mass.shape
        end = int(self.tiles[t].sum())
        found = np.zeros((layers, heads, n_tokens), np.float16)
        for layer in range(layers):
            self.read_bits(layer, t, found[layer].view(np.uint16)[:, :end])
            sums = found[layer, :, :end].sum(axis=1, dtype=np.float32)
            plausible.check_rows(sums, end, self.where(layer, t))
        return found


class Capture:
    """An open capture, complete or not. Iterates over its finished prompts; a context manager.

    `meta` holds the root attributes (JSON ones decoded), `profiled_layers` the absolute layer index of each
    position on axis 0 of the data, `prompts` the ids of the finished prompts in order, `has_parts` whether they
    still lie in files of their own beside this one.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self._file = path, file
        self._parts: dict[str, h5py.File] = {}
        self.has_parts = False
        try:
            self.meta = _read_meta(path, file)
            layers = small(file, "profiled_layers", "<i4", 1, str(path))
            plausible.check_layers(layers, self.meta["layers"], str(path))
            self.profiled_layers: list[int] = layers.tolist()
            if attribute(file, "seal", str, str(path), _SHA256) != root_seal(self.meta, self.profiled_layers):
                raise KascadeError(f"{path}: its attributes were changed after it was made, or are damaged")
            self._key = capture_key(self.meta, self.profiled_layers)
            self._groups = child(file, "prompts", h5py.Group, str(path))
            self.prompts: list[str] = [name for name in self._names() if self._is_complete(name)]
        except BaseException:
            self.close()
            raise

    def _names(self) -> list[str]:
        with readable(f"{self.path}: prompts"):
            names = sorted(self._groups)
        for name in names:
            if not is_prompt_id(name) or int(name) >= self.meta["num_prompts"]:
                raise KascadeError(
                    f"{self.path}: prompts/{ascii(name)[1:-1][:40]} is none of its {self.meta['num_prompts']} prompts"
                )
        return names

    def _is_complete(self, name: str) -> bool:
        group = self._group(name)
        with readable(f"{self.path}: prompt {name}"):
            return group is not None and "complete" in group.attrs and self._attribute(group, name, "complete", bool)

    def _attribute(self, group: h5py.Group, name: str, key: str, kind: type) -> Any:
        return attribute(group, key, kind, f"{self.path}: prompt {name}", _SHA256)

    def _group(self, name: str) -> h5py.Group | None:
        """The group of a prompt: in this file, or in its part; None if that part is gone or damaged."""
        with readable(f"{self.path}: prompt {name}"):
            info = self._groups.id.links.get_info(name.encode())
            if info.type != h5py.h5l.TYPE_EXTERNAL:
                return child(self._groups, name, h5py.Group, f"{self.path}: prompts")
            folder = self.path.name + ".parts"
            link = self._groups.get(name, getlink=True)
            # The part is opened here, by the name that it must have; the link itself is never followed.
            if (link.filename, link.path) != (f"{folder}/{name}.h5", f"/prompts/{name}"):
                raise KascadeError(f"{self.path}: prompt {name} is a link to somewhere else than {folder}")
            self.has_parts = True
            if name not in self._parts:
                part = self.path.parent / folder / f"{name}.h5"
                if not part.exists() and not part.is_symlink():
                    return None
                if not (stat.S_ISDIR(part.parent.lstat().st_mode) and stat.S_ISREG(part.lstat().st_mode)):
                    raise KascadeError(f"{part} is not a plain file in a plain folder, and is not followed")
                try:
                    self._parts[name] = open_file(part)
                except KascadeError:
                    return None
            prompts = child(self._parts[name], "prompts", h5py.Group, f"{self.path}: prompt {name}")
            return child(prompts, name, h5py.Group, f"{self.path}: prompt {name}")

    @property
    def complete(self) -> bool:
        """Whether every prompt of the dev set is in."""
        return len(self.prompts) == self.meta["num_prompts"]

    def prompt(self, name: str) -> CapturedPrompt:
        """The finished prompt with this id. Raises KascadeError if it is missing, damaged or cannot be."""
        group = self._group(name) if name in self.prompts else None
        if group is None:
            raise KascadeError(f"{self.path}: no finished prompt {name}")
        return read_prompt(group, name, self.meta, self.profiled_layers, self._key, self.path)

    def __iter__(self) -> Iterator[CapturedPrompt]:
        return (self.prompt(name) for name in self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def close(self) -> None:
        for part in self._parts.values():
            part.close()
        self._file.close()

    def __enter__(self) -> "Capture":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_prompt(
    group: h5py.Group, name: str, meta: dict[str, Any], layers: list[int], key: str, path: Path
) -> CapturedPrompt:
    """A prompt's small data, checked against the root: see `Capture.prompt`."""
    where = f"{path}: prompt {name}"
    n_tokens = attribute(group, "n_tokens", int, where)
    n_prompt = attribute(group, "n_prompt_tokens", int, where)
    tokens = attribute(group, "token_ids_sha256", str, where, _SHA256)
    if not 1 <= n_prompt <= n_tokens < 1 << 31:
        raise KascadeError(f"{where}: {n_tokens} tokens, {n_prompt} of them its prompt's: that cannot be")
    tiles = small(group, "tiles", "<i4", 2, where)
    importance = small(group, "importance", "<f4", 1, where)
    top_mass = small(group, "top_mass", "<f4", 3, where)
    mass = dataset(group, "mass", "<f2", 4, where)
    wanted = {
        "tiles": (tiles.shape, (len(tiles), 2)),
        "importance": (importance.shape, (len(layers),)),
        "top_mass": (top_mass.shape, (len(layers), meta["query_heads"], len(meta["top_mass_keys"]))),
        "mass": (mass.shape, (len(layers), len(tiles), meta["kv_heads"], n_tokens)),
    }
    for what, (shape, expected) in wanted.items():
        if shape != expected:
            raise KascadeError(f"{where}: {what} has shape {shape}, not {expected}")
    plausible.check_tiles(tiles, n_tokens, meta["tile"], where)
    plausible.check_range(importance, 2, "importance", layers, where)
    plausible.check_range(top_mass, 1, "top mass", layers, where)
    seal = prompt_seal(key, name, tokens, n_tokens, n_prompt, tiles, importance, top_mass)
    if attribute(group, "seal", str, where, _SHA256) != seal:
        raise KascadeError(f"{where}: it is of another capture or place, or was changed after it was made")
    return CapturedPrompt(name, n_tokens, n_prompt, tokens, tiles, importance, top_mass, mass, path, layers)


def open_capture(path: str | Path) -> Capture:
    """Opens a capture for reading, also one that is being written (it shows the prompts finished so far).

    Raises KascadeError with one line if the file is missing, truncated, damaged, or not a capture.
    """
    path = Path(path)
    file = open_file(path)
    with readable(str(path)):
        return Capture(path, file)


def _read_meta(path: Path, file: h5py.File) -> dict[str, Any]:
    where = str(path)
    if "schema_version" not in file.attrs or not file.id.links.exists(b"prompts"):
        raise KascadeError(f"{path}: an HDF5 file, but not a capture made by `kascade profile`")
    version = attribute(file, "schema_version", int, where)
    if version < SCHEMA_VERSION:
        raise KascadeError(f"{path}: made by an older version of kascade: capture again")
    if version > SCHEMA_VERSION:
        raise KascadeError(f"{path}: capture format {version}, this kascade reads {SCHEMA_VERSION}; upgrade it")
    meta: dict[str, Any] = {name: attribute(file, name, kind, where, MAX_TEXT) for name, kind in ATTRIBUTES.items()}
    for name in JSON_ATTRIBUTES:
        with readable(f"{where}: attribute {name}"):
            meta[name] = json.loads(attribute(file, name, str, where, MAX_JSON))
    plausible.check_meta(meta, where)
    return meta
