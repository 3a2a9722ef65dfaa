"""Whole models: what is timed is the model, dense and sparse on the same cache."""

import pytest
import torch

from kascade_cli import attach
from kascade_cli.benchmarking import e2e
from kascade_cli.benchmarking.baselines import BASELINES
from kascade_cli.benchmarking.roles import with_strategy
from kascade_cli.benchmarking.shapes import random_model
from kascade_cli.integrations.transformers.decoding import Runner

CPU = torch.device("cpu")


@pytest.fixture
def model(shape):
    torch.manual_seed(0)
    return random_model(shape, dtype=torch.float32, device=CPU)


def test_dense_side_gives_the_models_own_logits(model):
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        with e2e.dense_attention(model, BASELINES["sdpa"]):
            found = model(input_ids=tokens, use_cache=True)
            step = model(input_ids=tokens[:, :1], past_key_values=found.past_key_values).logits
        again = model(input_ids=torch.cat([tokens, tokens[:, :1]], 1)).logits
    torch.testing.assert_close(found.logits, expected)
    torch.testing.assert_close(step[:, -1], again[:, -1], rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_a_decode_step_writes_the_last_slot_and_sees_the_whole_cache(model, shape, setting):
    slots = e2e.filled_slots(model, 2, 64, setting)
    slots.token.copy_(torch.tensor([[7], [9]]))
    token = slots.token.clone()
    before = [layer.keys.clone() for layer in slots.cache.layers]
    logits = []
    with torch.no_grad(), e2e.dense_attention(model, BASELINES["sdpa"]):
        runner = Runner(model, slots, capture=False, stay=True)
        runner.step()
        logits.append(runner.logits)
    for layer, old in zip(slots.cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :63], old[:, :, :63])
        assert not torch.equal(layer.keys[:, :, 63], old[:, :, 63])
    profile = e2e.profile_for(model, shape, setting)
    with torch.no_grad(), attach(model, profile, ratio=1.0, backend="torch") as attachment:
        slots.token.copy_(token)
        runner = Runner(model, slots, attachment, capture=False, stay=True)
        runner.step()
        logits.append(runner.logits)
        report = attachment.report()
    assert (report["density"], report["keys_visible"]) == (1.0, 2 * 64 * shape.layers)
    # with every key selected, sparse is dense
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_rows_of_both_sides(phase, model, shape, setting):
    rows = e2e.run_e2e(model, shape, phase, [(2, 64)], setting)
    assert [row["name"] for row in rows] == ["dense", "sparse"]
    tokens = 2 if phase == "decode" else 128
    for row in rows:
        assert row["tokens_s"] == pytest.approx(tokens * 1000 / row["ms_p50"], rel=1e-3)
    assert rows[1]["speedup"] == pytest.approx(rows[0]["ms_p50"] / rows[1]["ms_p50"], rel=1e-2)
    assert rows[1]["density"] < 1
    assert ("cache" in rows[0]) == (phase == "decode")
    assert model.config._attn_implementation == "sdpa"


def test_anchors_of_the_profile_are_the_shapes(model, shape, setting):
    assert e2e.profile_for(model, shape, setting).anchors == [0, 2]


@pytest.mark.parametrize("every", [1, 5])
def test_a_cycle_of_refresh_runs_to_the_end_of_the_cache(every, model, shape, setting):
    cycle = with_strategy(setting, "kascade-refresh", every)
    dense, sparse = e2e.run_e2e(model, shape, "decode", [(2, 64)], cycle)
    assert (sparse["strategy"], sparse["refresh"]) == ("kascade-refresh", every)
    assert sparse["tokens_s"] == pytest.approx(2000 / sparse["ms_p50"], rel=1e-3)
    if every == 1:
        assert sparse["between_step_ms"] is None
        return
    steps = sparse["refresh_step_ms"] + 4 * sparse["between_step_ms"]
    assert steps == pytest.approx(5 * sparse["ms_p50"], rel=1e-3)
    # Every step followed the one before, or the report would have raised; the last ones saw the whole cache.
    slots = e2e.filled_slots(model, 2, 64, setting)
    profile = e2e.profile_for(model, shape, setting)
    with attach(model, profile, strategy="kascade-refresh", refresh=every, backend="torch") as attachment:
        e2e.cycle_row(model, slots, setting, attachment)
        counts = attachment.report()["refresh"]
    assert slots.lengths[2].tolist() == [61] * 2  # the refreshes that are timed alone came last
    assert counts["between"] % 4 == 0
    assert counts["refreshes"] > counts["between"] / 4
