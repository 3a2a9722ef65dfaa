"""Who is measured on what, without a model: results are given by a table."""

import numpy as np
import pytest

from kascade_cli.analysis.candidates import Candidate
from kascade_cli.evaluation.forced import PromptKL
from kascade_cli.evaluation.racing import final, planned, race, rounds


def table_of(results):
    """(measure, log of (anchors, prompt)): results[anchors] = per prompt (kl, kept of 4)."""
    log = []

    def measure(entries, prompt):
        log.extend((entry.anchors, prompt) for entry in entries)
        return [PromptKL({"decode": (r := results[entry.anchors][prompt])[0]}, 4, 4, r[1]) for entry in entries]

    return measure, log


@pytest.mark.parametrize(
    ("prompts", "parts"),
    [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (4, [1, 1, 2]), (5, [2, 1, 2]), (8, [2, 2, 4]), (17, [5, 4, 8])],
)
def test_rounds_cover_every_prompt_once(prompts, parts):
    found = list(rounds(prompts))
    assert [len(part) for part in found] == parts
    assert [prompt for part in found for prompt in part] == list(range(prompts))


def entrants(*sets):
    return [Candidate(anchors, {}) for anchors in sets]


def test_the_worse_half_of_every_size_is_dropped_and_the_rest_measured_on_all():
    results = {
        (0, 1): [(0.30, 4)] * 4, (0, 2): [(0.20, 4)] * 4, (0, 3): [(0.10, 3)] * 4, (0, 4): [(0.25, 4)] * 4,
        (0, 1, 2): [(0.05, 4)] * 4, (0, 1, 3): [(0.06, 4)] * 4,
    }  # fmt: skip
    measure, log = table_of(results)
    runners = entrants(*results)
    race(runners, 4, measure)
    # Of size 2 the half that keeps all answers, then the lower KL; (0, 3) has the lowest KL and loses answers.
    assert {entry.anchors: entry.prompts for entry in runners} == {
        (0, 1): 1, (0, 2): 4, (0, 3): 1, (0, 4): 2, (0, 1, 2): 4, (0, 1, 3): 1,
    }  # fmt: skip
    best = runners[1]
    assert (best.kl, best.given, best.kept) == ({"decode": pytest.approx(0.2)}, 16, 16)
    assert len(log) == len(set(log)) == sum(entry.prompts for entry in runners)
    assert len(log) <= planned([4, 2], 4)


def test_hopeless_sizes_are_given_up():
    """Far from the best, or losing answers; over one prompt four times as far, over two twice."""
    figures = {(0,): (9.0, 4), (0, 1): (0.02, 1), (0, 1, 2): (0.25, 4), (0, 1, 2, 3): (0.01, 4)}
    measure, _ = table_of({anchors: [figure] * 8 for anchors, figure in figures.items()})
    for prompts, hopeless, wanted in ((4, 0.25, [1, 1, 4, 4]), (4, 0.07, [1, 1, 2, 4]), (8, 0.13, [2, 2, 4, 8])):
        runners = entrants(*figures)
        race(runners, prompts, measure, hopeless=hopeless)
        assert [entry.prompts for entry in runners] == wanted


def test_somebody_is_always_left():
    """The size with the lowest KL loses the answers, the one that keeps them has a high KL."""
    results = {(0,): [(0.0, 0)] * 3, (0, 1): [(5.0, 4)] * 3}
    measure, _ = table_of(results)
    runners = entrants(*results)
    race(runners, 3, measure)
    assert max(entry.prompts for entry in runners) == 3
    results = {(0,): [(float("inf"), 0)] * 3}
    measure, _ = table_of(results)
    runners = entrants(*results)
    race(runners, 3, measure)
    assert (runners[0].prompts, runners[0].score) == (3, float("inf"))


def test_neighbours_must_be_ahead_of_the_incumbent():
    results = {(0, 1): [(0.10, 4)] * 4, (0, 2): [(0.09, 4), (0.3, 4), (0.3, 4), (0.3, 4)], (0, 3): [(0.11, 4)] * 4,
               (0, 4): [(0.05, 3)] * 4, (0, 5): [(0.08, 4)] * 4}  # fmt: skip
    measure, log = table_of(results)
    runners = entrants(*results)
    incumbent = runners[0]
    race([incumbent], 4, measure)
    before = (dict(incumbent.kl), incumbent.prompts)
    race(runners, 4, measure, incumbent=incumbent)
    assert {entry.anchors: entry.prompts for entry in runners[1:]} == {(0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 4}
    assert (incumbent.kl, incumbent.prompts) == before


def test_nothing_more_is_run_when_only_the_incumbent_is_left():
    results = {(0, 1): [(0.10, 4)] * 4, (0, 2): [(0.2, 4)] * 4}
    measure, log = table_of(results)
    runners = entrants(*results)
    race(runners, 4, measure, incumbent=runners[0])
    assert log == [((0, 1), 0), ((0, 2), 0)]


@pytest.mark.parametrize("seed", range(20))
def test_never_more_runs_than_planned(seed):
    rng = np.random.default_rng(seed)
    sizes, prompts = rng.integers(1, 6, size=4).tolist(), int(rng.integers(1, 10))
    sets = [tuple(range(size)) + (10 + index,) for size, count in enumerate(sizes) for index in range(count)]
    results = {anchors: [(float(rng.random() * 0.2), 4) for _ in range(prompts)] for anchors in sets}
    measure, log = table_of(results)
    race(entrants(*sets), prompts, measure)
    assert len(log) <= planned(sizes, prompts)


def test_a_hopeless_set_does_not_go_on_in_the_shade_of_a_good_one():
    results = {(0, 1): [(0.02, 4)] * 4, (0, 2): [(2.0, 4)] * 4, (0, 3): [(3.0, 4)] * 4}
    measure, _ = table_of(results)
    runners = entrants(*results)
    race(runners, 4, measure)
    assert [entry.prompts for entry in runners] == [4, 1, 1]


def test_a_better_half_that_is_behind_the_incumbent_does_not_go_on():
    results = {(0, n): [(0.05 + n / 100, 4)] * 4 for n in range(1, 6)}
    measure, _ = table_of(results)
    runners = entrants(*results)
    race(runners, 4, measure, incumbent=runners[1])
    assert [entry.prompts for entry in runners] == [4, 2, 1, 1, 1]


def test_an_incumbent_that_is_beaten_keeps_what_is_known_of_it():
    results = {(0, n): [(0.5 - n / 100, 4)] * 4 for n in range(1, 6)}
    measure, _ = table_of(results)
    runners = entrants(*results)
    race(runners[:1], 4, measure)
    race(runners, 4, measure, incumbent=runners[0])
    assert [entry.prompts for entry in runners] == [4, 1, 2, 4, 4]
    assert (runners[0].given, runners[0].kept) == (16, 16)


def test_a_set_that_is_worse_than_a_smaller_one_is_of_no_use():
    figures = {(0,): (0.20, 4), (0, 1): (0.10, 3), (0, 2, 3): (0.25, 4), (0, 1, 2, 3): (0.29, 4)}
    measure, _ = table_of({anchors: [figure] * 4 for anchors, figure in figures.items()})
    runners = entrants(*figures)
    race(runners, 4, measure)
    # By .09 over one prompt (.08 and more count), by .05 over two (.04); (0, 1) loses an answer, so it beats nobody.
    assert [entry.prompts for entry in runners] == [4, 4, 2, 1]


def test_one_answer_behind_the_incumbent_is_chance_while_any_are_lost():
    results = {(0, 1): [(0.10, 3)] * 4, (0, 2): [(0.09, 2), (0.09, 4), (0.09, 4), (0.09, 4)],
               (0, 3): [(0.20, 1)] * 4, (0, 4): [(0.08, 3)] * 4, (0, 5): [(0.3, 3)] * 4}  # fmt: skip
    measure, _ = table_of(results)
    runners = entrants(*results)
    race(runners[:1], 4, measure)
    race(runners, 4, measure, incumbent=runners[0])
    assert {entry.anchors: entry.prompts for entry in runners[1:]} == {(0, 2): 1, (0, 3): 1, (0, 4): 4, (0, 5): 2}
    race(runners[:2], 4, measure, incumbent=runners[0])  # with room for it
    assert runners[1].prompts == 1
    race([runners[0], runners[1], runners[2]], 4, measure, incumbent=runners[0])
    assert runners[1].prompts == 4


def test_the_final_takes_the_best_of_those_measured_on_all():
    results = {(0, 1): [(0.10, 3)] * 4, (0, 2): [(0.30, 4)] * 4, (0, 3, 4): [(0.20, 4)] * 4, (0, 5): [(0.0, 4)] * 4}
    measure, _ = table_of(results)
    runners = entrants(*results)
    for entry in runners:
        for prompt in range(1 if entry.anchors == (0, 5) else 4):
            entry.add(measure([entry], prompt)[0])
    assert [entry.anchors for entry in final(runners, 2)] == [(0, 3, 4), (0, 2)]
    assert [entry.anchors for entry in final(runners, 9)] == [(0, 3, 4), (0, 2), (0, 1)]
