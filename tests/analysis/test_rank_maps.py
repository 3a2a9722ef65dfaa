"""Head maps within ranks, against a search over every set and every map that is allowed."""

import itertools

import numpy as np
import pytest
import yaml

from kascade_cli.analysis import rank_maps
from kascade_cli.analysis.decision import Search, Settings
from kascade_cli.analysis.similarity import measure
from kascade_cli.errors import UsageError
from kascade_cli.schema import PHASES, Budget, Profile
from tests.toy_captures import random_prompt, write_capture

LAYERS = [1, 2, 4, 5, 8]


def capture_of(path, heads, seed=3):
    rng = np.random.default_rng(seed)
    prompts = [
        random_prompt(
            rng, layers=5, heads=heads, n_tokens=n, tiles=[(32, 32), (64, n - 64), (n - 9, 1), (61, 1)], related=0.2
        )
        for n in (91, 77)
    ]
    return write_capture(path, prompts, profiled_layers=LAYERS, layers=10), prompts


def allowed(head, heads, ranks):
    """The anchor heads that a head may read, by counting: rank r holds heads r * G/N and on."""
    size = heads // ranks
    for rank in range(ranks):
        own = range(rank * size, (rank + 1) * size)
        if head in own:
            return list(own)
    raise AssertionError


def best_of(sim, sources, layer, head, heads, ranks):
    """(similarity, -distance, -anchor head, anchor): the best that the head may read."""
    return max((sim[a, layer, other, head], a, -other) for a in sources for other in allowed(head, heads, ranks))


@pytest.mark.parametrize(("heads", "ranks"), [(2, 2), (4, 2), (4, 4), (6, 2), (6, 3), (3, 1)])
@pytest.mark.parametrize("assignment", ["nearest", "free"])
def test_sets_and_maps_are_the_best_within_ranks(tmp_path, heads, ranks, assignment):
    path, _ = capture_of(tmp_path / "c.h5", heads)
    measured = measure(path, top_k=7)
    settings = Settings(assignment=assignment, tensor_parallel=ranks, max_anchors=5)
    search = Search(measured, settings)
    sims = {phase: measured.mean(phase) for phase in PHASES}

    def value(anchors):
        total = 0.0
        for layer, sim in itertools.product(range(5), sims.values()):
            sources = [a for a in anchors if a <= layer]
            sources = sources if assignment == "free" else sources[-1:]
            best = [best_of(sim, sources, layer, head, heads, ranks)[0] for head in range(heads)]
            total += measured.importance[layer] * np.mean(best) / 2
        return total

    for size in range(1, 6):
        sets = {(0, *rest): value((0, *rest)) for rest in itertools.combinations(range(1, 5), size - 1)}
        row = search.rows[size - 1]
        assert row.objective == pytest.approx(max(sets.values()), abs=1e-9)
        assert sets[row.anchors] == pytest.approx(max(sets.values()), abs=1e-9)
        profile = search.layout(row.anchors)
        for layer, phase in itertools.product(range(5), PHASES):
            if layer in row.anchors:
                continue
            sources = [a for a in row.anchors if a < layer]
            sources = sources if assignment == "free" else sources[-1:]
            for head, (anchor, other) in enumerate(profile.head_map(LAYERS[layer], phase)):
                assert other in allowed(head, heads, ranks)
                found = sims[phase][LAYERS.index(anchor), layer, other, head]
                assert found == pytest.approx(best_of(sims[phase], sources, layer, head, heads, ranks)[0])
        assert profile.stays_within(ranks)


def mass_by_definition(prompts, anchors, profile, budget, heads):
    """The mean over phases, layers, prompts, tiles and heads of the share kept, one key at a time."""
    found = []
    for phase in PHASES:
        for layer, prompt in itertools.product(range(5), prompts):
            tiles = [
                (t, *tile) for t, tile in enumerate(prompt["tiles"].tolist()) if (tile[1] == 1) == (phase == "decode")
            ]
            for (t, start, length), head in itertools.product(tiles, range(heads)):
                if layer == 0:
                    found.append(1.0)
                    continue
                anchor, other = (layer, head) if layer in anchors else profile.head_map(LAYERS[layer], phase)[head]
                anchor = anchor if layer in anchors else LAYERS.index(anchor)
                seen = start + 1 if length == 1 else start
                row, scores = (
                    prompt["mass"][which].astype(np.float64) for which in ((layer, t, head), (anchor, t, other))
                )
                top = sorted(range(seen), key=lambda j: (-scores[j], j))[: budget.count(seen)]  # noqa: B023
                found.append((row[top].sum() + row[seen : start + length].sum()) / row.sum())
    return np.mean(found)


def test_what_it_costs_is_in_the_profile(tmp_path):
    path, prompts = capture_of(tmp_path / "c.h5", 4)
    budget = Budget(ratio=0.1, min_keys=2)
    found = {}
    for ranks in (1, 2, 4):
        search = Search(measure(path, top_k=7), Settings(anchors=(1, 4), tensor_parallel=ranks), budget=budget)
        decision = search.decide()
        search.bootstrap(decision, 3)
        found[ranks] = search.profile(decision, budget)
        wanted = mass_by_definition(prompts, (0, 2), found[ranks], budget, 4)
        assert decision.choice.row.recovered_mean == pytest.approx(wanted, abs=1e-6)
    assert "tensor_parallel" not in found[1].selection
    assert not found[1].stays_within(2)
    for ranks in (2, 4):
        record = found[ranks].selection["tensor_parallel"]
        assert (record["ranks"], record["head_maps"]) == (ranks, "within ranks")
        free = found[1].selection["recovered_mass"]["mean"]
        assert record["recovered_mass_free"] == pytest.approx(free, abs=2e-6)
        assert record["recovered_mass"] == pytest.approx(found[ranks].selection["recovered_mass"]["mean"], abs=2e-6)
        assert record["cost"] == pytest.approx(record["recovered_mass_free"] - record["recovered_mass"], abs=2e-6)
        assert record["cost"] != 0
        assert all("recovered_free_mean" in row for row in found[ranks].selection["budgets"])
        for layer, phases in record["free_head_maps"].items():
            for phase, row in phases.items():
                assert [(found[1].layers[int(layer)].anchor, head) for head in row] == found[1].head_map(
                    int(layer), phase
                )
    assert Profile.loads(found[2].dumps()) == found[2]
    assert found[4].head_map(5, "decode") == [(4, head) for head in range(4)]


@pytest.mark.parametrize("ranks", [3, 5, 8])
def test_ranks_that_do_not_divide_the_heads_are_one_line(tmp_path, ranks):
    path, _ = capture_of(tmp_path / "c.h5", 4)
    with pytest.raises(
        UsageError, match=f"--tensor-parallel {ranks} does not divide the 4 KV heads of .*: take 1, 2 or 4"
    ):
        Search(measure(path, top_k=7), Settings(tensor_parallel=ranks))


def test_the_command_says_what_it_costs(tmp_path, capsys):
    from kascade_cli.app import main

    path, _ = capture_of(tmp_path / "c.h5", 4)

    def run(*options):
        with pytest.raises(SystemExit) as ended:
            main(["select-anchors", str(path), "-o", str(tmp_path / "p.yaml"), "--top-k", "7", "--min-keys", "2",
                  "--bootstrap", "0", "--no-verify", *options])  # fmt: skip
        return ended.value.code or 0, *capsys.readouterr()

    code, out, err = run("--tensor-parallel", "3")
    assert (code, out) == (2, "")
    assert err.startswith("error: --tensor-parallel 3 does not divide the 4 KV heads")
    code, out, _ = run("--tensor-parallel", "2", "--anchors", "2")
    assert code == 0
    record = yaml.safe_load((tmp_path / "p.yaml").read_text())["selection"]["tensor_parallel"]
    line = next(line for line in out.splitlines() if "head maps stay within the heads of each of 2 ranks" in line)
    assert f"{record['recovered_mass']:.1%}, free ones {record['recovered_mass_free']:.1%}" in line
    assert "free maps" in out
    assert rank_maps.same_rank(2, 4).sum() == 8
