"""The smallest ratio that keeps the answers: against a scan of the whole grid, and end to end on the demo model."""

import numpy as np
import pytest

from kascade_cli.analysis.verdict import Tolerance
from kascade_cli.errors import UsageError
from kascade_cli.evaluation.forced import PromptKL
from kascade_cli.evaluation.ratios import GRID, AtLength, find_ratio, grid, lengths, notes, smallest, table
from kascade_cli.schema import Budget


@pytest.mark.parametrize(
    ("longest", "found"), [(1024, [1024]), (2047, [1024]), (2048, [1024, 2048]), (9000, [1024, 2048, 4096, 8192])]
)
def test_lengths(longest, found):
    assert lengths(longest) == found


def test_shorter_than_1k():
    with pytest.raises(UsageError, match="held-out prompts have 1023: pass --verify-length 1k"):
        lengths(1023)


@pytest.mark.parametrize(("length", "floor"), [(1024, 128), (1024, 1), (2048, 128), (4096, 900), (1024, 4000)])
def test_ratios_that_read_the_same_are_one(length, floor):
    budget = Budget(min_keys=floor)
    found = grid(length, budget)
    counts = [budget.override(ratio=ratio).count(length) for ratio in found]
    assert len(set(counts)) == len(counts)
    assert set(counts) == {budget.override(ratio=ratio).count(length) for ratio in GRID}
    for ratio, count in zip(found, counts, strict=True):  # the largest of its kind
        larger = [other for other in GRID if other > ratio]
        assert all(budget.override(ratio=other).count(length) > count for other in larger)
    assert found[-1] == GRID[-1]


@pytest.mark.parametrize("size", range(1, 10))
def test_bisection_equals_a_scan(size):
    ratios = GRID[:size]
    for border in range(size):
        asked = []

        def enough(ratio, border=border, asked=asked):
            asked.append(ratio)
            return ratio >= GRID[border]

        assert smallest(ratios, enough) == GRID[border]
        assert len(asked) <= size.bit_length()
        assert ratios[-1] not in asked  # it counts as enough


@pytest.mark.parametrize("seed", range(30))
def test_the_smallest_ratio_that_does_as_well_as_the_last(seed):
    """Loss and KL fall with the ratio, as more keys do; the answer is that of a scan by the definition."""
    rng = np.random.default_rng(seed)
    prompts, given = int(rng.integers(1, 6)), int(rng.choice([0, 4, 40]))
    loss = np.sort(rng.integers(0, 3, (prompts, len(GRID))), axis=1)[:, ::-1] if given else np.zeros((prompts, 9), int)
    kl = np.sort(rng.random((prompts, len(GRID))) * rng.choice([0.03, 0.5]), axis=1)[:, ::-1]
    ran = []

    def measure(ratio, prompt):
        ran.append((ratio, prompt))
        place = GRID.index(ratio)
        return PromptKL({"decode": kl[prompt, place]}, given, given, given - int(loss[prompt, place]))

    tolerance = Tolerance(kl=0.02, ratio=0.03)
    found, tried = find_ratio(measure, GRID, prompts, tolerance)
    good = [
        ratio
        for place, ratio in enumerate(GRID)
        if loss[:, place].sum() <= loss[:, -1].sum() + 0.03 * given * prompts
        and all((kl[:n, place].mean() <= kl[:n, -1].mean() + 0.25) for n in range(1, prompts + 1))
        and (given or kl[:, place].mean() <= kl[:, -1].mean() + 0.02)
    ]
    assert found == min(good)
    assert list(tried) == sorted(tried)
    assert {GRID[-1], found} <= set(tried)
    assert tried[found].prompts == tried[GRID[-1]].prompts == prompts
    assert len(ran) == len(set(ran))


def entry(length, ratio, given=12, kept=12, asked=12):
    from kascade_cli.evaluation.kl import MeanKL

    return AtLength(length, ratio, {ratio: MeanKL(), 0.5: MeanKL({"decode": 0.0}, 4, asked, given, kept)})


def test_the_table_never_rises_and_is_one_that_a_profile_takes():
    found = [entry(1024, 0.1), entry(2048, 0.2), entry(4096, 0.05), entry(8192, 0.07)]
    assert table(found) == {1024: 0.2, 2048: 0.2, 4096: 0.07, 8192: 0.07}
    budget = Budget().override(ratios=table(found))
    assert Budget(**budget.model_dump()) == budget
    assert [budget.ratio_at(n) for n in (100, 1024, 4095, 4096, 10**6)] == [0.2, 0.2, 0.2, 0.07, 0.07]


def test_lengths_at_which_nothing_helps_are_named():
    tolerance = Tolerance()
    assert not notes([entry(1024, 0.1)], tolerance)
    assert notes([entry(2048, 0.1, kept=10)], tolerance) == ["at 2048 tokens ratio 0.5 too loses 2 of 12 answers"]
    (line,) = notes([entry(2048, 0.1, given=0, kept=0)], tolerance)
    assert line == "at 2048 tokens dense answers 0 of 12: the ratio is chosen by KL alone"
