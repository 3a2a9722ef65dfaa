"""How much of a choice is the dev set's accident: bootstrap over prompts."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kascade_cli.analysis import anchors as search
from kascade_cli.analysis.problem import problem_of
from kascade_cli.analysis.selection import head_maps
from kascade_cli.analysis.similarity import Measured

_BLOCK = 16  # resamples computed by one matrix product


@dataclass(frozen=True)
class Stability:
    """How much the search and the head maps depend on the prompts.

    searched: what the dynamic programme gives on the whole capture for as many anchors as were chosen;
    same_set: share of resamples in which it gives that again; chosen: share in which each layer (position)
    is among its anchors; heads: share of the chosen set's head-map entries, over resamples and both phases,
    that stay as they are.
    """

    resamples: int
    searched: tuple[int, ...]
    chosen: list[float]
    same_set: float
    heads: float | None


def bootstrap(
    measured: Measured,
    phase: str,
    weights: str,
    anchors: tuple[int, ...],
    assignment: str,
    resamples: int = 200,
    seed: int = 0,
) -> Stability:
    """Draws the prompts with replacement `resamples` times and repeats the dynamic programme for the same
    number of anchors; head maps are repeated for the chosen anchors. Under free assignment too the sets
    come from the dynamic programme (a MILP per resample would take minutes). One prompt has no spread:
    every share is then 1.
    """
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(measured.prompts, np.full(measured.prompts, 1 / measured.prompts), resamples)
    base = problem_of({name: measured.mean(name) for name in measured.sim}, measured.importance, measured, phase)
    reference = _entries(head_maps(base, anchors, assignment))
    searched = search.best_sets(base.gains(weights), len(anchors))[-1].anchors
    counts = np.zeros(len(measured.profiled_layers))
    same = kept = total = 0
    for first in range(0, resamples, _BLOCK):
        for sims, importance in _resampled(measured, draws[first : first + _BLOCK].astype(np.float32)):
            problem = problem_of(sims, importance, measured, phase)
            found = search.best_sets(problem.gains(weights), len(anchors))[-1].anchors
            counts[list(found)] += 1
            same += found == searched
            entries = _entries(head_maps(problem, anchors, assignment))
            kept += sum(a == b for a, b in zip(entries, reference, strict=True))
            total += len(entries)
    share = kept / total if total else None
    return Stability(resamples, searched, (counts / resamples).tolist(), same / resamples, share)


def _resampled(measured: Measured, times: np.ndarray) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Per resample (mean sim per phase, mean importance). times: float32 [R, P], how often each prompt was
    drawn.
    """
    importance = times @ measured.importance_per_prompt / measured.prompts
    means = {}
    for phase, sim in measured.sim.items():
        drawn = times[:, measured.present[phase]]
        # A resample without any prompt of this phase says nothing about it: it keeps the mean.
        drawn = np.where(drawn.sum(axis=1, keepdims=True) > 0, drawn, 1)
        means[phase] = (drawn @ sim.reshape(len(sim), -1)) / drawn.sum(axis=1, keepdims=True)
    for index in range(len(times)):
        sims = {phase: mean[index].reshape(measured.sim[phase].shape[1:]) for phase, mean in means.items()}
        yield {phase: sim.astype(np.float64) for phase, sim in sims.items()}, importance[index].astype(np.float64)


def _entries(maps: dict) -> list:
    return [entry for layer in maps.values() for phase in layer.values() for entry in phase]
