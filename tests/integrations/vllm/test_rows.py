"""Steps of mixed rows over vLLM's blocks against each request alone over a contiguous cache."""

import json
import random
import time
from types import SimpleNamespace

import pytest
import torch

from kascade_cli.integrations.vllm.ragged import through_ops
from kascade_cli.integrations.vllm.served import Served
from kascade_cli.integrations.vllm.settings import Settings
from kascade_cli.integrations.vllm.step import Reading, captured_step, read_step
from kascade_cli.kernels import get_backend
from kascade_cli.schema import Budget, ModelCard, Profile
from kascade_cli.sparse import Batch, Layer, Lengths, make_strategy

from .paged import Engine

LAYERS, LENGTHS, TILE = 4, [7, 24, 21, 29, 43], 8
BUDGET = Budget(ratio=0.2, min_keys=3, tile=TILE)
STRATEGIES = ("dense", "kascade", "kascade-pooled", "kascade-reused-norm", "oracle", "streaming-llm", "quest")


def profile():
    card = ModelCard(name="m", layers=LAYERS, query_heads=4, kv_heads=2, head_dim=8)
    maps = {layer: {"decode": [1, 0], "prefill": [0, 0]} for layer in (1, 3)}
    return Profile.build(model=card, anchors=[0, 2], profiled_layers=range(LAYERS), head_maps=maps, budget=BUDGET)


def make_served(strategy, stage=range(LAYERS)):
    heads = SimpleNamespace(
        strategy=make_strategy(strategy, range(LAYERS), profile()),
        partition=None,
        rank=0,
        world=1,
        gathers=(),
        describe=lambda: "",
    )
    info = SimpleNamespace(profiled_layers=list(range(LAYERS)))
    served = Served(Settings(), info, heads, BUDGET, get_backend("torch", "cpu"), None)
    served.settle(list(stage), stage)
    return served


def alone(engine, strategy, row):
    """One row of a step as one batch over a contiguous cache: [layers, count, H, D]. Decode tokens one by one."""
    request, begin, count, busy = row
    made, ops = make_strategy(strategy, range(LAYERS), profile()), get_backend("torch", "cpu")
    outs = []
    for first, size, phase in (
        [(begin, count, "prefill")] if busy else [(begin + i, 1, "decode") for i in range(count)]
    ):
        end = first + size
        numbers = (torch.tensor([value], dtype=torch.int32) for value in (first, 0, end))
        state = made.start(Batch(Lengths(*numbers), phase, size, end, BUDGET, plain=True))
        layers = []
        for layer in range(LAYERS):
            query = engine.q[layer][request][first:end].transpose(0, 1)[None]
            key, value = (x[layer][request][:end].transpose(0, 1)[None] for x in (engine.k, engine.v))
            out = made.run(Layer(layer, query, key, value, engine.dim**-0.5, state, ops))
            layers.append(out[0].transpose(0, 1))
        outs.append((torch.stack(layers), state.totals()))
    return torch.cat([out for out, _ in outs], 1), torch.stack([total for _, total in outs]).sum(0)


def schedule(seed, drafts):
    """Steps that take every request from its first token to its last, in chunks of any size, mixed at random."""
    rng = random.Random(seed)
    done, prompts = [0] * len(LENGTHS), [rng.randrange(length // 2, length) for length in LENGTHS]
    steps = []
    while any(done[i] < LENGTHS[i] for i in range(len(LENGTHS))):
        rows, waiting = [], [request for request, length in enumerate(LENGTHS) if done[request] < length]
        for request in rng.sample(waiting, k=min(len(waiting), 1 + rng.randrange(3))):
            busy = done[request] < prompts[request]
            left = (prompts[request] if busy else LENGTHS[request]) - done[request]
            count = min(left, rng.choice([1, 5, TILE, 13, 19]) if busy else rng.randrange(1, 2 + drafts))
            rows.append((request, done[request], count, busy))
            done[request] += count
        steps.append(rows)
    return steps


CASES = [*((name, 2, True) for name in STRATEGIES), ("kascade", 0, True), ("kascade", 2, False)]


@pytest.mark.parametrize(("strategy", "drafts", "ragged"), [*CASES, ("oracle-per-query", 2, False)])
def test_every_row_as_if_it_were_alone(strategy, drafts, ragged):
    engine, served = Engine(LAYERS, LENGTHS, seed=drafts), make_served(strategy)
    how = Reading(engine.page, TILE, drafts, ragged=ragged)
    assert through_ops(served.strategy) or not ragged
    read = torch.zeros(2, dtype=torch.float64)
    mixed = inside = 0
    for rows in schedule(drafts + 5, drafts):
        common = engine.common(rows)
        step = read_step(common, how)
        served.reporter.step(step.counts)
        got = engine.run(served, step, rows, common.slot_mapping)
        first = 0
        for row in rows:
            want, counted = alone(engine, strategy, row)
            torch.testing.assert_close(got[:, first : first + row[2]], want, rtol=1e-9, atol=1e-9)
            read, first = read + counted, first + row[2]
        mixed += len({busy for *_, busy in rows}) == 2
        inside += sum(busy and begin > TILE and begin % TILE > 0 for _, begin, _, busy in rows)
    assert mixed > 1
    assert inside > 1
    report = served.reporter.report()
    assert (report["keys_read"], report["keys_visible"]) == tuple(read.tolist())
    assert report["steps"]["mixed_steps"] == mixed


def test_phases_are_what_the_engine_says():
    """One token of a prompt is prefill; many of a request whose prompt is done are a preemption's, and prefill too."""
    engine = Engine(LAYERS, LENGTHS)
    rows = [(0, 5, 1, False), (1, 16, 1, True), (2, 20, 3, False), (3, 5, 40, False), (4, 0, 16, True)]
    step = read_step(engine.common(rows), Reading(engine.page, TILE, 2, ragged=False))
    decode, *chunks = step.parts
    assert decode.tokens.tolist() == [0, 2, 3, 4]
    assert decode.lengths.tolist() == [6, 21, 22, 23]
    assert decode.blocks == 2
    assert [(chunk.first, chunk.count, chunk.end) for chunk in chunks] == [(1, 1, 17), (5, 40, 45), (45, 16, 16)]
    assert step.counts == {
        "steps": 1, "decode_rows": 4, "prefill_chunks": 3, "mixed_steps": 1, "chunks_inside_a_tile": 1,
        "speculative_rows": 1,
    }  # fmt: skip
    step = read_step(engine.common(rows), Reading(engine.page, TILE, ragged=False))
    assert step.parts[0].lengths.tolist() == [6]
    assert len(step.parts) == 5


def test_padded_rows_are_nobodys():
    engine = Engine(LAYERS, LENGTHS)
    step = read_step(
        engine.common([(0, 5, 1, False), (1, 0, 0, False), (2, 0, 0, True)]), Reading(engine.page, TILE, ragged=False)
    )
    assert [part.tokens for part in step.parts] == [slice(0, 1)]


@pytest.mark.parametrize("strategy", ["kascade", "streaming-llm"])
def test_a_captured_step_reads_as_much_as_an_eager_one(strategy):
    """With the widths of the longest context, and rows that are padding: the same outputs."""
    engine, served = Engine(LAYERS, LENGTHS), make_served(strategy)
    for request, length in enumerate(LENGTHS):
        rows = [(request, 0, length - 1, True)]
        common = engine.common(rows)
        engine.run(served, read_step(common, Reading(engine.page, TILE, ragged=False)), rows, common.slot_mapping)
    rows = [(request, length - 1, 1, False) for request, length in enumerate(LENGTHS)]
    common = engine.common(rows)
    want = engine.run(served, read_step(common, Reading(engine.page, TILE, ragged=False)), rows, common.slot_mapping)
    common.seq_lens = torch.cat([common.seq_lens, torch.zeros(2, dtype=torch.int32)])
    common.block_table_tensor = torch.cat([common.block_table_tensor, torch.zeros_like(engine.table[:2])])
    common.num_reqs += 2
    served = make_served(strategy)
    padded = [*rows, (0, 0, 1, False), (0, 0, 1, False)]  # any query will do
    common.slot_mapping = torch.cat([common.slot_mapping, torch.tensor([-1, -1])])
    got = engine.run(served, captured_step(common), padded, common.slot_mapping)
    torch.testing.assert_close(got[:, : len(rows)], want, rtol=1e-9, atol=1e-9)
    assert bool((got[:, len(rows) :] == 0).all())


def test_tiles_are_scored_in_blocks_that_begin_anywhere(monkeypatch):
    """As on a GPU at long contexts, where the scores of all tiles would not fit."""
    monkeypatch.setattr("kascade_cli.sparse.layer._score_bytes", lambda device: 1)
    test_every_row_as_if_it_were_alone("kascade", 2, True)


def test_stages_of_a_pipeline():
    """Two processes with two layers each, the second beginning with an anchor, are one with all."""
    engine, whole = Engine(LAYERS, LENGTHS), make_served("kascade")
    first, second = (make_served("kascade", stage) for stage in (range(2), range(2, 4)))
    for rows in schedule(3, 0)[:9]:
        common, how = engine.common(rows), Reading(engine.page, TILE)
        want = engine.run(whole, read_step(common, how), rows, common.slot_mapping)
        for served in (first, second):
            step = read_step(common, how)
            got = engine.run(served, step, rows, common.slot_mapping, served.layers)
            assert torch.equal(got, want[served.layers])
    assert first.reporter.report()["roles"] == {"dense": [0], "reuse": [1]}
    read = [served.reporter.report()["keys_read"] for served in (first, second, whole)]
    assert read[0] + read[1] == read[2]


def test_the_report_as_a_file(tmp_path):
    """Before anything has run and after; once the folder is gone the log says so, and nothing is raised."""
    path = tmp_path / "out" / "report.json"
    path.parent.mkdir()
    engine, served = Engine(LAYERS, LENGTHS), make_served("kascade")
    served.settings = Settings(report=str(path))
    served.reporter.emit()
    assert json.loads(path.read_text())["density"] is None
    rows = [(4, 0, 20, True), (2, 0, 9, True)]
    common = engine.common(rows)
    step = read_step(common, Reading(engine.page, TILE))
    served.reporter.step(step.counts)
    engine.run(served, step, rows, common.slot_mapping)
    served.reporter.emit()
    found = json.loads(path.read_text())
    assert found["keys_visible"] == LAYERS * (sum(range(21)) + sum(range(10)))
    assert found["steps"]["prefill_chunks"] == 2
    path.unlink()
    path.parent.rmdir()
    served.reporter.emit()


def test_reports_by_the_clock_and_after_graphs_are_captured():
    served = make_served("dense")
    served.settings, said = Settings(log=0.0001), []
    served.reporter.emit = lambda: said.append(dict(served.reporter.counts))
    served.reporter.step({"steps": 1})
    served.reporter.captured()
    time.sleep(0.001)
    served.reporter.step({"steps": 1})
    assert said[-1] == {"steps": 1}  # what warmed up is forgotten
    served.reporter.step({"steps": 1})
    assert served.reporter.counts["steps"] == 2


@pytest.mark.parametrize(("graphs", "whole"), [(0, False), (1, False), (2, True), (9, True)])
def test_only_steps_that_may_be_graphs_are_as_wide_as_a_row_may_be(graphs, whole):
    engine = Engine(LAYERS, LENGTHS)
    rows = [(0, 20, 1, False), (1, 9, 1, False)]
    (part,) = read_step(engine.common(rows), Reading(engine.page, TILE, graphs=graphs)).parts
    assert (part.blocks is None) is whole
    mixed = read_step(engine.common([*rows, (2, 0, 5, True)]), Reading(engine.page, TILE, graphs=graphs))
    assert all(getattr(part, "blocks", 1) is not None for part in mixed.parts)
