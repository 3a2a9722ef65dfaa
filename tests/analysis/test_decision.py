"""The decision as a Python caller makes it; explicit sets against a loop over their definition."""

import itertools

import numpy as np
import pytest

from kascade_cli.analysis import decision
from kascade_cli.analysis.candidates import ON_CPU, Candidate
from kascade_cli.analysis.decision import Search, Settings
from kascade_cli.analysis.rules import choose
from kascade_cli.analysis.similarity import measure
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.schema import Budget, Profile
from tests.toy_captures import random_prompt, write_capture

LAYERS = [1, 3, 4, 8, 9, 11, 12]  # full-attention layers of a model of 14
TILES = {"both": [(32, 32), (64, 32), (97, 1), (60, 1)], "decode": [(97, 1), (60, 1)]}


@pytest.fixture(scope="module", params=["both", "decode"])
def measured(request, tmp_path_factory):
    """Seven layers of a hybrid model, three KV heads; with tiles of both phases, or decode rows alone."""
    rng = np.random.default_rng(3)
    prompts = [
        random_prompt(rng, layers=7, heads=3, n_tokens=101 + n, tiles=TILES[request.param], related=0.2, query_heads=6)
        for n in range(3)
    ]
    path = tmp_path_factory.mktemp("capture") / "capture.h5"
    return measure(write_capture(path, prompts, profiled_layers=LAYERS, layers=14), top_k=11)


def by_definition(measured, anchors, *, phase, weights, assignment):
    """(objective, similarity per layer, head maps) of absolute `anchors`, with plain loops."""
    sims = {name: measured.sim[name].astype(np.float64).mean(axis=0) for name in measured.sim}
    both = ("decode", "prefill")
    used = [name for name in (both if phase == "both" else (phase,)) if name in sims] or list(sims)
    heads, objective = 3, 0.0
    recovered = np.zeros(len(LAYERS))
    maps = {}
    for place, layer in enumerate(LAYERS):
        weight = max(measured.importance[place], 0) if weights == "importance" else 1.0
        open_to = [LAYERS.index(a) for a in anchors if a <= layer]
        open_to = open_to if assignment == "free" else open_to[-1:]
        for name in used:
            kept = [max(sims[name][a, place, g2, g] for a in open_to for g2 in range(heads)) for g in range(heads)]
            objective += weight * np.mean(kept) / len(used)
            recovered[place] += np.mean(kept) / len(used)
        if layer in anchors:
            continue
        for name in both:
            sim = sims.get(name, sims[next(iter(sims))])
            row = []
            for g in range(heads):
                # Ties: the nearest anchor, then the lowest head.
                pairs = [(a, g2) for a in reversed(open_to) for g2 in range(heads)]
                a, g2 = max(pairs, key=lambda pair: sim[pair[0], place, pair[1], g])  # noqa: B023
                row.append((LAYERS[a], g2))
            maps[layer, name] = row
    return objective, recovered, maps


@pytest.mark.parametrize("anchors", [(1,), (1, 12), (1, 3, 4, 9), (1, 4, 8, 11, 12), tuple(LAYERS)])
@pytest.mark.parametrize(("assignment", "weights", "phase"), [
    ("nearest", "importance", "both"), ("nearest", "uniform", "decode"), ("free", "importance", "prefill"),
    ("free", "uniform", "both"),
])  # fmt: skip
def test_an_explicit_set_against_its_definition(measured, anchors, assignment, weights, phase):
    settings = Settings(phase=phase, weights=weights, assignment=assignment, anchors=anchors, max_anchors=2)
    search = Search(measured, settings)
    found = search.decide()
    search.bootstrap(found, 7)
    profile = search.profile(found)
    objective, recovered, maps = by_definition(measured, anchors, phase=phase, weights=weights, assignment=assignment)
    assert profile.anchors == list(anchors)
    assert profile.selection["anchors"] == list(anchors)
    assert profile.selection["objective"] == pytest.approx(objective, abs=1e-6)
    mass = profile.selection["similarity"]
    assert mass["mean"] == pytest.approx(recovered.mean(), abs=1e-6)
    assert mass["worst"] == pytest.approx(recovered.min(), abs=1e-6)
    for (layer, name), row in maps.items():
        assert profile.head_map(layer, name) == row
    assert len(maps) == 2 * (len(LAYERS) - len(anchors))
    assert (profile.selection["rule"], profile.selection["method"]) == ("anchors", "given")
    assert profile.selection["stability"]["resamples"] == 7
    kept = profile.selection["stability"]["head_map_entries_kept"]
    assert (kept is None) == (len(anchors) == len(LAYERS))
    assert Profile.loads(profile.checked_dumps()) == profile


def test_no_other_set_is_better_than_the_best_one(measured):
    """The rows of the search stay those of the dynamic programme, whatever set was asked for."""
    search = Search(measured, Settings(anchors=(1, 8)))
    for row in search.rows:
        sets = itertools.combinations(range(1, 7), row.size - 1)
        best = max(search.row((0, *rest)).objective for rest in sets)
        assert row.objective == pytest.approx(best, abs=1e-9)
    assert search.decide().choice.row.objective <= search.rows[1].objective


def test_candidates_of_an_explicit_set_are_that_set(measured):
    search = Search(measured, Settings(anchors=(1, 4, 9)))
    (only,) = search.candidates(5)
    assert only.anchors == (0, 2, 4)
    for weights, value in only.objectives.items():
        objective, _, _ = by_definition(measured, (1, 4, 9), phase="both", weights=weights, assignment="nearest")
        assert value == pytest.approx(objective, abs=1e-9)
    only.kl, only.prompts = {"decode": 0.5, "prefill": 0.25}, 3
    decided = search.decide([only], {"model": "toy"})
    assert decided.anchors == (0, 2, 4)
    assert decided.choice.why == "these anchors were asked for; their measured KL is 0.3750 nats"
    recorded = search.record(decided)
    assert recorded["method"] == "verify"
    assert recorded["verify"]["candidates"][0]["kl_mean"] == 0.375


def test_a_set_that_measures_infinite_is_recorded_as_null(measured):
    search = Search(measured, Settings(anchors=(1, 4)))
    candidates = search.candidates(1)
    candidates[0].kl = {"decode": float("inf")}
    profile = search.profile(search.decide(candidates, {"model": "toy"}))
    again = Profile.loads(profile.checked_dumps())
    assert again.selection["verify"]["candidates"][0]["kl"] == {"decode": None}


@pytest.mark.parametrize(
    ("anchors", "line"),
    [
        ((3, 4), "the first full-attention layer, 1, is always an anchor"),
        ((0, 1), "layer 0 is not a full-attention layer of the capture; these are: 1 3-4 8-9 11-12"),
        ((1, 5), "layer 5 is not a full-attention layer"),
        ((1, 99), "layer 99 is not a full-attention layer"),
        ((-1, 1), "layer -1 is not a full-attention layer"),
        ((1, 4, 3), "rising order, each once: 1,3,4"),
        ((1, 3, 3), "rising order, each once: 1,3"),
        ((), "the first full-attention layer, 1"),
    ],
)
def test_sets_that_cannot_be(measured, anchors, line):
    with pytest.raises(UsageError, match="--anchors") as error:
        Search(measured, Settings(anchors=anchors))
    assert line in str(error.value)


def test_settings_that_cannot_be():
    with pytest.raises(UsageError, match="two rules"):
        Settings(anchors=(0, 1), min_recovered=0.9)
    for tolerance in (float("nan"), float("inf"), -1):
        with pytest.raises(UsageError, match="--kl-tolerance"):
            Settings(kl_tolerance=tolerance)
    for ratio, keys in ((0, 1), (1.5, 1), (float("nan"), 1), (0.1, 0), (0.1, 2**31)):
        with pytest.raises(UsageError, match="--ratio|--min-keys"):
            decision.capture_budget({"tile": 32}, ratio, keys)
    with pytest.raises(KascadeError, match="the budget is wrong: tile"):
        decision.capture_budget({"tile": 0})


def test_a_profile_in_four_lines(measured, tmp_path):
    """As the documentation says that it is done."""
    search = Search(measured, Settings(anchors=3), budget=Budget(ratio=0.2, min_keys=16))
    found = search.decide()
    search.profile(found).save(tmp_path / "profile.yaml")
    profile = Profile.load(tmp_path / "profile.yaml")
    assert profile.budget == Budget(ratio=0.2, min_keys=16)
    assert profile.anchors == [LAYERS[place] for place in choose(search.rows, anchors=3).row.anchors]
    assert search.profile(found, Budget()).budget == Search(measured).budget == Budget()


def measured_set(anchors, asked, given, kept, score=0.1):
    return Candidate(anchors, {}, {"decode": score}, 4, asked, given, kept)


def test_when_sets_of_another_size_are_tried(measured):
    """An anchor more only where answers are lost of a model that gives some; neither where a rule gives the number."""
    search = Search(measured, Settings(max_anchors=4))
    lossy, sound = measured_set((0, 2), 16, 12, 10), measured_set((0, 2), 16, 12, 12)
    assert {len(entry.anchors) for entry in search.more(lossy, [], ON_CPU)} == {3}
    assert search.more(sound, [], ON_CPU) == []
    assert search.more(measured_set((0, 2), 0, 0, 0), [], ON_CPU) == []
    assert search.more(measured_set((0, 2), 16, 3, 0), [], ON_CPU) == []  # what dense gives, it gives by chance
    assert search.more(measured_set((0, 1, 2, 3), 16, 12, 10), [], ON_CPU) == []  # the limit
    known = [measured_set((0, 2), 16, 12, 12)]
    assert {entry.anchors for entry in search.fewer(measured_set((0, 2, 3), 16, 12, 12), known, ON_CPU)} == {(0, 3)}
    for settings in (Settings(anchors=3), Settings(anchors=(1, 4, 8))):
        fixed = Search(measured, settings)
        assert fixed.more(lossy, [], ON_CPU) == fixed.fewer(lossy, [], ON_CPU) == []
    assert Search(measured, Settings(anchors=(1, 4, 8))).neighbours(lossy, [], ON_CPU) == []
    assert Search(measured, Settings(anchors=3)).neighbours(measured_set((0, 2, 3), 16, 12, 12), [], ON_CPU) != []


def test_the_objective_overruled_is_said(measured):
    search = Search(measured, Settings(max_anchors=2))
    first = search.rows[1].anchors
    other = (0, 1 if first != (0, 1) else 2)
    sets = [measured_set((0,), 4, 4, 0, 0.4), measured_set(first, 4, 4, 3, 0.2), measured_set(other, 4, 4, 4, 0.1)]
    found = search.decide(sets, {"model": "toy"})
    assert found.anchors == other
    absolute = [" ".join(map(str, search.problem.absolute(entry))) for entry in (other, first)]
    (line,) = found.notes
    assert line == (
        f"verification overrules the objective: {absolute[0]} instead of {absolute[1]} (KL 0.2000, answers 3 of 4 on "
        "4 prompts), the best of 2 by importance"
    )
    assert line in search.record(found)["notes"]
    sets[1].kept = 4
    sets[1].kl = {"decode": 0.05}
    assert search.decide(sets, {"model": "toy"}).notes == []
