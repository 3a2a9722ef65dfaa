"""One anchor set in figures: objective, what its layers keep, predicted speed."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kascade_cli.analysis import anchors as search
from kascade_cli.analysis.cost import CostTable
from kascade_cli.analysis.problem import Problem
from kascade_cli.analysis.similarity import PHASES


@dataclass(frozen=True)
class Row:
    """One anchor set; pooled: all heads of a layer read what those of its anchor choose together. Phase -> float64 [L]
    are

    similarity: what the keys of its anchor keep of each layer's own Top-k, the strict figure that is searched by;
    recovered: the share of each layer's attention that is kept at the profile's budget (recovered.py), once measured;
    recovered_free: the same with head maps that cross ranks, where the row's may not (rank_maps.py).
    """

    anchors: tuple[int, ...]
    objective: float
    similarity: dict[str, np.ndarray]
    speedup: dict[str, float | None]
    proven: bool = True
    recovered: dict[str, np.ndarray] = field(default_factory=dict)
    recovered_free: dict[str, np.ndarray] = field(default_factory=dict)
    pooled: bool = False

    @property
    def key(self) -> tuple[tuple[int, ...], bool]:
        """As `Candidate.key`."""
        return self.anchors, self.pooled

    @property
    def size(self) -> int:
        return len(self.anchors)

    @property
    def recovered_mean(self) -> float:
        return float(np.mean(list(self.recovered.values())))

    @property
    def recovered_free_mean(self) -> float:
        return float(np.mean(list(self.recovered_free.values())))

    @property
    def similarity_mean(self) -> float:
        return float(np.mean(list(self.similarity.values())))


def worst_layer(figures: dict[str, np.ndarray]) -> tuple[float, int]:
    """(value, layer position) of the layer with the lowest mean over phases."""
    mean = np.mean(list(figures.values()), axis=0)
    return float(mean.min()), int(mean.argmin())


def set_similarity(problem: Problem, anchors: tuple[int, ...], assignment: str) -> dict[str, np.ndarray]:
    """Per phase, mean over heads of the similarity to the anchor head that each one reads: float64 [L]."""
    result = {}
    for phase, sim in problem.sims.items():
        kept = np.empty(len(sim))
        for layer in range(len(sim)):
            open_to = [a for a in anchors if a <= layer]
            sources = open_to if assignment == "free" else open_to[-1:]
            kept[layer] = sim[sources, layer].max(axis=(0, 1)).mean()
        result[phase] = kept
    return result


def make_row(
    problem: Problem, found: search.AnchorSet | search.FreeSet, assignment: str, cost: CostTable, context: int
) -> Row:
    return Row(
        anchors=found.anchors,
        objective=found.objective,
        similarity=set_similarity(problem, found.anchors, assignment),
        speedup={phase: cost.speedup(phase, context, len(problem.layers), len(found.anchors)) for phase in PHASES},
        proven=getattr(found, "proven", True),
    )


def any_set(problem: Problem, anchors: tuple[int, ...], weights: str, assignment: str) -> search.AnchorSet:
    """Any set (positions) with its objective under `weights`."""
    if assignment == "free":
        value = search.free_value(problem.client_gains(weights), anchors)
    else:
        value = search.nearest_value(problem.gains(weights), anchors)
    return search.AnchorSet(anchors, value)


def figures_dict(problem: Problem, figures: dict[str, np.ndarray]) -> dict[str, Any]:
    """For the profile: mean and worst layer of phase -> float64 [L], overall and per phase (absolute layers)."""

    def entry(values: np.ndarray) -> dict[str, Any]:
        return {
            "mean": round(float(values.mean()), 6),
            "worst": round(float(values.min()), 6),
            "worst_layer": problem.layers[int(values.argmin())],
        }

    overall = entry(np.mean(list(figures.values()), axis=0))
    return overall | {phase: entry(values) for phase, values in figures.items()}
