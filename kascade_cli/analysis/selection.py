"""The best anchor set of every size, sets that are asked for, and the head maps of a set."""

from collections.abc import Sequence

from kascade_cli.analysis import anchors as search
from kascade_cli.analysis.problem import Problem
from kascade_cli.analysis.similarity import PHASES
from kascade_cli.errors import UsageError


def default_max_anchors(layers: int) -> int:
    """A quarter of the layers rounded up, at least 4, never more than half of them (2 where there are 2).

    Beyond a quarter there is little left to win: the paper takes 5 of 32, and verifying costs runs for every size.
    """
    return min(layers, max(4, -(-layers // 4)), max(2, (layers + 1) // 2))


def search_sets(problem: Problem, weights: str, max_anchors: int, assignment: str, size: int | None = None) -> list:
    """The best set of every size up to `max_anchors` (or of one size): dynamic programme, or MILP if free."""
    nearest = search.best_sets(problem.gains(weights), max_anchors)
    nearest = nearest if size is None else nearest[size - 1 : size]
    if assignment == "nearest":
        return nearest
    gains = problem.client_gains(weights)
    return [search.free_set(gains, len(problem.layers), len(entry.anchors), entry.anchors) for entry in nearest]


def position_maps(problem: Problem, anchors: tuple[int, ...], assignment: str) -> dict[int, dict[str, list]]:
    """{layer: {phase: per KV head an anchor head, or (anchor, head) if free}} for reuse layers, all positions."""
    maps: dict[int, dict[str, list]] = {}
    for layer in range(len(problem.layers)):
        if layer in anchors:
            continue
        nearest = max(anchor for anchor in anchors if anchor < layer)
        maps[layer] = {}
        for phase in PHASES:
            sim = problem.map_sims[phase]
            if assignment == "nearest":
                maps[layer][phase] = search.head_map(sim, nearest, layer)
            else:
                maps[layer][phase] = search.free_head_map(sim, anchors, layer)
    return maps


def head_maps(problem: Problem, anchors: tuple[int, ...], assignment: str) -> dict[int, dict[str, list]]:
    """`position_maps` of `anchors` (positions) with absolute layers: what a profile holds."""

    def absolute(entry: int | tuple[int, int]) -> int | tuple[int, int]:
        return (problem.layers[entry[0]], entry[1]) if isinstance(entry, tuple) else entry

    return {
        problem.layers[layer]: {phase: [absolute(entry) for entry in row] for phase, row in phases.items()}
        for layer, phases in position_maps(problem, anchors, assignment).items()
    }


def check_set(anchors: Sequence[int]) -> None:
    """Raises UsageError unless the layers rise, each given once."""
    if list(anchors) != sorted(set(anchors)):
        proper = ",".join(map(str, sorted(set(anchors))))
        raise UsageError(f"--anchors names layers in rising order, each once: {proper}")


def positions(anchors: Sequence[int], layers: Sequence[int]) -> tuple[int, ...]:
    """Positions of absolute layers within the profiled `layers`.

    Raises UsageError for a layer that was not profiled, or if the first one, which is always an anchor, is missing.
    """
    check_set(anchors)
    place = {layer: position for position, layer in enumerate(layers)}
    if unknown := [layer for layer in anchors if layer not in place]:
        raise UsageError(
            f"--anchors: layer {unknown[0]} is not a full-attention layer of the capture; these are: {ranges(layers)}"
        )
    if not anchors or anchors[0] != layers[0]:
        raise UsageError(f"--anchors: the first full-attention layer, {layers[0]}, is always an anchor: put it first")
    return tuple(place[layer] for layer in anchors)


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> `0-2 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return " ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
