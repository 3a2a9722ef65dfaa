"""Neighbours of a set against a listing of all sets."""

import itertools

import pytest

from kascade_cli.analysis.candidates import neighbours, with_one_more, without_one
from kascade_cli.analysis.problem import make_problem
from kascade_cli.analysis.rows import any_set
from kascade_cli.analysis.similarity import measure


@pytest.fixture
def problem(capture):
    return make_problem(measure(capture, top_k=9), "both")


def of_size(size):
    return {(0, *rest) for rest in itertools.combinations(range(1, 5), size - 1)}


@pytest.mark.parametrize("assignment", ["nearest", "free"])
@pytest.mark.parametrize("anchors", [(0, 2), (0, 1, 4), (0, 1, 2, 3)])
def test_all_of_them(problem, anchors, assignment):
    beside = {entry for entry in of_size(len(anchors)) if len(set(entry) ^ set(anchors)) == 2}
    found = neighbours(problem, anchors, [anchors], assignment, count=99)
    assert {entry.anchors for entry in found} == beside
    known = sorted(beside)[:1]
    assert {entry.anchors for entry in neighbours(problem, anchors, known, assignment, 99)} == beside - set(known)
    fewer = {entry for entry in of_size(len(anchors) - 1) if set(entry) < set(anchors)}
    assert {entry.anchors for entry in without_one(problem, anchors, [], assignment, 99)} == fewer
    more = {entry for entry in of_size(len(anchors) + 1) if set(entry) > set(anchors)}
    assert {entry.anchors for entry in with_one_more(problem, anchors, [], assignment, 99)} == more
    for entry in found:
        assert entry.neighbour
        assert entry.objectives == {
            name: any_set(problem, entry.anchors, name, assignment).objective for name in ("importance", "uniform")
        }


def test_the_most_promising_of_each_weighting(problem):
    every = neighbours(problem, (0, 1, 3), [], "nearest", 99)
    for count in (1, 2, 3, len(every)):
        few = {entry.anchors for entry in neighbours(problem, (0, 1, 3), [], "nearest", count)}
        assert len(few) == count
        for name, share in (("importance", -(-count // 2)), ("uniform", count // 2)):
            best = sorted(every, key=lambda entry: -entry.objectives[name])[:share]  # noqa: B023
            assert {entry.anchors for entry in best} <= few


def test_layer_0_stays(problem):
    assert without_one(problem, (0,), [], "nearest") == []
    assert neighbours(problem, (0,), [], "nearest") == []
    assert neighbours(problem, (0, 1, 2, 3, 4), [], "nearest") == []
