import itertools

import numpy as np
import pytest

from kascade_cli.analysis import anchors


def random_gains(rng, layers, ties=False):
    similarity = np.triu(rng.random((layers, layers)))
    if ties:
        similarity = np.round(similarity * 3) / 3
    np.fill_diagonal(similarity, 1)
    weights = np.ones(layers) if ties else rng.random(layers) ** 3
    return anchors.layer_gains(similarity, weights)


def brute_force(gains, size):
    """Every set of `size` anchors with layer 0, best first, ties lexicographic; nearest anchor by
    definition.
    """
    layers = len(gains)
    ranked = []
    for rest in itertools.combinations(range(1, layers), size - 1):
        chosen = (0, *rest)
        value = sum(int(gains[max(a for a in chosen if a <= b), b]) for b in range(layers))
        ranked.append((-value, chosen))
    return sorted(ranked)


@pytest.mark.parametrize("ties", [False, True], ids=["plain", "ties"])
def test_dp_equals_brute_force_on_500_random_cases_each(ties):
    rng = np.random.default_rng(int(ties))
    for _ in range(500):
        layers = int(rng.integers(1, 13))
        gains = random_gains(rng, layers, ties)
        limit = layers if layers < 9 else int(rng.integers(1, layers + 1))
        found = anchors.best_sets(gains, limit)
        assert len(found) == limit
        for size in range(max(1, limit - 3), limit + 1):
            value, chosen = brute_force(gains, size)[0]
            assert found[size - 1] == anchors.AnchorSet(chosen, -value)
            assert anchors.nearest_value(gains, chosen) == -value


@pytest.mark.parametrize("count", [1, 2, 5])
def test_k_best_are_the_first_of_all_sets(count):
    rng = np.random.default_rng(count)
    for case in range(40):
        layers = int(rng.integers(2, 10))
        gains = random_gains(rng, layers, ties=case % 2 == 0)
        found = anchors.k_best_sets(gains, layers, count)
        for size in range(1, layers + 1):
            wanted = brute_force(gains, size)[:count]
            assert [(-entry.value, entry.anchors) for entry in found[size - 1]] == wanted


def random_sims(rng, layers, heads, phases):
    sims = {}
    for phase in phases:
        sim = rng.random((layers, layers, heads, heads)) ** 2
        sim[np.tril_indices(layers, -1)] = 0
        index = np.arange(heads)
        for layer in range(layers):
            sim[layer, layer][index, index] = 1
        sims[phase] = sim
    return sims


@pytest.mark.parametrize("phases", [("decode",), ("decode", "prefill")])
def test_free_assignment_is_the_p_median_optimum_and_never_below_the_dp(phases):
    rng = np.random.default_rng(len(phases))
    better = 0
    for _ in range(12):
        layers, heads = int(rng.integers(3, 9)), int(rng.integers(1, 4))
        sims, weights = random_sims(rng, layers, heads, phases), rng.random(layers)
        mean = np.mean([anchors.layer_similarity(sim) for sim in sims.values()], axis=0)
        nearest = anchors.best_sets(anchors.layer_gains(mean, weights), layers)
        gains = anchors.client_gains(sims, weights)
        for size in range(1, layers + 1):
            best = max(
                anchors.free_value(gains, (0, *rest)) for rest in itertools.combinations(range(1, layers), size - 1)
            )
            found = anchors.free_set(gains, layers, size, nearest[size - 1].anchors)
            assert found.proven
            assert found.anchors[0] == 0
            assert len(found.anchors) == size
            assert found.value == best
            assert found.objective >= nearest[size - 1].objective - 1e-9
            better += found.objective > nearest[size - 1].objective + 1e-6
    assert better > 10  # otherwise the comparison with the DP says nothing


def test_free_value_by_hand():
    rng = np.random.default_rng(5)
    sims, weights = random_sims(rng, 5, 3, ("decode", "prefill")), rng.random(5)
    wanted = 0.0
    for sim in sims.values():
        for b in range(5):
            for g in range(3):
                wanted += weights[b] * max(sim[a, b, h, g] for a in (0, 2, 3) if a <= b for h in range(3)) / 6
    assert anchors.free_value(anchors.client_gains(sims, weights), (0, 2, 3)) / anchors.ONE == pytest.approx(wanted)


def test_head_maps_by_hand():
    sim = random_sims(np.random.default_rng(2), 4, 3, ("decode",))["decode"]
    assert anchors.head_map(sim, 1, 3) == [max(range(3), key=lambda h, g=g: sim[1, 3, h, g]) for g in range(3)]
    for g, (anchor, head) in enumerate(anchors.free_head_map(sim, (0, 1, 2), 3)):
        assert sim[anchor, 3, head, g] == max(sim[a, 3, h, g] for a in (0, 1, 2) for h in range(3))
    sim[1, 3] = 0.5
    assert anchors.head_map(sim, 1, 3) == [0, 0, 0]  # ties: the lowest head
    sim[:, 3] = 0.5
    assert anchors.free_head_map(sim, (0, 1, 2), 3) == [(2, 0)] * 3  # ties: the nearest anchor


def test_layer_similarity_by_hand():
    sim = random_sims(np.random.default_rng(3), 4, 2, ("decode",))["decode"]
    wanted = np.mean([max(sim[1, 2, h, g] for h in range(2)) for g in range(2)])
    assert anchors.layer_similarity(sim)[1, 2] == pytest.approx(wanted)
