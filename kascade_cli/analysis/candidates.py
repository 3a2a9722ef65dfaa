"""Anchor sets that are worth measuring on the model, and what was measured of each."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kascade_cli.analysis import anchors as search
from kascade_cli.analysis.problem import Problem
from kascade_cli.analysis.rows import any_set

NEIGHBOURS = 8  # sets with an anchor swapped that an objective thinks best
MOVED = 12  # sets with an anchor moved a little, which no objective need think well of
ONE = 4  # sets with an anchor more or less


@dataclass
class Candidate:
    """An anchor set to be verified. objectives: weighting -> objective, for the weightings that propose it (both for a
    neighbour: a set with one anchor of another one swapped, added or left out).

    kl: phase -> mean KL(dense || sparse) in nats; prompts: how many were measured; in these, asked: answers; given:
    those that dense gives; kept: those of them that the set gives too.
    """

    anchors: tuple[int, ...]
    objectives: dict[str, float]
    kl: dict[str, float] = field(default_factory=dict)
    prompts: int = 0
    asked: int = 0
    given: int = 0
    kept: int = 0
    neighbour: bool = False

    @property
    def score(self) -> float:
        """Mean over the phases measured; infinity before that."""
        return float(np.mean(list(self.kl.values()))) if self.kl else float("inf")

    @property
    def lost(self) -> int:
        return self.given - self.kept


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


def neighbours(
    problem: Problem,
    anchors: tuple[int, ...],
    known: Iterable[tuple[int, ...]],
    assignment: str,
    count: int = NEIGHBOURS,
) -> list[Candidate]:
    """Sets of the same size, one anchor swapped (never layer 0), that are not `known`: the `count` most promising, and
    the best of those that move an anchor by up to three layers, nearest first.

    Look-ups hang on few heads, whose share of a layer's attention is small: no objective need see which anchor has
    what they read, and the next layer may have it.
    """
    others = [layer for layer in range(1, len(problem.layers)) if layer not in anchors]
    swaps = itertools.product(anchors[1:], others)
    distance = {tuple(sorted({*anchors} - {gone} | {new})): abs(new - gone) for gone, new in swaps}
    left = set(distance) - set(known)
    found = _promising(problem, left, assignment, count)
    left -= {entry.anchors for entry in found}
    for step in (1, 2, 3):
        near = {entry for entry in left if distance[entry] == step}
        found += _promising(problem, near, assignment, max(0, count + MOVED - len(found)))
    return found


def without_one(
    problem: Problem, anchors: tuple[int, ...], known: Iterable[tuple[int, ...]], assignment: str, count: int = ONE
) -> list[Candidate]:
    """Sets that lack one of the anchors (never layer 0) and are not `known`: the `count` most promising."""
    left = {tuple(anchor for anchor in anchors if anchor != gone) for gone in anchors[1:]}
    return _promising(problem, left - set(known), assignment, count)


def with_one_more(
    problem: Problem, anchors: tuple[int, ...], known: Iterable[tuple[int, ...]], assignment: str, count: int = ONE
) -> list[Candidate]:
    """Sets that have one anchor more and are not `known`: the `count` most promising."""
    added = {tuple(sorted({*anchors, new})) for new in range(1, len(problem.layers)) if new not in anchors}
    return _promising(problem, added - set(known), assignment, count)


def _promising(problem: Problem, sets: set[tuple[int, ...]], assignment: str, count: int) -> list[Candidate]:
    """The `count` best, taken in turn from the order of each weighting's objective."""
    values = {name: {entry: any_set(problem, entry, name, assignment) for entry in sets} for name in problem.weights}
    orders = [sorted(sets, key=lambda entry: (-found[entry].value, entry)) for found in values.values()]
    chosen = list(dict.fromkeys(itertools.chain.from_iterable(zip(*orders, strict=True))))[:count]
    return [
        Candidate(entry, {name: found[entry].objective for name, found in values.items()}, neighbour=True)
        for entry in chosen
    ]
