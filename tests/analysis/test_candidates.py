"""Neighbours of a set against a listing of all sets."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from kascade_cli.analysis.candidates import ON_GPU, Candidate, neighbours, with_one_more, without_one
from kascade_cli.analysis.problem import make_problem
from kascade_cli.analysis.rows import any_set
from kascade_cli.analysis.similarity import measure
from kascade_cli.evaluation.forced import PromptKL
from tests.toy_captures import random_prompt, write_capture


@pytest.fixture
def problem(capture):
    return make_problem(measure(capture, top_k=9), "both")


def of_size(size):
    return {(0, *rest) for rest in itertools.combinations(range(1, 5), size - 1)}


@pytest.mark.parametrize("assignment", ["nearest", "free"])
@pytest.mark.parametrize("anchors", [(0, 2), (0, 1, 4), (0, 1, 2, 3)])
def test_all_of_them(problem, anchors, assignment):
    beside = {entry for entry in of_size(len(anchors)) if len(set(entry) ^ set(anchors)) == 2}
    found = neighbours(problem, anchors, [anchors], assignment, 99, 0)
    assert {entry.anchors for entry in found} == beside
    known = sorted(beside)[:1]
    assert {entry.anchors for entry in neighbours(problem, anchors, known, assignment, 99, 0)} == beside - set(known)
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
    every = neighbours(problem, (0, 1, 3), [], "nearest", 99, 0)
    for count in (1, 2, 3, len(every)):
        few = {entry.anchors for entry in neighbours(problem, (0, 1, 3), [], "nearest", count, 0)}
        assert len(few) == count
        for name, share in (("importance", -(-count // 2)), ("uniform", count // 2)):
            best = sorted(every, key=lambda entry: -entry.objectives[name])[:share]  # noqa: B023
            assert {entry.anchors for entry in best} <= few


def test_anchors_moved_a_little_come_besides_nearest_first(tmp_path):
    prompt = random_prompt(np.random.default_rng(2), layers=9, heads=2, n_tokens=90, tiles=[(64, 26), (80, 1)])
    wide = make_problem(measure(write_capture(tmp_path / "c.h5", [prompt]), top_k=9), "both")
    anchors = (0, 2, 6)
    every = {
        entry: sum(abs(mine - theirs) for mine, theirs in zip(entry, anchors, strict=True))
        for entry in ((0, *rest) for rest in itertools.combinations(range(1, 9), 2))
        if len({*entry} ^ {*anchors}) == 2
    }
    near = {entry: far for entry, far in every.items() if far <= 3 and len({*entry} & {*anchors}) == 2}
    found = [entry.anchors for entry in neighbours(wide, anchors, [], "nearest", 2, 99)]
    assert len(found) == len(set(found))
    moved = found[2:]
    assert set(near) - set(found[:2]) <= set(moved)
    steps = [min(abs(new - old) for new in {*entry} - {*anchors} for old in {*anchors} - {*entry}) for entry in moved]
    assert steps == sorted(steps)
    assert max(steps) <= 3
    assert [entry.anchors for entry in neighbours(wide, anchors, [], "nearest", 2, 3)] == found[:5]


def test_layer_0_stays(problem):
    assert without_one(problem, (0,), [], "nearest", 4) == []
    assert neighbours(problem, (0,), [], "nearest", 4, 4) == []
    assert neighbours(problem, (0, 1, 2, 3, 4), [], "nearest", 4, 4) == []


def test_lengths_in_turn_are_never_under_1k_of_what_is_longer():
    def lengths(length, shares=ON_GPU.shares):
        return replace(ON_GPU, length=length, shares=shares).lengths

    assert lengths(16384) == [16384, 4096, 8192]
    assert lengths(2048) == [2048, 1024, 1024]
    assert lengths(700) == [700, 700, 700]
    assert lengths(2048, (1,)) == [2048]


def test_a_prompt_more_is_in_the_mean():
    entry = Candidate((0,), {})
    results = [PromptKL({"decode": kl, "prefill": 2 * kl}, 4, 3, kept) for kl, kept in ((0.1, 3), (0.4, 1), (0.7, 2))]
    for result in results:
        entry.add(result)
    assert entry.kl == {"decode": pytest.approx(0.4), "prefill": pytest.approx(0.8)}
    assert (entry.prompts, entry.asked, entry.given, entry.kept, entry.lost) == (3, 12, 9, 6, 3)
