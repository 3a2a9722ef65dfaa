"""Which settings a sweep measures: points, dense first."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kascade_cli.analysis.anchors import best_sets, layer_gains, layer_similarity
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.evaluation.anchors import HeadMaps, with_anchors
from kascade_cli.models import ModelInfo
from kascade_cli.schema import Profile
from kascade_cli.sparse import Setting

FIGURES = {"oracle": 2, "pooling": 5, "remap": 6}
REMAP = ("kascade", "kascade-pooled", "kascade-no-remap")
_NO_RATIO = 1e-9  # a ratio that leaves everything to the floor: k keys, whatever the length


@dataclass(frozen=True)
class Point:
    """One row: `label` and `at` (ratio, keys, tile, pool, anchors: what varies) name it, `setting` runs it."""

    label: str
    setting: Setting
    at: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        return point_key(self.label, self.at)

    def describe(self) -> str:
        """`oracle, ratio 0.1, tile 32`."""
        parts = [f"{name} {_text(value)}" for name, value in self.at.items() if name != "anchors"]
        if "anchors" in self.at:
            parts.append(f"{len(self.at['anchors'])} anchors")
        return ", ".join([self.label, *parts])


def point_key(label: str, at: dict[str, Any]) -> tuple:
    """What tells a point from the others, as it can be looked up."""
    values = ((name, tuple(value) if isinstance(value, list) else value) for name, value in sorted(at.items()))
    return (label, *values)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def oracle_points(base: Setting, ratios: Sequence[float], keys: Sequence[int], per_query: bool = False) -> list[Point]:
    """Figure 2: every layer its own exact Top-k, at shares of the keys and at fixed numbers of them."""
    points = [dense_point(base)]
    for strategy in ("oracle", *(["oracle-per-query"] if per_query else [])):
        for ratio in ratios:
            points.append(Point(strategy, _with(base, strategy=strategy, ratio=ratio), {"ratio": ratio}))
        for count in keys:
            setting = _with(base, strategy=strategy, ratio=_NO_RATIO, min_keys=count)
            points.append(Point(strategy, setting, {"keys": count}))
    return points


def pooling_points(base: Setting, tiles: Sequence[int], ratios: Sequence[float]) -> list[Point]:
    """Figure 5: the oracle with scores summed before (logits) or after the softmax (probabilities)."""
    points = [dense_point(base)]
    for ratio in ratios:
        for pool in ("probabilities", "logits"):
            for tile in tiles:
                setting = _with(base, strategy="oracle", ratio=ratio, tile=tile, options={"pool": pool})
                label = "post-softmax" if pool == "probabilities" else "pre-softmax"
                points.append(Point(label, setting, {"ratio": ratio, "tile": tile}))
    return points


def remap_points(base: Setting, ratios: Sequence[float], profiles: Sequence[Profile]) -> list[Point]:
    """Figure 6: head maps against one key set for all heads against the identity, for every profile's anchors."""
    points = [dense_point(base)]
    for profile in profiles:
        for ratio in ratios:
            for strategy in REMAP:
                setting = _with(base, strategy=strategy, ratio=ratio, profile=profile)
                points.append(Point(strategy, setting, {"ratio": ratio, "anchors": profile.anchors}))
    return points


def dense_point(base: Setting) -> Point:
    """What the others are compared with."""
    return Point("dense", _with(base, strategy="dense", min_keys=None, profile=None))


def _with(base: Setting, **changes: Any) -> Setting:
    return replace(base, **changes)


def check_points(points: Sequence[Point]) -> None:
    """Refuses settings that cannot work, and the same point twice. Raises UsageError."""
    seen = set()
    for point in points:
        point.setting.check()
        if point.key in seen:
            raise UsageError(f"{point.describe()} is asked for twice")
        seen.add(point.key)


def profiles_of_sizes(profile: Profile, info: ModelInfo, sizes: Sequence[int], capture: Path) -> list[Profile]:
    """The best anchors of each size by the capture's similarity (both phases, all layers alike), with its head maps.

    Raises KascadeError for another model's capture, UsageError for a size that the model cannot have.
    """
    most = len(info.profiled_layers)
    if wrong := [size for size in sizes if not 1 <= size <= most]:
        raise UsageError(f"--anchors {wrong[0]} is outside 1..{most}: {info.name} has {most} full-attention layers")
    maps = HeadMaps(info, capture)
    if maps.layers != info.profiled_layers:
        raise KascadeError(f"{capture} does not hold every full-attention layer of {info.name}: capture them all")
    similarity = np.mean([layer_similarity(sim) for sim in maps.sims.values()], axis=0)
    found = best_sets(layer_gains(similarity, np.ones(most)), max(sizes))
    chosen = [[maps.layers[position] for position in found[size - 1].anchors] for size in sizes]
    return [with_anchors(profile, info, anchors, maps) for anchors in chosen]
