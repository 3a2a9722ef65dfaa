"""Profiles with other anchors than the chosen ones: given sets, and random draws to compare with."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.models import ModelInfo
from kascade_cli.schema import PHASES, Profile


def random_sets(info: ModelInfo, chosen: Sequence[int], draws: int, seed: int) -> list[list[int]]:
    """`draws` different anchor sets of the same number as `chosen`, uniformly among all others.

    The first full-attention layer is always in. Raises UsageError if there are not so many other sets.
    """
    first, *rest = info.profiled_layers
    extra = len(chosen) - 1
    possible = math.comb(len(rest), extra) - 1
    if draws > possible:
        raise UsageError(f"--anchors random:{draws}: there are only {possible} other sets of {len(chosen)} anchors")
    rng = np.random.default_rng(seed)
    seen = {tuple(chosen)}
    found = []
    while len(found) < draws:
        drawn = (first, *sorted(rng.choice(rest, extra, replace=False).tolist()))
        if drawn not in seen:
            seen.add(drawn)
            found.append(list(drawn))
    return found


class HeadMaps:
    """Head maps for any anchor set, measured from a capture; where there is none, reuse layers run pooled."""

    def __init__(self, info: ModelInfo, capture: Path | None = None):
        self.info = info
        self.sims: dict[str, np.ndarray] = {}
        if capture is None:
            return
        from kascade_cli.analysis.similarity import measure

        measured = measure(capture)
        if measured.meta["model_fingerprint"] != info.fingerprint:
            raise KascadeError(f"{capture} was captured from another model than {info.name}")
        self.layers = list(measured.profiled_layers)
        self.sims = {phase: measured.mean(phase) for phase in measured.sim}

    def of(self, anchors: Sequence[int], layer: int) -> dict[str, list[int]]:
        """Per phase, the anchor head that each KV head of `layer` reads. A phase not captured takes the other's."""
        from kascade_cli.analysis.anchors import head_map

        nearest = max(anchor for anchor in anchors if anchor < layer)
        at = (self.layers.index(nearest), self.layers.index(layer))
        maps = {phase: head_map(sim, *at) for phase, sim in self.sims.items()}
        return {phase: maps.get(phase, next(iter(maps.values()))) for phase in PHASES}


def with_anchors(profile: Profile, info: ModelInfo, anchors: Sequence[int], maps: HeadMaps) -> Profile:
    """`profile` with other anchors and its own budget, pooled where `maps` has none.

    Raises UsageError for layers that cannot be anchors.
    """
    first = info.profiled_layers[0]
    wrong = [layer for layer in anchors if layer not in info.profiled_layers]
    if wrong:
        raise UsageError(f"--anchors: layer {wrong[0]} is not a full-attention layer of {info.name}")
    if first not in anchors:
        raise UsageError(f"--anchors: the first full-attention layer, {first}, must be an anchor")
    chosen = sorted(set(anchors))
    head_maps: Any = "pooled" if profile.pooled else None
    if maps.sims:
        head_maps = {layer: maps.of(chosen, layer) for layer in info.profiled_layers if layer not in chosen}
    return Profile.build(
        model=profile.model,
        anchors=chosen,
        profiled_layers=info.profiled_layers,
        head_maps=head_maps,
        budget=profile.budget,
    )


def parse_anchors(text: str) -> int | list[int]:
    """`random:10` -> 10 draws; `0,2,7` -> that set. Raises UsageError."""
    if text.startswith("random"):
        count = text.removeprefix("random").removeprefix(":") or "10"
        if not count.isdigit() or int(count) < 1:
            raise UsageError(f"--anchors {text}: use random:10, or layers such as 0,2,7")
        return int(count)
    from kascade_cli.console import parse_ints

    return parse_ints(text)
