"""What measured sets decide: against the definition, and at the borders of its tolerances."""

import itertools

import numpy as np
import pytest

from kascade_cli.analysis.candidates import Candidate
from kascade_cli.analysis.verdict import Tolerance, decide


def candidate(anchors, *kl, kept=0, given=0, asked=None, prompts=4):
    kl = dict(zip(("decode", "prefill"), kl, strict=False))
    return Candidate(anchors, {}, kl, prompts, given if asked is None else asked, given, kept)


PLATEAU = [candidate((0,), 9, 9), candidate((0, 1), 0.5, 0.02), candidate((0, 2), 0.03, 0.05),
           candidate((0, 1, 2), 0.02, 0.04), candidate((0, 1, 3), 0.021, 0.025)]  # fmt: skip


def test_without_answers_the_fewest_anchors_on_the_plateau():
    assert decide(PLATEAU).best.anchors == (0, 2)
    assert decide(PLATEAU, tolerance=Tolerance(kl=0.0)).best.anchors == (0, 1, 3)
    assert decide(PLATEAU, 2).best.anchors == (0, 2)
    why = decide(PLATEAU).why
    assert "the fewest anchors with a measured KL within 0.02 nats of the best" in why
    assert "0.0230 with 3 anchors" in why
    assert why.endswith("; KL decided: with 1 anchors it is 9.0000")


def by_definition(measured, kl, lost):
    """The rule in plain loops, over all sets measured on all prompts."""
    most = max(entry.prompts for entry in measured)
    final = [entry for entry in measured if entry.prompts == most]
    fewest = min(entry.given - entry.kept for entry in final)
    keeping = [entry for entry in final if entry.given - entry.kept <= fewest + lost * entry.given]
    best = min(np.mean(list(entry.kl.values())) for entry in keeping)
    if fewest > lost * final[0].given and (fewest > 1 or not lost):  # nobody keeps them: the lowest KL
        kl = 0
    good = [entry for entry in keeping if np.mean(list(entry.kl.values())) <= best + kl]
    return min(good, key=lambda entry: (len(entry.anchors), np.mean(list(entry.kl.values())), entry.anchors)).anchors


@pytest.mark.parametrize("seed", range(40))
def test_the_rule_against_its_definition(seed):
    rng = np.random.default_rng(seed)
    given = int(rng.choice([0, 3, 12, 100, 250]))
    sets = [(0, *rest) for size in range(4) for rest in itertools.combinations(range(1, 6), size)]
    measured = [
        candidate(anchors, *(rng.random(2) * 0.1), kept=int(rng.integers(max(0, given - 4), given + 1)), given=given,
                  prompts=int(rng.choice([2, 5, 5])))
        for anchors in rng.permutation(np.array(sets, dtype=object))[:13]
    ]  # fmt: skip
    for kl, lost in ((0.02, 0.01), (0.0, 0.0), (0.05, 0.1)):
        found = decide(measured, tolerance=Tolerance(kl, lost)).best
        assert found.anchors == by_definition(measured, kl, lost)


@pytest.mark.parametrize(("given", "allowed"), [(12, 0), (99, 0), (100, 1), (250, 2)])
def test_one_percent_of_the_answers_may_be_lost_beyond_the_best(given, allowed):
    small, large = (
        candidate((0,), 0.01, kept=given - allowed, given=given),
        candidate((0, 1), 0, kept=given, given=given),
    )
    assert decide([small, large]).best is small
    small.kept -= 1
    found = decide([small, large])
    assert found.best is large
    assert f"; the answers decided: with 1 anchors {allowed + 1} of {given} are lost" in found.why


def test_one_answer_alone_is_chance():
    """Every set loses one of 57: the fewest anchors win all the same; not where none may be lost, or all lose two."""
    small, large = (candidate(anchors, kl, kept=56, given=57) for anchors, kl in (((0, 1), 0.003), ((0, 1, 2), 0.002)))
    assert decide([small, large]).best is small
    assert decide([small, large], tolerance=Tolerance(lost=0.0)).best is large
    small.kept = large.kept = 55
    assert decide([small, large]).best is large


def test_the_last_words_name_what_excluded_the_next_smaller_size():
    large = candidate((0, 1, 2), 0.01, kept=12, given=12)
    lost = candidate((0, 1), 0.001, kept=11, given=12)
    far = candidate((0, 2), 0.2, kept=12, given=12)
    tiny = candidate((0,), 0.02, kept=0, given=12)
    why = decide([tiny, lost, large]).why
    assert why.startswith(
        "the fewest anchors that keep the answers (12 of 12 kept) and whose measured KL is within 0.02"
    )
    assert why.endswith("; the answers decided: with 2 anchors 1 of 12 are lost")
    assert decide([tiny, lost, far, large]).why.endswith("; KL decided: with 2 anchors it is 0.2000")
    early = candidate((0, 2), 0.4, kept=3, given=3, prompts=1)
    found = decide([tiny, early, large])
    assert found.why.endswith("; KL decided: with 2 anchors it is 0.4000, given up after 1 of 4 prompts")
    lost.kl = {"decode": 0.5}
    assert decide([tiny, lost, large]).why.endswith(
        "; both decided: with 2 anchors KL is 0.5000 and of the answers 1 of 12 are lost"
    )
    assert decide([large]).why.endswith("with 3 anchors)")


def test_only_those_measured_on_all_prompts_are_compared():
    lucky = candidate((0, 1), 0.0, prompts=1)
    assert decide([lucky, candidate((0, 2), 0.1)]).best.anchors == (0, 2)
    assert decide([Candidate((0, 1), {}), candidate((0, 1, 2), 5.0)]).best.anchors == (0, 1, 2)


def test_ties_go_the_same_way():
    tied = [candidate((0, 3), 0.1), candidate((0, 2), 0.1), candidate((0, 1, 2), 0.1)]
    assert decide(tied).best.anchors == decide(tied[::-1]).best.anchors == (0, 2)


def test_a_size_asked_for():
    measured = [candidate((0, 1), 0.01, kept=9, given=12), candidate((0, 2), 0.03, kept=12, given=12),
                candidate((0, 3), 0.02, kept=11, given=12), candidate((0, 1, 2), 0.0, kept=12, given=12)]  # fmt: skip
    found = decide(measured, 2)
    assert found.best.anchors == (0, 2)
    assert found.why == (
        "the lowest measured KL of the candidates that keep the answers (12 of 12 answers, 0.0300 nats)"
    )
    assert "with 2 anchors" in decide([candidate((0, 1), 0.01)], 2).why


def test_when_no_set_keeps_the_answers():
    measured = [candidate((0,), 0.1, kept=2, given=12), candidate((0, 1), 0.09, kept=9, given=12)]
    found = decide(measured)
    assert found.best.anchors == (0, 1)
    assert found.why.startswith(
        "no set keeps the answers; the lowest measured KL (0.0900) of those that lose the fewest (9 of 12 kept)"
    )
    larger = candidate((0, 1, 2), 0.085, kept=9, given=12)
    assert decide([*measured, larger]).best is larger  # within the tolerance of KL, and yet not the fewest
    (line,) = found.notes
    assert "no set of up to 2 anchors keeps the answers: the best loses 3 of 12" in line
    assert "--max-anchors or --ratio" in line
    assert not decide([candidate((0, 1), 0.09, kept=12, given=12)]).notes
    assert not decide([candidate((0, 1), 0.09, kept=99, given=100)]).notes


def test_when_dense_answers_nothing():
    found = decide([candidate((0,), 0.1, asked=12), candidate((0, 1), 0.05, asked=12)])
    assert found.best.anchors == (0, 1)
    assert found.notes[0].startswith("dense answers 0 of 12: the choice is by KL alone")
    assert "measured KL within" in found.why
