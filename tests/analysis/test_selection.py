import numpy as np
import pytest

from kascade_cli.analysis import cost, selection
from kascade_cli.analysis.anchors import AnchorSet, layer_similarity
from kascade_cli.analysis.candidates import propose
from kascade_cli.analysis.problem import make_problem
from kascade_cli.analysis.rows import Row, figures_dict, make_row, set_similarity, worst_layer
from kascade_cli.analysis.rules import choose
from kascade_cli.analysis.similarity import measure
from kascade_cli.errors import TargetMissed, UsageError
from tests.toy_captures import random_prompt, write_capture


@pytest.fixture
def measured(capture):
    return measure(capture, top_k=9)


def test_both_is_the_mean_of_the_two_objectives(measured):
    both, one, two = (make_problem(measured, phase) for phase in ("both", "decode", "prefill"))
    np.testing.assert_allclose(both.similarity, (one.similarity + two.similarity) / 2)
    np.testing.assert_allclose(one.similarity, layer_similarity(measured.mean("decode")))
    assert not np.allclose(one.similarity, two.similarity)


@pytest.mark.parametrize(("kept", "lost", "phase"), [("decode", "prefill", "prefill"), ("prefill", "decode", "both")])
def test_a_phase_without_tiles_borrows_the_other_and_says_so(tmp_path, kept, lost, phase):
    tiles = [(90, 1), (110, 1)] if kept == "decode" else [(64, 32), (96, 30)]
    prompts = [random_prompt(np.random.default_rng(1), layers=4, heads=2, n_tokens=126, tiles=tiles)]
    problem = make_problem(measure(write_capture(tmp_path / "c.h5", prompts), top_k=9), phase)
    assert list(problem.sims) == [kept]
    np.testing.assert_array_equal(problem.map_sims[lost], problem.map_sims[kept])
    assert any(f"the {lost} head maps" in note for note in problem.notes)


def test_head_maps_come_from_their_own_phase(measured):
    problem = make_problem(measured, "decode")
    maps = selection.head_maps(problem, (0, 2), "nearest")
    assert sorted(maps) == [1, 3, 4]
    for layer, anchor in ((1, 0), (3, 2), (4, 2)):
        for phase in ("decode", "prefill"):
            assert maps[layer][phase] == measured.mean(phase)[anchor, layer].argmax(axis=0).tolist()


def test_layers_are_absolute_in_maps(tmp_path):
    prompts = [random_prompt(np.random.default_rng(1), layers=3, heads=2, n_tokens=90, tiles=[(64, 26), (80, 1)])]
    path = write_capture(tmp_path / "c.h5", prompts, profiled_layers=[1, 4, 6], layers=8)
    problem = make_problem(measure(path, top_k=5), "both")
    free = selection.head_maps(problem, (0, 1), "free")
    assert sorted(free) == [6]
    assert {anchor for anchor, _ in free[6]["decode"]} <= {1, 4}
    assert problem.absolute((0, 2)) == [1, 6]


@pytest.mark.parametrize("assignment", ["nearest", "free"])
def test_similarity_of_a_set_by_hand(measured, assignment):
    problem = make_problem(measured, "both")
    for phase, found in set_similarity(problem, (0, 2), assignment).items():
        sim = measured.mean(phase)
        for layer in range(5):
            if layer in (0, 2):
                wanted = 1.0
            else:
                sources = [0] if layer < 2 else [0, 2] if assignment == "free" else [2]
                wanted = np.mean([max(sim[a, layer, h, g] for a in sources for h in (0, 1)) for g in (0, 1)])
            assert found[layer] == pytest.approx(wanted)


def test_objective_of_a_row_is_the_weighted_sum(measured):
    problem = make_problem(measured, "decode")
    found = selection.search_sets(problem, "importance", 3, "nearest")[2]
    recovered = set_similarity(problem, found.anchors, "nearest")["decode"]
    assert found.objective == pytest.approx(float(measured.importance @ recovered))


def test_search_of_one_size_equals_that_of_all(measured):
    problem = make_problem(measured, "both")
    for assignment in ("nearest", "free"):
        every = selection.search_sets(problem, "uniform", 5, assignment)
        assert [len(entry.anchors) for entry in every] == [1, 2, 3, 4, 5]
        assert selection.search_sets(problem, "uniform", 5, assignment, size=3) == [every[2]]


def rows(*recovered, speed=None):
    speed = speed or [9 - size for size in range(len(recovered))]
    table = []
    for size, mass in enumerate(recovered):
        speedup = {"decode": speed[size], "prefill": speed[size] / 2}
        table.append(
            Row(
                tuple(range(size + 1)),
                float(size),
                {"decode": np.full(8, 0.3)},
                speedup,
                True,
                {"decode": np.full(8, mass)},
            )
        )
    return table


def test_rules():
    table = rows(0.3, 0.6, 0.9, 0.99, 0.995)
    assert choose(table, anchors=2).row.size == 2
    assert choose(table, min_recovered=0.6).row.size == 2
    assert choose(table, min_recovered=0.61).row.size == 3
    default = choose(table)  # .985 is enough: within 1.5 points of the most
    assert (default.row.size, default.rule) == (4, "default")
    fast = choose(table, target_speedup=7)
    assert (fast.row.size, fast.rule) == (3, "target-speedup")
    assert "decode" in fast.why
    assert choose(table, target_speedup=4, phase="prefill").row.size == 2


def test_the_default_is_the_fewest_on_the_plateau_and_not_slower_than_dense():
    assert choose(rows(0.4, 0.8, 0.886, 0.885, 0.9, speed=[9, 8, 7, 6, 5])).row.size == 3
    assert choose(rows(0.4, 0.8, 0.884, 0.9, speed=[9, 8, 7, 6])).row.size == 4
    slow = choose(rows(0.1, 0.2, 0.3, speed=[4, 3, 1.5]))  # 3 anchors would be slower than dense in prefill
    assert slow.row.size == 2
    assert "(20.0%; 20.0% with 2)" in slow.why
    assert choose(rows(0.1, 0.2, speed=[0.5, 0.4])).row.size == 2  # nothing is faster: the mass alone


@pytest.mark.parametrize("rule", [{"min_recovered": 0.9999}, {"target_speedup": 10}])
def test_missed_targets(rule):
    with pytest.raises(TargetMissed):
        choose(rows(0.3, 0.6, 0.9), **rule)


@pytest.mark.parametrize(
    "rule",
    [
        {"anchors": 2, "min_recovered": 0.9},
        {"min_recovered": 0.0},
        {"min_recovered": 1.1},
        {"target_speedup": 0},
        {"target_speedup": float("nan")},
        {"anchors": 4},
    ],
)
def test_rules_that_make_no_sense(rule):
    with pytest.raises(UsageError):
        choose(rows(0.3, 0.6, 0.9), **rule)


@pytest.mark.parametrize(
    ("layers", "limit"), [(1, 1), (2, 2), (3, 2), (8, 4), (9, 4), (16, 4), (24, 6), (30, 8), (36, 9)]
)
def test_default_max_anchors(layers, limit):
    assert selection.default_max_anchors(layers) == limit


@pytest.mark.parametrize("assignment", ["nearest", "free"])
def test_candidates_are_the_best_under_both_weightings_once_each(measured, assignment):
    problem = make_problem(measured, "both")
    found = propose(problem, [2, 3], 2, assignment)
    assert len({entry.anchors for entry in found}) == len(found)
    for size in (2, 3):
        for weights in ("importance", "uniform"):
            best = selection.search_sets(problem, weights, 5, assignment, size=size)[0]
            entry = next(entry for entry in found if entry.anchors == best.anchors)
            assert entry.objectives[weights] == pytest.approx(best.objective)
    assert 2 <= sum(len(entry.anchors) == 2 for entry in found) <= (4 if assignment == "nearest" else 6)


def test_the_worst_layer(measured):
    problem = make_problem(measured, "both")
    row = make_row(problem, AnchorSet((0, 2), 7), "nearest", cost.published(), 131072)
    mean = np.mean(list(row.similarity.values()), axis=0)
    assert worst_layer(row.similarity) == (mean.min(), mean.argmin())
    document = figures_dict(problem, row.similarity)
    assert document["worst_layer"] == int(mean.argmin())
    assert document["mean"] == pytest.approx(row.similarity_mean, abs=1e-6)
