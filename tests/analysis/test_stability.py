from pathlib import Path

import numpy as np
import pytest

from kascade_cli.analysis import anchors as search
from kascade_cli.analysis import selection
from kascade_cli.analysis.problem import make_problem
from kascade_cli.analysis.similarity import Measured, measure
from kascade_cli.analysis.stability import bootstrap
from tests.toy_captures import random_prompt, write_capture


def measured_of(sims, importance=None):
    """Measured figures of prompts whose decode and prefill similarity are both `sims[p]` [L, L, G, G]."""
    sims = np.asarray(sims, np.float32)
    prompts, layers = sims.shape[:2]
    importance = np.ones((prompts, layers), np.float32) if importance is None else importance
    return Measured(
        path=Path("none.h5"), meta={}, profiled_layers=list(range(layers)), prompts=prompts, top_k=64, reduce="min",
        tiles={"decode": 1, "prefill": 1}, sim={"decode": sims, "prefill": sims},
        present={phase: np.arange(prompts) for phase in ("decode", "prefill")},
        importance=importance.mean(axis=0, dtype=np.float64), importance_per_prompt=importance,
        top_mass=np.zeros((layers, 2, 1)),
    )  # fmt: skip


def favouring(layer, layers=4, heads=2):
    """Similarity in which `layer` is the only good anchor beside 0, and its heads are swapped."""
    sim = np.zeros((layers, layers, heads, heads), np.float32)
    sim[np.triu_indices(layers)] = 0.1
    sim[layer, layer:, 0, 1] = sim[layer, layer:, 1, 0] = 0.9
    for index in range(layers):
        sim[index, index] = np.eye(heads)
    return sim


def test_equal_prompts_give_certainty():
    stable = bootstrap(measured_of([favouring(2)] * 5), "both", "uniform", (0, 2), "nearest", 50)
    assert stable.searched == (0, 2)
    assert stable.same_set == 1
    assert stable.chosen == [1, 0, 1, 0]
    assert stable.heads == 1


def test_shares_follow_the_prompts_drawn():
    """One prompt of three wants layer 1, the others layer 2; what wins depends on what was drawn."""
    sims = [favouring(1), favouring(2), favouring(2)]
    measured = measured_of(sims)
    stable = bootstrap(measured, "decode", "uniform", (0, 2), "nearest", 400)
    rng = np.random.default_rng(99)
    wanted = []
    for _ in range(3000):
        mean = np.mean([sims[i] for i in rng.integers(0, 3, 3)], axis=0, dtype=np.float64)
        gains = search.layer_gains(search.layer_similarity(mean), np.ones(4))
        wanted.append(1 in search.best_sets(gains, 2)[1].anchors)
    assert 0.05 < np.mean(wanted) < 0.95
    assert stable.chosen[1] == pytest.approx(np.mean(wanted), abs=0.08)
    assert stable.chosen[0] == 1
    assert sum(stable.chosen) == pytest.approx(2)
    assert stable.same_set == stable.chosen[stable.searched[1]]
    assert stable.heads < 1  # where nobody wants layer 2, its map is a tie


def test_importance_is_resampled_too():
    importance = np.array([[1, 0.01, 0, 1], [1, 1, 0.01, 0]], np.float32)
    sims = np.stack([np.maximum(favouring(1), favouring(2))] * 2)
    stable = bootstrap(measured_of(sims, importance), "decode", "importance", (0, 1), "nearest", 200)
    assert 0.1 < stable.chosen[1] < 1


@pytest.mark.parametrize("assignment", ["nearest", "free"])
def test_permuting_prompts_changes_nothing(tmp_path, assignment):
    rng = np.random.default_rng(0)
    prompts = [
        random_prompt(rng, layers=5, heads=2, n_tokens=120, tiles=[(64, 32), (100, 1)], related=0.3) for _ in range(6)
    ]
    results = []
    for name, order in (("a", range(6)), ("b", [3, 1, 5, 0, 4, 2])):
        measured = measure(write_capture(tmp_path / f"{name}.h5", [prompts[i] for i in order]), top_k=9)
        results.append(bootstrap(measured, "both", "importance", (0, 2), assignment, 60))
    assert results[0] == results[1]
    assert 0 < results[0].heads < 1


def test_prompts_without_one_kind_of_tile(tmp_path):
    rng = np.random.default_rng(0)
    kinds = [[(64, 32), (100, 1)], [(100, 1)], [(110, 1)], [(99, 1)]]
    prompts = [random_prompt(rng, layers=4, heads=2, n_tokens=120, tiles=tiles) for tiles in kinds]
    measured = measure(write_capture(tmp_path / "a.h5", prompts), top_k=9)
    assert [len(measured.sim[phase]) for phase in ("decode", "prefill")] == [4, 1]
    stable = bootstrap(measured, "both", "importance", (0, 2), "nearest", 40)
    assert np.isfinite(stable.chosen).all()
    problem = make_problem(measured, "both")
    assert stable.searched == selection.search_sets(problem, "importance", 2, "nearest")[1].anchors


def test_all_layers_anchors_leave_no_maps():
    assert bootstrap(measured_of([favouring(2)] * 2), "both", "uniform", (0, 1, 2, 3), "nearest", 3).heads is None
