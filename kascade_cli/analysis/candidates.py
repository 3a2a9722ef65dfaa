"""Anchor sets that are worth measuring on the model, and what was measured of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kascade_cli.analysis import anchors as search
from kascade_cli.analysis.problem import Problem


@dataclass
class Candidate:
    """An anchor set to be verified. objectives: weighting -> objective, for the weightings that propose it.

    kl: phase -> mean KL(dense || sparse) in nats; prompts: how many were measured.
    """

    anchors: tuple[int, ...]
    objectives: dict[str, float]
    kl: dict[str, float] = field(default_factory=dict)
    prompts: int = 0

    @property
    def score(self) -> float:
        """Mean over the phases measured; infinity before that."""
        return float(np.mean(list(self.kl.values()))) if self.kl else float("inf")


def propose(problem: Problem, sizes: Sequence[int], count: int, assignment: str) -> list[Candidate]:
    """The `count` best sets of every size under both weightings, deduplicated, in order of size and rank.

    Under free assignment the MILP's optimum is added, and every objective is that of the free assignment.
    """
    found: dict[tuple[int, ...], Candidate] = {}
    for name in problem.weights:
        best = search.k_best_sets(problem.gains(name), max(sizes), count)
        gains = problem.client_gains(name) if assignment == "free" else None
        for size in sizes:
            entries = [(entry.anchors, entry.objective) for entry in best[size - 1]]
            if gains is not None:
                optimum = search.free_set(gains, len(problem.layers), size, entries[0][0])
                chosen = dict.fromkeys([optimum.anchors, *(anchors for anchors, _ in entries)])
                entries = [(anchors, search.free_value(gains, anchors) / search.ONE) for anchors in chosen]
            for anchors, objective in entries:
                found.setdefault(anchors, Candidate(anchors, {})).objectives[name] = objective
    return sorted(found.values(), key=lambda entry: len(entry.anchors))
