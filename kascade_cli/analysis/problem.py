"""What anchors are chosen for: similarities, weights, and what the user should know about them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kascade_cli.analysis import anchors as search
from kascade_cli.analysis.similarity import PHASES, Measured


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
    found = sim[above]
    return bool(len(above[0])) and bool((found[found >= 0] >= 1).all())  # below 0: heads of other ranks
