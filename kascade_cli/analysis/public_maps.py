"""Head maps of the method's public implementation (microsoft/kascade): a bare .npy named after its anchors.

`MODEL_layers_0_2_8_13_14.npy` holds int32 [layers, KV heads]: entry [b, g] is the head of the nearest anchor at or
before layer b whose keys KV head g reads, one map for prefill and decode. An anchor's own row is written and not read.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from kascade_cli import provenance
from kascade_cli.errors import KascadeError, UsageError, plain
from kascade_cli.files import read_bounded
from kascade_cli.schema import MOST_HEADS, MOST_LAYERS, Budget, ModelCard, Profile

_NAME = re.compile(r"(?P<model>.+)_layers_(?P<anchors>[0-9]{1,5}(?:_[0-9]{1,5})*)\.npy", re.DOTALL)
_MOST_BYTES = 4 << 20  # a thousand layers of a thousand heads
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def named(path: Path) -> tuple[str, list[int] | None]:
    """(the model's name, its anchors) as the file's name has them; the name without its ending and None otherwise."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        return path.stem, None
    return found["model"], [int(part) for part in found["anchors"].split("_")]


def read_map(path: Path) -> np.ndarray:
    """int64 [layers, KV heads], every entry a KV head. Raises KascadeError for a file that holds something else.

    The header is read before anything is made of its sizes, and nothing in the file is ever unpickled.
    """
    data = io.BytesIO(read_bounded(path, _MOST_BYTES, "head map"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape, fortran, dtype = _HEADERS[npy.read_magic(data)](data)
    except Exception as error:  # numpy evaluates the header as Python, and whatever that raises is the file's fault
        raise KascadeError(f"{path}: not a .npy file that can be read, or a truncated one") from error
    if dtype.hasobject:
        raise KascadeError(f"{path}: it holds Python objects, which are not read: a head map is int32 numbers")
    if dtype.kind not in "iu":
        raise KascadeError(f"{path}: it holds {plain(dtype, 60)}, not whole numbers (int32)")
    if len(shape) != 2 or min(shape) < 1:
        raise KascadeError(f"{path}: an array of shape {plain(shape, 60)}, and a head map is [layers, KV heads]")
    if shape[0] > MOST_LAYERS or shape[1] > MOST_HEADS:
        raise KascadeError(f"{path}: {shape[0]} layers of {shape[1]} KV heads are no model's")
    rest = data.read()
    if len(rest) != math.prod(shape) * dtype.itemsize:
        raise KascadeError(
            f"{path}: {len(rest)} bytes of numbers, and shape {plain(shape, 60)} takes "
            f"{math.prod(shape) * dtype.itemsize}: truncated or damaged"
        )
    found = np.frombuffer(rest, dtype).reshape(shape, order="F" if fortran else "C")
    wrong = np.argwhere((found < 0) | (found >= shape[1]))
    if len(wrong):
        layer, head = wrong[0].tolist()
        raise KascadeError(
            f"{path}: layer {layer}, KV head {head} reads head {found[layer, head]}, which is out of range "
            f"0..{shape[1] - 1}"
        )
    return found.astype(np.int64)


def check_anchors(path: Path, anchors: Sequence[int], layers: int, profiled: Sequence[int]) -> None:
    """Raises UsageError for layers that cannot be anchors of this map."""
    where = f"{path.name}: anchors {plain(' '.join(map(str, anchors)), 80)}"
    if list(anchors) != sorted(set(anchors)):
        raise UsageError(f"{where}: they must rise, each once")
    if anchors[-1] >= layers:
        raise UsageError(f"{where}: layer {anchors[-1]} is not one of the map's {layers} layers (0..{layers - 1})")
    if profiled[0] not in anchors:
        raise UsageError(f"{where}: the first full-attention layer, {profiled[0]}, must be one")
    if other := sorted(set(anchors) - set(profiled)):
        raise UsageError(f"{where}: layer {other[0]} is not a full-attention layer of the model")


def odd_anchors(found: np.ndarray, anchors: Sequence[int]) -> list[int]:
    """Anchors whose row is not the identity, as most similar to itself: perhaps not what the map was made for."""
    return [anchor for anchor in anchors if (found[anchor] != np.arange(found.shape[1])).any()]


def to_profile(
    path: Path, found: np.ndarray, anchors: Sequence[int], card: ModelCard, profiled: Sequence[int]
) -> Profile:
    """The profile of a map, with the public implementation's budget (10 %, at least 128, tiles of 32).

    Raises KascadeError if the map's shape is not that of `card`.
    """
    if found.shape != (card.layers, card.kv_heads):
        raise KascadeError(
            f"{path}: a map of {found.shape[0]} layers and {found.shape[1]} KV heads, and {card.name} has "
            f"{card.layers} and {card.kv_heads}"
        )
    reuse = [layer for layer in profiled if layer not in anchors]
    selection: dict[str, Any] = {
        "method": "imported",
        "anchors": list(anchors),
        "why": "head maps of the public implementation (microsoft/kascade), one for both phases",
    }
    origin = {
        "tool": provenance.tool(),
        "created": provenance.now(),
        "map": {"name": path.name, "sha256": provenance.file_sha256(path)},
    }
    return Profile.build(
        model=card,
        anchors=anchors,
        profiled_layers=profiled,
        head_maps={layer: found[layer].tolist() for layer in reuse},
        budget=Budget(),
        selection=selection,
        provenance=origin,
    )
