"""Anchor sets that are worth measuring on the model, and what was measured of each."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kascade_cli.analysis import anchors as search
from kascade_cli.analysis.problem import Problem
from kascade_cli.analysis.rows import any_set


class Figures:
    """What is measured over prompts. Of whoever has them: kl (phase -> mean), prompts, asked, given and kept."""

    @property
    def score(self) -> float:
        """Mean over the phases measured; infinity before that."""
        return sum(self.kl.values()) / len(self.kl) if self.kl else float("inf")

    @property
    def lost(self) -> int:
        return self.given - self.kept

    def add(self, result: Any) -> None:
        """One more prompt (`forced.PromptKL`)."""
        for phase, value in result.kl.items():
            self.kl[phase] = (self.kl.get(phase, 0.0) * self.prompts + value) / (self.prompts + 1)
        self.prompts += 1
        self.asked += result.asked
        self.given += result.given
        self.kept += result.kept


@dataclass
class Candidate(Figures):
    """An anchor set to be verified. pooled: all heads read what an anchor's heads choose together, instead of what
    the head maps say. objectives: weighting -> objective, for the weightings that propose it (both for a neighbour: a
    set with one anchor of another one swapped, added or left out; read the other way a set has those that it had).

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
    pooled: bool = False

    @property
    def key(self) -> tuple[tuple[int, ...], bool]:
        """What runs: the anchors, and how they are read."""
        return self.anchors, self.pooled

    def other_way(self) -> "Candidate":
        """The same anchors, read the other way; nothing of it is measured yet."""
        return Candidate(self.anchors, dict(self.objectives), neighbour=True, pooled=not self.pooled)


@dataclass(frozen=True)
class Effort:
    """How far a search on the model goes. prompts: to measure on; length: the longest of them, in tokens; shares: what
    part of it prompts have, in turn; again: how many more the best sets are measured on, in the end.

    rounds: how often the best set of a size gives way to one beside it. In each: promising, sets with an anchor
    swapped that an objective thinks best; moved, sets with an anchor moved a little, which no objective need think
    well of. one: sets with an anchor more or less. ways: how many of the best sets are read the other way. most: runs
    for each prompt after which no round begins.
    """

    prompts: int
    length: int
    shares: tuple[float, ...]
    again: int
    rounds: int
    promising: int
    moved: int
    one: int
    ways: int
    most: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of the prompts, in turn: never less than 1k of what is longer."""
        return [max(min(1024, self.length), int(self.length * share)) for share in self.shares]


ON_CPU = Effort(prompts=8, length=2048, shares=(1,), again=0, rounds=2, promising=2, moved=4, one=2, ways=1, most=16)
# A layer that can be spared at 4k need not be one at 16k.
ON_GPU = Effort(
    prompts=24,
    length=16384,
    shares=(1, 1 / 4, 1 / 2),
    again=24,
    rounds=4,
    promising=8,
    moved=24,
    one=12,
    ways=3,
    most=200,
)


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
    count: int,
    moved: int,
) -> list[Candidate]:
    """Sets of the same size, one anchor swapped (never layer 0), that are not `known`: the `count` most promising, and
    `moved` of those that move an anchor by up to three layers, nearest first.

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
        found += _promising(problem, near, assignment, max(0, count + moved - len(found)))
    return found


def without_one(
    problem: Problem, anchors: tuple[int, ...], known: Iterable[tuple[int, ...]], assignment: str, count: int
) -> list[Candidate]:
    """Sets that lack one of the anchors (never layer 0) and are not `known`: the `count` most promising."""
    left = {tuple(anchor for anchor in anchors if anchor != gone) for gone in anchors[1:]}
    return _promising(problem, left - set(known), assignment, count)


def with_one_more(
    problem: Problem, anchors: tuple[int, ...], known: Iterable[tuple[int, ...]], assignment: str, count: int
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
