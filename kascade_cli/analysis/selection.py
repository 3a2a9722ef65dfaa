"""From similarity to a decision: the table of budgets, the rule that chooses a row, and the profile's
layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kascade_cli.analysis import anchors as search
from kascade_cli.analysis.cost import CostTable
from kascade_cli.analysis.similarity import PHASES, Measured
from kascade_cli.errors import TargetMissed, UsageError

DEFAULT_RECOVERED = 0.98
KL_TOLERANCE = 0.02  # nats


@dataclass(frozen=True)
class Problem:
    """What anchors are chosen for. Layers count within `layers` (absolute indices of the profiled layers).

    sims: float64 [L, L, G, G] per phase of the objective; map_sims: the same for both phases, where a phase
    without tiles borrows the other's; weights: name -> float64 [L]; notes: what the user should know.
    """

    layers: list[int]
    sims: dict[str, np.ndarray]
    map_sims: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    notes: list[str] = field(default_factory=list)

    @property
    def similarity(self) -> np.ndarray:
        """S [L, L], the mean over the phases of the objective."""
        return np.mean([search.layer_similarity(sim) for sim in self.sims.values()], axis=0)

    def gains(self, weights: str) -> np.ndarray:
        return search.layer_gains(self.similarity, self.weights[weights])

    def client_gains(self, weights: str) -> np.ndarray:
        return search.client_gains(self.sims, self.weights[weights])

    def absolute(self, anchors: Sequence[int]) -> list[int]:
        return [self.layers[index] for index in anchors]


def make_problem(measured: Measured, phase: str) -> Problem:
    """`phase`: decode, prefill or both (the mean of the two objectives)."""
    return problem_of({name: measured.mean(name) for name in measured.sim}, measured.importance, measured, phase)


def problem_of(sims: dict[str, np.ndarray], importance: np.ndarray, measured: Measured, phase: str) -> Problem:
    """The problem that these mean similarities pose (of the whole capture, or of a resample)."""
    notes = []
    missing = [name for name in PHASES if name not in sims]
    map_sims = dict(sims)
    for name in missing:
        other = next(iter(sims))
        kind = "decode rows" if name == "decode" else "prefill tiles"
        notes.append(f"the capture has no {kind}: the {name} head maps are those measured for {other}")
        map_sims[name] = sims[other]
    wanted = PHASES if phase == "both" else (phase,)
    used = {name: sims[name] for name in wanted if name in sims}
    if not used:
        used = dict(sims)
        notes.append(f"anchors for {phase} are chosen by the similarity of {next(iter(sims))}")
    if measured.reduce == "min" and all(_says_nothing(sim) for sim in used.values()):
        notes.append(
            f"no tile has more than {measured.top_k} keys to choose from: capture longer prompts, or lower --top-k"
        )
    weights = {"importance": np.maximum(importance, 0.0), "uniform": np.ones(len(importance))}
    return Problem(measured.profiled_layers, used, map_sims, weights, notes)


def _says_nothing(sim: np.ndarray) -> bool:
    above = np.triu_indices(len(sim), 1)
    return bool(len(above[0])) and bool((sim[above] >= 1).all())


@dataclass(frozen=True)
class Row:
    """One budget. recovered: phase -> float64 [L], mass that each layer keeps relative to its own Top-k."""

    anchors: tuple[int, ...]
    objective: float
    recovered: dict[str, np.ndarray]
    speedup: dict[str, float | None]
    proven: bool = True

    @property
    def size(self) -> int:
        return len(self.anchors)

    @property
    def recovered_mean(self) -> float:
        return float(np.mean(list(self.recovered.values())))

    @property
    def worst(self) -> tuple[float, int]:
        """(recovered mass, layer position) of the layer that loses most, averaged over phases."""
        mean = np.mean(list(self.recovered.values()), axis=0)
        return float(mean.min()), int(mean.argmin())


def recovered_mass(problem: Problem, anchors: tuple[int, ...], assignment: str) -> dict[str, np.ndarray]:
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
        recovered=recovered_mass(problem, found.anchors, assignment),
        speedup={phase: cost.speedup(phase, context, len(problem.layers), len(found.anchors)) for phase in PHASES},
        proven=getattr(found, "proven", True),
    )


def default_max_anchors(layers: int) -> int:
    """Half of the layers, rounded up, at least 2 where there are 2."""
    return min(layers, max(2, (layers + 1) // 2))


def search_sets(problem: Problem, weights: str, max_anchors: int, assignment: str, size: int | None = None) -> list:
    """The best set of every size up to `max_anchors` (or of one size): dynamic programme, or MILP if free."""
    nearest = search.best_sets(problem.gains(weights), max_anchors)
    nearest = nearest if size is None else nearest[size - 1 : size]
    if assignment == "nearest":
        return nearest
    gains = problem.client_gains(weights)
    return [search.free_set(gains, len(problem.layers), len(entry.anchors), entry.anchors) for entry in nearest]


def head_maps(problem: Problem, anchors: tuple[int, ...], assignment: str) -> dict[int, dict[str, list]]:
    """{absolute layer: {phase: per KV head an anchor head, or [absolute anchor, head] if free}} for reuse
    layers.
    """
    maps: dict[int, dict[str, list]] = {}
    for layer, absolute in enumerate(problem.layers):
        if layer in anchors:
            continue
        nearest = max(a for a in anchors if a < layer)
        maps[absolute] = {}
        for phase in PHASES:
            sim = problem.map_sims[phase]
            if assignment == "nearest":
                maps[absolute][phase] = search.head_map(sim, nearest, layer)
            else:
                pairs = search.free_head_map(sim, anchors, layer)
                maps[absolute][phase] = [(problem.layers[anchor], head) for anchor, head in pairs]
    return maps


@dataclass(frozen=True)
class Choice:
    """A chosen row, the rule that chose it and one line that says why."""

    row: Row
    rule: str
    why: str


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


def check_rules(anchors: Any, min_recovered: float | None, target_speedup: float | None) -> None:
    """Raises UsageError unless at most one rule is given, with a number that can make sense."""
    rules = {"--anchors": anchors, "--min-recovered": min_recovered, "--target-speedup": target_speedup}
    given = [name for name, value in rules.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} are two rules for one choice; give one of them")
    if min_recovered is not None and not 0 < min_recovered <= 1:
        raise UsageError(f"--min-recovered {min_recovered} is outside (0, 1]")
    if target_speedup is not None and not target_speedup > 0:
        raise UsageError(f"--target-speedup {target_speedup} must be above 0")


def choose(
    rows: Sequence[Row],
    *,
    anchors: int | None = None,
    min_recovered: float | None = None,
    target_speedup: float | None = None,
    phase: str = "both",
) -> Choice:
    """Applies the one rule given, or the default (docs/select-anchors.md).

    Raises UsageError for more than one rule or an impossible number, TargetMissed if no row meets the target.
    """
    check_rules(anchors, min_recovered, target_speedup)
    if anchors is not None:
        by_size = {row.size: row for row in rows}
        if anchors not in by_size:
            raise UsageError(f"--anchors {anchors} is outside 1..{max(by_size)}")
        return Choice(by_size[anchors], "anchors", f"{anchors} anchors were asked for")
    if target_speedup is not None:
        return _fast_enough(rows, target_speedup, "prefill" if phase == "prefill" else "decode")
    wanted = DEFAULT_RECOVERED if min_recovered is None else min_recovered
    enough = [row for row in rows if row.recovered_mean >= wanted]
    if enough:
        row = min(enough, key=lambda row: row.size)
        rule = "default" if min_recovered is None else "min-recovered"
        return Choice(
            row, rule, f"the fewest anchors that recover {wanted:.1%} of the mass ({row.recovered_mean:.1%})"
        )
    most = max(rows, key=lambda row: (row.recovered_mean, -row.size))
    if min_recovered is not None:
        raise TargetMissed(
            f"no set of up to {rows[-1].size} anchors recovers {wanted:.1%}; the most is "
            f"{most.recovered_mean:.1%} with {most.size}: raise --max-anchors or lower --min-recovered"
        )
    phases = PHASES if phase == "both" else (phase,)
    faster = [row for row in rows if all((row.speedup[name] or 2) > 1 for name in phases)] or rows
    best = max(faster, key=lambda row: (row.recovered_mean, -row.size))
    return Choice(
        best,
        "default",
        f"no set of up to {rows[-1].size} anchors recovers {wanted:.0%}; of those predicted faster than dense it "
        f"recovers most ({best.recovered_mean:.1%}). --verify measures how few anchors are enough",
    )


def _fast_enough(rows: Sequence[Row], target: float, phase: str) -> Choice:
    if any(row.speedup[phase] is None for row in rows):
        raise UsageError(f"the cost table has no {phase} rows, so --target-speedup cannot be judged")
    enough = [row for row in rows if row.speedup[phase] >= target]
    if not enough:
        best = max(rows, key=lambda row: row.speedup[phase])
        raise TargetMissed(
            f"no set reaches {target:g}x in {phase}: the most predicted is {best.speedup[phase]:.2f}x with "
            f"{best.size} anchors; lower --target-speedup or give another --cost table"
        )
    row = max(enough, key=lambda row: row.size)
    why = f"the most anchors whose predicted {phase} speed-up is {target:g}x or more ({row.speedup[phase]:.2f}x)"
    return Choice(row, "target-speedup", why)


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


def candidates(problem: Problem, sizes: Sequence[int], count: int, assignment: str) -> list[Candidate]:
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


def decide(measured: Sequence[Candidate], size: int | None, tolerance: float = KL_TOLERANCE) -> tuple[Candidate, str]:
    """The measured best of `size` anchors; without a size, the fewest anchors whose best set is within
    `tolerance` nats of the best of all. Ties go to fewer anchors, then to the lexicographically smallest
    set."""

    def key(entry: Candidate) -> tuple:
        return entry.score, len(entry.anchors), entry.anchors

    if size is not None:
        best = min((entry for entry in measured if len(entry.anchors) == size), key=key)
        return best, f"the lowest measured KL of the candidates with {size} anchors ({best.score:.4f} nats)"
    overall = min(measured, key=key)
    close = [entry for entry in measured if entry.score <= overall.score + tolerance]
    fewest = min(len(entry.anchors) for entry in close)
    best = min((entry for entry in close if len(entry.anchors) == fewest), key=key)
    reason = f"the fewest anchors with a measured KL within {tolerance:g} nats of the best"
    return best, f"{reason} ({best.score:.4f}; the best is {overall.score:.4f} with {len(overall.anchors)} anchors)"


def any_set(problem: Problem, anchors: tuple[int, ...], weights: str, assignment: str) -> search.AnchorSet:
    """Any set (positions) with its objective under `weights`."""
    if assignment == "free":
        value = search.free_value(problem.client_gains(weights), anchors)
    else:
        value = search.nearest_value(problem.gains(weights), anchors)
    return search.AnchorSet(anchors, value)


def recovered_dict(problem: Problem, row: Row) -> dict[str, Any]:
    """For the profile: mean and worst layer, overall and per phase (absolute layers)."""

    def entry(values: np.ndarray) -> dict[str, Any]:
        return {
            "mean": round(float(values.mean()), 6),
            "worst": round(float(values.min()), 6),
            "worst_layer": problem.layers[int(values.argmin())],
        }

    overall = entry(np.mean(list(row.recovered.values()), axis=0))
    return overall | {phase: entry(values) for phase, values in row.recovered.items()}
