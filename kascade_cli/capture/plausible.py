"""What the numbers of a capture cannot be. Every check raises KascadeError with one line that names the place."""

import re
from typing import Any

import numpy as np

from kascade_cli.capture.format import MAX_TOP_KEYS, RANGES
from kascade_cli.errors import KascadeError

_INFINITY = 0x7C00  # smallest uint16 pattern that is not a finite, non-negative float16
_SICK = "capture again (is the model healthy in this dtype?)"


def row_tolerance(keys: int) -> float:
    """How far from 1 the stored mass of a row over `keys` keys may sum to.

    Values keep 7 bits of mantissa and were float16 before (2^-8 and 2^-11 of themselves), small ones are exact to
    2^-25, and 1e-3 is left to the float32 softmax.
    """
    return 2.0**-8 + 2.0**-11 + 1e-3 + keys * 2.0**-25


def check_rows(sums: np.ndarray, keys: int, where: str) -> None:
    """Sums of rows float32 [G] over the `keys` visible keys: each 1, up to rounding."""
    wrong = np.abs(sums - 1) > row_tolerance(keys)
    if wrong.any() or not sums.all():
        head = int(np.argmax(wrong | (sums == 0)))
        raise KascadeError(f"{where}, head {head}: the mass sums to {sums[head]:.4g}, not to 1; {_SICK}")


def check_bits(bits: np.ndarray, where: str) -> None:
    """Patterns uint16 of the float16 mass: finite and >= 0."""
    if int(bits.max()) >= _INFINITY:
        raise KascadeError(f"{where}: NaN, infinity or negative mass; {_SICK}")


def check_meta(meta: dict[str, Any], where: str) -> None:
    """The root attributes, decoded."""
    for name, (low, high) in RANGES.items():
        if not low <= meta[name] <= high:
            raise KascadeError(f"{where}: attribute {name} is {meta[name]}, not between {low} and {high}")
    if meta["query_heads"] % meta["kv_heads"]:
        raise KascadeError(
            f"{where}: {meta['query_heads']} query heads do not share {meta['kv_heads']} KV heads evenly"
        )
    for name, kinds in (("options", (str, int, float, type(None))), ("versions", (str,))):
        table = meta[name]
        if not (isinstance(table, dict) and all(isinstance(value, kinds) for value in table.values())):
            raise KascadeError(f"{where}: attribute {name} is not a table of plain values")
    keys = meta["top_mass_keys"]
    known = isinstance(keys, list) and all(isinstance(k, str) and re.fullmatch("[1-9][0-9]{0,8}%?", k) for k in keys)
    if not known or not 1 <= len(keys) <= MAX_TOP_KEYS or len(set(keys)) < len(keys):
        raise KascadeError(f"{where}: attribute top_mass_keys is not a list of counts and shares")


def check_layers(layers: np.ndarray, total: int, where: str) -> None:
    """Profiled layers int32 [Lp]: in ascending order, each once, within the model's `total`."""
    if (np.diff(layers) <= 0).any() or layers[0] < 0 or layers[-1] >= total:
        text = " ".join(map(str, layers[:8].tolist())) + (" ..." if len(layers) > 8 else "")
        raise KascadeError(
            f"{where}: profiled_layers ({text}) are not layers of a model of {total}, each once in order"
        )


def check_tiles(tiles: np.ndarray, n_tokens: int, longest: int, where: str) -> None:
    """Tiles int32 [T, 2] of a prompt of `n_tokens`."""
    starts, lengths = tiles.astype(np.int64).T
    bad = (starts < 0) | (lengths < 1) | (starts + lengths > n_tokens)
    if bad.any():
        raise KascadeError(f"{where}, tile {int(np.argmax(bad))}: lies outside its {n_tokens} tokens")
    if (lengths > longest).any():
        tile = int(np.argmax(lengths > longest))
        raise KascadeError(f"{where}, tile {tile}: {lengths[tile]} queries, more than the {longest} of a tile")
    if len(np.unique(tiles, axis=0)) < len(tiles):
        raise KascadeError(f"{where}: a tile is there twice")


def check_range(values: np.ndarray, high: float, name: str, layers: list[int], where: str) -> None:
    """float32 [Lp, ...]: finite and in [0, high], up to the rounding of float32 sums."""
    good = (values >= -1e-3) & (values <= high + 1e-3)  # false for NaN
    if not good.all():
        position = np.unravel_index(int(np.argmin(good)), good.shape)
        value = f"{float(values[position]):.4g}"
        raise KascadeError(
            f"{where}, layer {layers[position[0]]}: {name} is {value}, not between 0 and {high:g}; {_SICK}"
        )
