import numpy as np
import pytest
from batches import KINDS, BatchSource, make_batch, mixed_size
from recipes import RECIPES

from kascade_cli.tasks.vocabulary import WORDS
from tests.tasks.solver import solve

MARKERS = {
    "single-hop": "?",
    "two-hop": "??",
    "silent-two-hop": "<r0>",
    "silent-three-hop": "<r1>",
    "copy": "<c>",
}


@pytest.mark.parametrize("layout", ["hops", "pairs"])
@pytest.mark.parametrize("length", [64, 257, 1000])
def test_every_answer_follows_from_the_haystack(layout, length):
    ids, weights, kinds = make_batch(0, 0, length, 4, layout)
    assert ids.shape == weights.shape == kinds.shape == (4, length + 1)
    seen = set()
    for row, weight, kind in zip(ids, weights, kinds, strict=True):
        words = [WORDS[i] for i in row]
        assert words[0] == "<bos>"
        assert words.count("<bos>") == 1
        text = " ".join(words[1:])
        haystack = " ".join(words[: np.flatnonzero(kind)[0]])
        i = 0
        while i <= length:
            names = [name for name, code in KINDS.items() if code == kind[i]]
            if not names:
                i += 1
                continue
            assert words[i] == MARKERS[names[0]]
            if names[0] == "copy":
                # A copy question ends where the next item begins.
                stop = i + 1
                while stop <= length and kind[stop] == kind[i] and words[stop][0] in "vw":
                    stop += 1
                assert " ".join(words[i:stop]) in haystack
            else:
                answer = solve(text, " ".join(words[i : i + 2])).split() if i < length else []
                stop = min(i + 2 + len(answer), length + 1)
                assert words[i + 2 : stop] == answer[: stop - i - 2]
            assert (weight[i : i + 2] == 0).all()
            assert (weight[i + 2 : stop] == 10).all()
            seen.add(names[0])
            i = stop
        # Outside questions only filler is predicted, and filler follows filler.
        for j in np.flatnonzero((kind == 0) & (weight > 0)):
            assert weight[j] == 1
            assert words[j][0] == words[j - 1][0] == "w"
    wanted = {"single-hop", "copy", "two-hop"} | (
        {"silent-two-hop", "silent-three-hop"} if layout == "hops" else set()
    )
    assert seen == wanted or length < 300


def test_batches_depend_on_seed_and_step_alone():
    sizes = [(step, 64, 2) for step in range(6)]
    plain = [make_batch(3, *size, "hops") for size in sizes]
    with BatchSource(3, "hops", workers=1) as source:
        for i, expected in enumerate(plain):
            # The queue holds batches of a longer stage that never comes: they must not be handed out.
            ahead = [(step, 128, 1) for step in range(i + 1, i + 3)]
            got = source.get([sizes[i], *(ahead if i % 2 else sizes[i + 1 : i + 3])])
            assert all((a == b).all() for a, b in zip(got, expected, strict=True))
    assert (plain[0][0] != plain[1][0]).any()
    assert (make_batch(4, 0, 64, 2, "hops")[0] != plain[0][0]).any()


def test_training_data_is_not_test_data():
    from kascade_cli import tasks

    test = {p.haystack[:60] for p in tasks.make_prompts("hops", length=64, count=50, questions_per_task=1, seed=0)}
    ids, _, _ = make_batch(0, 0, 64, 200, "hops")
    assert not test & {" ".join(WORDS[i] for i in row[1:40])[:60] for row in ids}


@pytest.mark.parametrize("name", RECIPES)
def test_mixed_lengths_come_in_their_shares(name):
    mixed = RECIPES[name].mixed
    drawn = [mixed_size(0, step, mixed) for step in range(2000)]
    for length, sequences, share in mixed:
        assert abs(drawn.count((length, sequences)) / 2000 - share) < 0.04
    assert sum(share for *_, share in mixed) == pytest.approx(1)
