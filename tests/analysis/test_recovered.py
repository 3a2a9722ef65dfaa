"""Recovered mass at a budget against plain loops over the rows of the capture, over odd sizes."""

import h5py
import numpy as np
import pytest

from kascade_cli.analysis import recovered
from kascade_cli.analysis.decision import Search, Settings
from kascade_cli.analysis.selection import position_maps
from kascade_cli.analysis.similarity import measure
from kascade_cli.errors import KascadeError, TargetMissed
from kascade_cli.schema import Budget
from tests.toy_captures import random_prompt, write_capture

LAYERS, HEADS = 6, 3
LENGTHS = (131, 77, 198)
TILES = {
    "both": lambda n: [(0, 32), (32, 32), (64, n - 64 if n < 96 else 32), (n - 1, 1), (0, 1), (41, 1)],
    "decode": lambda n: [(n - 1, 1), (5, 1)],
    "prefill": lambda n: [(32, 32)],
}


def capture_of(path, kind="both", order=(0, 1, 2)):
    rng = np.random.default_rng(5)
    made = [
        random_prompt(rng, layers=LAYERS, heads=HEADS, n_tokens=n, tiles=TILES[kind](n), related=0.1) for n in LENGTHS
    ]
    return write_capture(path, [made[index] for index in order], profiled_layers=[1, 2, 4, 5, 7, 9], layers=10), made


def by_definition(prompts, anchors, maps, budget):
    """phase -> [L]: for every layer, tile and head the mass of the keys kept, one key at a time."""
    found = {}
    for phase in ("decode", "prefill"):
        per_prompt = []
        for prompt in prompts:
            per_tile = []
            for t, (start, length) in enumerate(prompt["tiles"].tolist()):
                if (length == 1) != (phase == "decode"):
                    continue
                seen = start + 1 if length == 1 else start
                k = budget.count(seen)
                kept = np.ones(LAYERS)
                for layer in range(1, LAYERS):
                    shares = []
                    for g in range(HEADS):
                        row = prompt["mass"][layer, t, g].astype(np.float64)
                        nearest = max(a for a in anchors if a <= layer)
                        entry = g if layer in anchors or maps == "pooled" else maps[layer][phase][g]
                        a, h = entry if isinstance(entry, tuple) else (nearest, entry)
                        scores = prompt["mass"][a, t, h, :seen]
                        if maps == "pooled":
                            scores = prompt["mass"][nearest, t, :, :seen].astype(np.float64).sum(0)
                            a, h = nearest, None
                        top = sorted(range(seen), key=lambda j: (-scores[j], j))[:k]  # noqa: B023
                        own = range(seen, start + length)  # the tile itself
                        shares.append(sum(row[j] for j in [*top, *own]) / row.sum())
                    kept[layer] = np.mean(shares)
                per_tile.append(kept)
            if per_tile:
                per_prompt.append(np.mean(per_tile, axis=0))
        if per_prompt:
            found[phase] = np.mean(per_prompt, axis=0)
    return found


@pytest.mark.parametrize("kind", list(TILES))
@pytest.mark.parametrize("assignment", ["nearest", "free"])
@pytest.mark.parametrize("budget", [Budget(ratio=0.1, min_keys=1), Budget(ratio=0.3, min_keys=17), Budget()])
def test_against_its_definition(tmp_path, kind, assignment, budget):
    path, prompts = capture_of(tmp_path / "c.h5", kind)
    search = Search(measure(path, top_k=7), Settings(assignment=assignment))
    sets = [(0,), (0, 3), (0, 1, 4), tuple(range(LAYERS))]
    maps = [position_maps(search.problem, anchors, assignment) for anchors in sets]
    links = [recovered.set_links(anchors, entry, LAYERS, HEADS) for anchors, entry in zip(sets, maps, strict=True)]
    for anchors, entry, found in zip(sets, maps, recovered.measure(path, links, budget), strict=True):
        wanted = by_definition(prompts, anchors, entry, budget)
        assert found.keys() == wanted.keys()
        for phase in wanted:
            np.testing.assert_allclose(found[phase], wanted[phase], atol=1e-6)
    assert wanted[phase][1:].max() < 1 or budget == Budget()  # 128 keys are all that there are, nearly


@pytest.mark.parametrize("kind", list(TILES))
@pytest.mark.parametrize("budget", [Budget(ratio=0.1, min_keys=1), Budget(ratio=0.3, min_keys=17), Budget()])
def test_pooled_against_its_definition(tmp_path, kind, budget):
    """All heads keep what the heads of the nearest anchor choose together; beside sets with head maps, in one pass."""
    path, prompts = capture_of(tmp_path / "c.h5", kind)
    search = Search(measure(path, top_k=7))
    sets = [(0,), (0, 3), (0, 1, 4)]
    maps = [position_maps(search.problem, anchors, "nearest") for anchors in sets]
    links = [recovered.pooled_links(anchors, LAYERS, HEADS) for anchors in sets]
    links += [recovered.set_links(anchors, entry, LAYERS, HEADS) for anchors, entry in zip(sets, maps, strict=True)]
    for (anchors, entry), found in zip(
        [(anchors, "pooled") for anchors in sets] + list(zip(sets, maps, strict=True)),
        recovered.measure(path, links, budget),
        strict=True,
    ):
        wanted = by_definition(prompts, anchors, entry, budget)
        assert found.keys() == wanted.keys()
        for phase in wanted:
            np.testing.assert_allclose(found[phase], wanted[phase], atol=1e-6)


def test_blocks_workers_and_order_change_no_bit(tmp_path, monkeypatch):
    path, _ = capture_of(tmp_path / "c.h5")
    other, _ = capture_of(tmp_path / "o.h5", order=(2, 0, 1))
    search = Search(measure(path, top_k=7))
    anchors = (0, 2, 3)
    links = [recovered.set_links(anchors, position_maps(search.problem, anchors, "nearest"), LAYERS, HEADS)]
    calls = []
    budget = Budget(ratio=0.2, min_keys=3)
    (first,) = recovered.measure(path, links, budget, advance=lambda *done: calls.append(done))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    monkeypatch.setattr(recovered, "_BLOCK_BYTES", 1)
    for again in (
        recovered.measure(path, links, budget)[0],
        recovered.measure(other, links, budget)[0],
        recovered.measure(path, links, budget, workers=2)[0],
    ):
        for phase, values in first.items():
            np.testing.assert_array_equal(again[phase], values)


def test_the_search_reads_the_capture_once_for_all_rows(tmp_path, monkeypatch):
    path, prompts = capture_of(tmp_path / "c.h5")
    passes, real = [], recovered.measure
    monkeypatch.setattr(recovered, "measure", lambda *a, **o: passes.append(len(a[1])) or real(*a, **o))
    budget = Budget(ratio=0.25, min_keys=4)
    search = Search(measure(path, top_k=7), Settings(anchors=(1, 4, 9), max_anchors=3), budget=budget)
    found = search.decide()
    assert passes == [5]  # the three rows, the set asked for, and all layers
    for row in [*search.rows, found.choice.row]:
        maps = position_maps(search.problem, row.anchors, "nearest")
        for phase, values in by_definition(prompts, row.anchors, maps, budget).items():
            np.testing.assert_allclose(row.recovered[phase], values, atol=1e-6)
    document = search.record(found)
    values = np.mean(list(found.choice.row.recovered.values()), axis=0)
    assert document["recovered_mass"]["worst"] == pytest.approx(values.min(), abs=1e-6)
    assert document["recovered_mass"]["worst_layer"] == search.problem.layers[int(values.argmin())]
    assert document["recovered_mass"]["prefill"]["mean"] == pytest.approx(
        found.choice.row.recovered["prefill"].mean(), abs=1e-6
    )
    assert document["similarity"]["mean"] == pytest.approx(found.choice.row.similarity_mean, abs=1e-6)
    assert document["budgets"][1]["recovered_mean"] == pytest.approx(search.rows[1].recovered_mean, abs=1e-6)
    again = Search(measure(path, top_k=7), Settings(phase="decode"), budget=budget).decide()
    assert list(again.choice.row.recovered) == ["decode"]


def test_the_rule_that_a_share_is_kept_is_met_at_the_budget(tmp_path):
    """At the budget, not at the 64 keys of the similarity: a larger ratio meets what a smaller one misses."""
    path, _ = capture_of(tmp_path / "c.h5")
    measured = measure(path, top_k=7)
    wide = Search(measured, Settings(min_recovered=0.95, max_anchors=2), budget=Budget(ratio=0.9, min_keys=1))
    assert wide.decide().choice.row.recovered_mean >= 0.95
    narrow = Search(measured, Settings(min_recovered=0.95, max_anchors=2), budget=Budget(ratio=0.1, min_keys=1))
    with pytest.raises(TargetMissed, match="recovers 95.0% of the attention; the most is .* --ratio"):
        narrow.decide()


def test_a_damaged_row_is_refused(tmp_path):
    path, _ = capture_of(tmp_path / "c.h5")
    search = Search(measure(path, top_k=7))
    with h5py.File(path, "r+") as file:
        file["prompts/000001/mass"][3, 0, 0, :20] = 0.25
    links = [recovered.set_links((0,), position_maps(search.problem, (0,), "nearest"), LAYERS, HEADS)]
    with pytest.raises(KascadeError, match="layer 5, tile 0"):
        recovered.measure(path, links, Budget())


def test_the_order_of_many_prompts_changes_no_bit(tmp_path):
    rng = np.random.default_rng(8)
    tiles = [(0, 32), (32, 32), (64, 7), (70, 1), (33, 1), (5, 1)]
    made = [random_prompt(rng, layers=3, heads=2, n_tokens=71, tiles=tiles, related=0.2) for _ in range(11)]
    links = [recovered.set_links((0, 2), {1: {p: [0, 1] for p in ("decode", "prefill")}}, 3, 2)]
    found = []
    for name, order in (("a", range(11)), ("b", rng.permutation(11)), ("c", range(10, -1, -1))):
        path = write_capture(tmp_path / f"{name}.h5", [made[index] for index in order])
        found.append(recovered.measure(path, links, Budget(ratio=0.1, min_keys=1))[0])
    for phase in found[0]:
        for other in found[1:]:
            np.testing.assert_array_equal(other[phase], found[0][phase])
