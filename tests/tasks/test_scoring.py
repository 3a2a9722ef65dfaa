import numpy as np
import pytest

from kascade_cli.errors import KascadeError
from kascade_cli.tasks import cluster_interval, exact_match, paired_interval


@pytest.mark.parametrize(
    ("prediction", "answer", "prefix", "right"),
    [
        ("v1 v2", "v1 v2", False, True),
        ("  v1\n v2\t", "v1 v2", False, True),
        ("v1", "v1 v2", False, False),
        ("v1 v2 v3", "v1 v2", False, False),
        ("v1 v2 v3", "v1 v2", True, True),
        ("v2 v1", "v1 v2", True, False),
        ("", "v1 v2", True, False),
        ("V1 v2", "v1 v2", False, False),
    ],
)
def test_exact_match(prediction, answer, prefix, right):
    assert exact_match(prediction, answer, prefix=prefix) is right


def _draw(rng, clusters, size, mean, correlation):
    """0/1 answers [clusters, size] from a beta-binomial: the within-cluster correlation is known."""
    if correlation == 0:
        return rng.random((clusters, size)) < mean
    strength = 1 / correlation - 1
    rates = rng.beta(mean * strength, (1 - mean) * strength, clusters)
    return rng.random((clusters, size)) < rates[:, None]


@pytest.mark.parametrize("mean", [0.5, 0.7, 0.95])
@pytest.mark.parametrize("correlation", [0.0, 0.2])
@pytest.mark.parametrize("clusters", [8, 60])
def test_intervals_cover_the_truth_as_often_as_they_say(mean, correlation, clusters):
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(clusters), 8)
    hits = 0
    for _ in range(400):
        interval = cluster_interval(_draw(rng, clusters, 8, mean, correlation).ravel(), labels)
        hits += interval.low <= mean <= interval.high
    # 400 draws: a true 95 % stays above 92 %; conservative is allowed, optimistic is not.
    assert hits / 400 >= 0.92


def test_correlated_questions_widen_the_interval():
    labels = np.repeat(np.arange(20), 10)
    together = np.repeat(np.arange(20) % 2, 10)
    spread = np.tile([0, 1], 100)
    wide, narrow = cluster_interval(together, labels), cluster_interval(spread, labels)
    assert wide.mean == narrow.mean == 0.5
    assert wide.half_width > 2.5 * narrow.half_width


@pytest.mark.parametrize("value", [0, 1])
def test_an_interval_at_the_edge_has_a_width_and_stays_inside(value):
    interval = cluster_interval([value] * 64, np.repeat(np.arange(8), 8))
    assert 0 <= interval.low <= interval.mean == value <= interval.high <= 1
    assert 0.01 < interval.high - interval.low < 0.12


def test_one_prompt_says_little():
    assert cluster_interval([1] * 50, [0] * 50).low < 0.3


def test_unequal_clusters_weigh_by_their_questions():
    interval = cluster_interval([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert (interval.mean, interval.count, interval.clusters) == (0.75, 4, 2)


def test_paired_differences_cancel_what_prompts_share():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(50), 8)
    dense = _draw(rng, 50, 8, 0.7, 0.3).ravel().astype(float)
    sparse = dense.copy()
    flips = rng.choice(len(dense), 12, replace=False)
    sparse[flips] = 0
    interval = paired_interval(sparse, dense, labels)
    assert interval.mean == pytest.approx((sparse - dense).mean())
    assert interval.low <= interval.mean <= interval.high <= 0
    assert interval.half_width < cluster_interval(dense, labels).half_width
    assert interval == paired_interval(sparse, dense, labels)
    assert paired_interval(dense, dense, labels).high == 0


def test_nothing_to_score_is_refused():
    with pytest.raises(KascadeError, match="no answers to score"):
        cluster_interval([], [])


def test_one_prompt_says_nothing_about_others():
    interval = paired_interval([1, 1, 0, 1], [1, 1, 1, 1], [3] * 4)
    assert (interval.mean, interval.low, interval.high) == (-0.25, -1.0, 1.0)
    assert (interval.count, interval.clusters) == (4, 1)
