"""From a measured capture to a profile, step by step; what `kascade select-anchors` does between reading and printing.

    measured = similarity.measure("capture.h5")
    search = Search(measured, Settings(anchors=4))
    decision = search.decide()                      # or, measured on the model: search.decide(candidates)
    search.profile(decision, Budget(ratio=0.1)).save("profile.yaml")

`kascade_cli.evaluation.verification` measures `search.candidates(n)`; nothing here needs torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kascade_cli.analysis import cost as costs
from kascade_cli.analysis import problem as problems
from kascade_cli.analysis import rank_maps, record, recovered, rules, selection, stability, verdict
from kascade_cli.analysis import rows as tables
from kascade_cli.analysis.candidates import Candidate, Effort, neighbours, propose, with_one_more, without_one
from kascade_cli.analysis.rows import Row
from kascade_cli.analysis.rules import Choice
from kascade_cli.analysis.settings import Settings
from kascade_cli.analysis.similarity import Measured
from kascade_cli.errors import UsageError
from kascade_cli.schema import Budget, ModelCard, Profile

DEFAULT_CONTEXT = 128 * 1024
_ANSWERING = 0.25  # of the answers: a model that gives less loses them by chance


@dataclass
class Decision:
    """What was chosen and why. candidates: what was measured for it; verified: on what (for the profile's record);
    notes: what the user should know about it; ratios: what was found per length, for a budget with a table."""

    choice: Choice
    candidates: list[Candidate] = field(default_factory=list)
    verified: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ratios: list[dict[str, Any]] = field(default_factory=list)
    stable: stability.Stability | None = None

    @property
    def anchors(self) -> tuple[int, ...]:
        """Positions within the profiled layers."""
        return self.choice.row.anchors


class Search:
    """The best anchor sets of a capture, and everything that follows from choosing one of them.

    problem: what is solved; rows: the best set of every size up to the limit; nearest: under free assignment, the
    objectives of the dynamic programme beside it; given: the positions of an explicit set, or None.
    """

    def __init__(
        self,
        measured: Measured,
        settings: Settings | None = None,
        *,
        budget: Budget | None = None,
        cost: costs.CostTable | None = None,
        context: int = DEFAULT_CONTEXT,
        workers: int | None = None,
        advance: Callable[[int, int], None] | None = None,
    ) -> None:
        """budget: the profile's (the default one). workers, advance: as `similarity.measure` has them, for the pass
        that measures recovered mass."""
        self.budget = capture_budget(measured.meta) if budget is None else budget
        self._reading = {"workers": workers, "advance": advance}
        self._recovered: dict[tuple[tuple[int, ...], bool], dict[str, np.ndarray]] = {}
        self.settings = settings or Settings()
        self.ranks = self.settings.tensor_parallel
        self.measured = rank_maps.within_ranks(measured, self.ranks)
        # The same with head maps that cross ranks: what staying within them costs.
        self._free = problems.make_problem(measured, self.settings.phase) if self.ranks > 1 else None
        self._recovered_free: dict[tuple[tuple[int, ...], bool], dict[str, np.ndarray]] = {}
        self.cost, self.context = cost or costs.published(), context
        self.problem = problems.make_problem(self.measured, self.settings.phase)
        self.limit = self.settings.limit(self.problem.layers)
        asked = self.settings.anchors
        self.given = selection.positions(asked, self.problem.layers) if isinstance(asked, tuple) else None
        weights, assignment = self.settings.weights, self.settings.assignment
        sets = selection.search_sets(self.problem, weights, self.limit, assignment)
        rows = [tables.make_row(self.problem, found, assignment, self.cost, context) for found in sets]
        self.rows = [replace(row, pooled=self._pooled(row.anchors)) for row in rows]
        self.nearest: list[float] | None = None
        if assignment == "free":
            nearest = selection.search_sets(self.problem, weights, self.limit, "nearest")
            self.nearest = [entry.objective for entry in nearest]

    def row(self, anchors: tuple[int, ...], pooled: bool | None = None) -> Row:
        """The row of any set of positions, its objective under the settings' weights and assignment."""
        found = tables.any_set(self.problem, anchors, self.settings.weights, self.settings.assignment)
        row = tables.make_row(self.problem, found, self.settings.assignment, self.cost, self.context)
        return replace(row, pooled=self._pooled(anchors) if pooled is None else pooled)

    def _pooled(self, anchors: tuple[int, ...]) -> bool:
        """How a set is read unless measuring says otherwise; without reuse layers there is nothing to read."""
        return self.settings.heads == "pooled" and len(anchors) < len(self.problem.layers)

    def candidates(self, count: int) -> list[Candidate]:
        """Sets to measure: the `count` best under both weightings, of every size or the rule's; or the given one."""
        assignment = self.settings.assignment
        if self.given is not None:
            objectives = {
                name: tables.any_set(self.problem, self.given, name, assignment).objective
                for name in self.problem.weights
            }
            return [Candidate(self.given, objectives, pooled=self._pooled(self.given))]
        sizes = [self._by_rule().row.size] if self.settings.has_rule else range(1, self.limit + 1)
        found = propose(self.problem, sizes, count, assignment)
        return [replace(entry, pooled=self._pooled(entry.anchors)) for entry in found]

    def other_way(self, best: Candidate, known: Sequence[Candidate]) -> Candidate | None:
        """The anchors of `best` with head maps where they are read pooled, and the reverse; None where that is known,
        or one way of reading was asked for."""
        other = best.other_way()
        if not self.settings.both_ways(self.measured.meta["kv_heads"]) or other.key in {one.key for one in known}:
            return None
        return other if len(other.anchors) < len(self.problem.layers) else None

    def decide(self, candidates: Sequence[Candidate] = (), verified: dict[str, Any] | None = None) -> Decision:
        """Applies the rule, or with measured `candidates` their KL within what the rule leaves open.

        Raises TargetMissed if no set meets a target, UsageError for an impossible rule.
        """
        if not candidates:
            return self._measured(Decision(self._by_rule()))
        by_rule = self._by_rule() if self.settings.has_rule else None
        found = self.verdict(candidates)
        notes = list(found.notes)
        if self.given is not None:
            kept = f", {found.best.kept} of {found.best.given} answers kept" if found.best.given else ""
            why = f"{by_rule.why}; their measured KL is {found.best.score:.4f} nats{kept}"
            choice = Choice(self.row(self.given, found.best.pooled), by_rule.rule, why)
        else:
            row = self.row(found.best.anchors, found.best.pooled)
            why = f"{by_rule.why}; of these {found.why}" if by_rule else found.why
            choice = Choice(row, by_rule.rule if by_rule else "verify", why)
            notes += self._overruled(found.best, candidates)
        notes += self._ways(found.best, candidates)
        return self._measured(Decision(choice, list(candidates), verified or {}, notes))

    @property
    def _every(self) -> tuple[tuple[int, ...], bool]:
        return tuple(range(len(self.problem.layers))), False

    @property
    def own(self) -> float:
        """The mean recovered mass where every layer reads its own keys (the first one all), once mass is measured."""
        return float(np.mean([self._recovered[self._every][phase] for phase in self.problem.sims]))

    def _measured(self, decision: Decision) -> Decision:
        """With the recovered mass of its row, and of all rows: one pass over the capture at most."""
        self.rows[:], row = (found := self.with_mass([*self.rows, decision.choice.row]))[:-1], found[-1]
        decision.choice = replace(decision.choice, row=row)
        wanted = self.settings.min_recovered
        if wanted is not None and row.recovered_mean < wanted:
            decision.notes.append(
                f"the chosen set recovers {row.recovered_mean:.1%} and not {wanted:.1%}: the rule gave the number of "
                "anchors, and what was measured the set"
            )
        return decision

    def with_mass(self, rows: Sequence[Row]) -> list[Row]:
        """`rows` with the recovered mass at the budget, reading the capture for those not known yet.

        With them goes the set of all layers, which says what there is to recover at this budget: `own`.
        """
        wanted = [self._every, *(row.key for row in rows)]
        if unknown := list(dict.fromkeys(key for key in wanted if key not in self._recovered)):
            layers, heads = len(self.problem.layers), self.measured.meta["kv_heads"]
            links = []
            for problem in [self.problem] + ([self._free] if self._free else []):
                for anchors, pooled in unknown:
                    if pooled:
                        links.append(recovered.pooled_links(anchors, layers, heads))
                        continue
                    maps = selection.position_maps(problem, anchors, self.settings.assignment)
                    links.append(recovered.set_links(anchors, maps, layers, heads))
            found = recovered.measure(self.measured.path, links, self.budget, **self._reading)
            self._recovered.update(zip(unknown, found, strict=False))
            self._recovered_free.update(zip(unknown, found[len(unknown) :], strict=False))
        return [
            replace(
                row,
                recovered=self._of_phases(self._recovered[row.key]),
                recovered_free=self._of_phases(self._recovered_free.get(row.key, {})),
            )
            for row in rows
        ]

    def _of_phases(self, mass: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Of the phases that sets are chosen for."""
        return {phase: mass[phase] for phase in self.problem.sims if phase in mass}

    def verdict(self, candidates: Sequence[Candidate]) -> verdict.Verdict:
        """What the measured `candidates` say, within what the rule leaves open."""
        size = self._by_rule().row.size if self.settings.has_rule else None
        return verdict.decide(candidates, size, self.settings.tolerance)

    def neighbours(self, best: Candidate, known: Sequence[Candidate], effort: Effort) -> list[Candidate]:
        """Same-size sets beside `best` that are worth measuring too; none of a set that was asked for."""
        if self.given is not None:
            return []
        sets = _read_as(best, known)
        found = neighbours(self.problem, best.anchors, sets, self.settings.assignment, effort.promising, effort.moved)
        return [replace(entry, pooled=best.pooled) for entry in found]

    def fewer(self, best: Candidate, known: Sequence[Candidate], effort: Effort) -> list[Candidate]:
        """Sets with an anchor less than `best` that are worth measuring too; none where a rule gives the number."""
        if self.settings.has_rule or len(best.anchors) < 2:
            return []
        found = without_one(self.problem, best.anchors, _read_as(best, known), self.settings.assignment, effort.one)
        return [replace(entry, pooled=best.pooled) for entry in found]

    def more(self, best: Candidate, known: Sequence[Candidate], effort: Effort) -> list[Candidate]:
        """Sets with an anchor more than `best`, where it loses answers of a model that gives some; none where a rule
        gives the number, or at the limit."""
        answering = best.given > 0 and best.given >= _ANSWERING * best.asked
        if not answering or not self.settings.tolerance.loses(best.lost, best.given):
            return []
        if self.settings.has_rule or len(best.anchors) >= self.limit:
            return []
        found = with_one_more(self.problem, best.anchors, _read_as(best, known), self.settings.assignment, effort.one)
        whole = len(self.problem.layers)
        return [replace(entry, pooled=best.pooled and len(entry.anchors) < whole) for entry in found]

    def _ways(self, best: Candidate, candidates: Sequence[Candidate]) -> list[str]:
        """A line where all heads shall read one key set because that was measured to be better."""
        if not best.pooled or self.settings.heads == "pooled":
            return []
        line = "pooled: all heads of a layer read one key set"
        if (other := next((one for one in candidates if one.key == (best.anchors, False)), None)) and other.prompts:
            kept = f", answers {other.kept} of {other.given}" if other.given else ""
            given_up = f" on {other.prompts} prompts" if other.prompts < best.prompts else ""
            line += f"; with head maps KL is {other.score:.4f}{kept}{given_up}"
        return [line]

    def _overruled(self, best: Candidate, candidates: Sequence[Candidate]) -> list[str]:
        """A line where the chosen set is not the objective's best of its size."""
        first = self.rows[len(best.anchors) - 1].anchors
        if first == best.anchors:
            return []
        other = next((entry for entry in candidates if entry.key == (first, self._pooled(first))), None)
        chosen, beaten = (" ".join(map(str, self.problem.absolute(entry))) for entry in (best.anchors, first))
        lost = f", answers {other.kept} of {other.given}" if other is not None and other.given else ""
        measured = f" (KL {other.score:.4f}{lost} on {other.prompts} prompts)" if other is not None else ""
        return [
            f"verification overrules the objective: {chosen} instead of {beaten}{measured}, the best of "
            f"{len(best.anchors)} by {self.settings.weights}"
        ]

    def _by_rule(self) -> Choice:
        if self.given is not None:
            return Choice(self.row(self.given), "anchors", "these anchors were asked for")
        options = self.settings
        if options.anchors is options.target_speedup is None:
            self.rows = self.with_mass(self.rows)
        return rules.choose(
            self.rows,
            anchors=options.anchors,
            min_recovered=options.min_recovered,
            target_speedup=options.target_speedup,
            phase=options.phase,
            own=self.own if self._recovered else None,
        )

    def bootstrap(self, decision: Decision, resamples: int) -> None:
        """Adds to `decision` how much of it is the dev set's accident; 0 resamples: nothing."""
        if resamples:
            options = self.settings
            stable = stability.bootstrap(
                self.measured, options.phase, options.weights, decision.anchors, options.assignment, resamples
            )
            decision.stable = replace(stable, heads=None) if decision.choice.row.pooled else stable

    @property
    def model(self) -> ModelCard:
        """Raises KascadeError if the capture's description of its model makes no sense."""
        return record.model_card(self.measured.meta)

    def layout(self, anchors: tuple[int, ...], budget: Budget | None = None, *, pooled: bool = False) -> Profile:
        """A profile with these anchors (positions) and nothing about how they were found: to be run."""
        maps = "pooled" if pooled else selection.head_maps(self.problem, anchors, self.settings.assignment)
        return Profile.build(
            model=self.model,
            anchors=self.problem.absolute(anchors),
            profiled_layers=self.problem.layers,
            head_maps=maps,
            budget=budget or self.budget,
        )

    def profile(
        self, decision: Decision, budget: Budget | None = None, *, provenance: dict[str, Any] | None = None
    ) -> Profile:
        """The profile of a decision, with its record. budget: the search's, unless another one is given.

        Raises KascadeError if that is no profile.
        """
        budget = self.budget if budget is None else budget
        return self.layout(decision.anchors, budget, pooled=decision.choice.row.pooled).model_copy(
            update={"selection": self.record(decision), "provenance": provenance or {}}
        )

    def record(self, decision: Decision) -> dict[str, Any]:
        """The profile's `selection`."""
        options = self.settings
        method = "milp" if options.assignment == "free" else "dp"
        if decision.candidates:
            method = "verify"
        elif self.given is not None:
            method = "given"
        settings = {
            "method": method,
            "phase": options.phase,
            "weights": options.weights,
            "assignment": options.assignment,
            "over_tiles": self.measured.reduce,
            "top_k": self.measured.top_k,
            "ratio": self.budget.ratio,
            "heads": "pooled" if decision.choice.row.pooled else "maps",
        }
        if self._free:
            settings["tensor_parallel"] = self.ranks_document(decision)
        return record.selection_document(settings, self.problem, decision, self.rows, self.own)

    def ranks_document(self, decision: Decision) -> dict[str, Any] | None:
        """What the profile says about its ranks; None where head maps are free."""
        if self._free is None:
            return None
        maps = selection.head_maps(self._free, decision.anchors, self.settings.assignment)
        return rank_maps.ranks_document(self.ranks, decision.choice.row, maps)


def _read_as(best: Candidate, known: Sequence[Candidate]) -> list[tuple[int, ...]]:
    """The sets of `known` that are read as `best` is."""
    return [entry.anchors for entry in known if entry.pooled == best.pooled]


def capture_budget(meta: dict[str, Any], ratio: float = 0.10, min_keys: int = 128) -> Budget:
    """A budget with the tile of a capture. Raises UsageError for a ratio or floor that cannot be."""
    if not 0 < ratio <= 1:
        raise UsageError(f"--ratio {ratio} is outside (0, 1]")
    if not 1 <= min_keys < 2**31:
        raise UsageError(f"--min-keys {min_keys} must be 1 or more, and less than 2^31")
    return record.budget(ratio=ratio, min_keys=min_keys, tile=meta["tile"])
