"""Roles compute what the method says, and whole-model figures follow from theirs."""

import json

import pytest
import torch
from torch.nn import functional

from kascade_cli.analysis import cost
from kascade_cli.benchmarking import baselines, report
from kascade_cli.benchmarking.baselines import Baseline
from kascade_cli.benchmarking.model import best_dense, own_share, role_work, run_model, whole_model
from kascade_cli.benchmarking.roles import make_inputs, prepare, role_call, with_strategy, workload_of
from kascade_cli.benchmarking.shapes import SHAPES
from kascade_cli.errors import KascadeError
from kascade_cli.kernels import reference


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_layer_0_is_dense_attention(phase, shape, setting):
    inputs = make_inputs(workload_of(shape, phase, 2, 50, setting), setting)
    expected = functional.scaled_dot_product_attention(
        inputs.q, inputs.k, inputs.v, is_causal=phase == "prefill", enable_gqa=True
    )
    torch.testing.assert_close(role_call("layer0", inputs)(), expected)


def test_reuse_reads_the_anchors_keys_through_the_head_map(shape, setting):
    inputs = make_inputs(workload_of(shape, "decode", 2, 200, setting), setting)
    prepare("reuse", inputs)
    scores = reference.decode_score(inputs.q[:, :, 0], inputs.k, *inputs.batch.lengths[1:], scale=inputs.scale)
    chosen = scores.topk(40, -1).indices.flip(1).int()  # the map of two heads swaps them
    count = torch.tensor([40, 40], dtype=torch.int32)
    same = torch.arange(2, dtype=torch.int32)
    expected = reference.decode_sparse(inputs.q[:, :, 0], inputs.k, inputs.v, chosen, count, same, scale=inputs.scale)
    torch.testing.assert_close(role_call("reuse", inputs)()[:, :, 0], expected)


def test_an_anchor_with_a_reused_norm_reads_the_keys_of_layer_0(shape, setting):
    changed = with_strategy(setting, "kascade-reused-norm")
    case = workload_of(shape, "prefill", 1, 200, setting)
    inputs = make_inputs(case, changed)
    with pytest.raises(KascadeError, match="layer 0, which has not run"):
        role_call("anchor", inputs)()
    prepare("anchor", inputs)
    keys, lengths = inputs.state.keys, inputs.batch.lengths
    same = torch.arange(2, dtype=torch.int32)
    lse = reference.prefill_sparse_lse(
        inputs.q, inputs.k, keys[0].indices, keys[0].counts, same, *lengths, scale=inputs.scale, tile=16
    )
    scores = reference.prefill_score(inputs.q, inputs.k, lse, *lengths, scale=inputs.scale, tile=16, tiles=13)
    role_call("anchor", inputs)()
    # 192 keys before the last tile, 39 of them chosen.
    assert set(keys[1].indices[0, 0, -1, :39].tolist()) == set(scores[0, 0, -1, :192].topk(39).indices.tolist())
    # The pass that normalises is the sparse one instead of the dense one.
    saved = role_work("anchor", case).flops - role_work("anchor", case, "kascade-reused-norm").flops
    assert saved == 2 * 4 * 8 * (case.dense_pairs() - case.sparse_pairs())
    # Reuse needs both, and the exact strategy nothing of layer 0.
    prepare("reuse", inputs)
    assert set(keys) == {0, 1}
    exact = make_inputs(case, setting)
    prepare("reuse", exact)
    assert set(exact.state.keys) == {1}


def test_whole_model_reproduces_the_papers_table():
    roles = [{"name": name, "ms_p50": ms} for name, ms in (("layer0", 3.35), ("anchor", 2.71), ("reuse", 0.35))]
    row = whole_model(roles, {"ms_p50": 2.93, "name": "fa3"}, SHAPES["llama-3.1-8b"], {})
    assert row["mean_ms"] == pytest.approx(0.74, abs=0.005)
    assert row["speedup"] == pytest.approx(3.97, abs=0.02)


def test_decode_anchor_reads_keys_once_and_the_chosen_values(shape, setting):
    case = workload_of(shape, "decode", 1, 1000, setting)
    chosen = 200 * 2 * 8 * 4
    assert role_work("anchor", case).bytes == 1000 * 2 * 8 * 4 + chosen + 200 * 2 * 4


def test_rows_feed_select_anchors(shape, setting, tmp_path):
    chosen = baselines.choose("sdpa,own", setting.backend)
    rows = run_model(shape, "decode", [(1, 64), (1, 96)], setting, chosen)
    rows += run_model(shape, "prefill", [(1, 64)], setting, chosen)
    result = report.document(torch.device("cpu"), rows, {"copy_gb_s": 10.0, "matmul_tflop_s": 0.1})
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result))
    table = cost.load(path)
    models = [row for row in rows if row["kind"] == "model"]
    assert [row.context for row in table.rows["decode"]] == [64, 96]
    for phase, context in (("decode", 96), ("prefill", 64)):
        row = next(r for r in models if (r["phase"], r["context"]) == (phase, context))
        # the pass itself (lengths, budgets) is in our total and not in the prediction
        assert table.speedup(phase, context, 4, 2) == pytest.approx(
            4 * row["dense_ms"] / (row["total_ms"] - row["pass_ms"]), rel=1e-3
        )
        dense = [r for r in rows if r["kind"] == "dense" and (r["phase"], r["context"]) == (phase, context)]
        assert row["dense_ms"] == min(r["ms_p50"] for r in dense)


def test_a_baseline_that_fails_is_skipped_with_its_reason(shape, setting):
    def prepare(*_):
        raise RuntimeError("no kernel for this")

    broken = Baseline("broken", "Broken", lambda device, phase: None, prepare)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(baselines.BASELINES, "broken", broken)
        rows = run_model(shape, "decode", [(1, 64)], setting, [broken, *baselines.choose("sdpa", setting.backend)])
    row = next(row for row in rows if row["name"] == "broken")
    assert "no kernel for this" in row["skipped"]
    assert best_dense(rows)["name"] == "sdpa"


def test_one_failing_size_leaves_the_others(shape, setting, monkeypatch):
    from kascade_cli.benchmarking import model

    genuine = model.role_rows

    def failing(case, *rest):
        if case.context == 64:
            raise KascadeError("too large")
        return genuine(case, *rest)

    monkeypatch.setattr(model, "role_rows", failing)
    rows = run_model(shape, "decode", [(1, 64), (1, 32)], setting, baselines.choose("sdpa", setting.backend))
    assert [row["error"] for row in rows if row["kind"] == "failed"] == ["too large"]
    assert [row["context"] for row in rows if row["kind"] == "model"] == [32]


def test_own_share_compares_with_the_best_other():
    rows = [{"kind": "dense", "name": n, "ms_p50": ms} for n, ms in (("cudnn", 1.9), ("fa4", 1.95), ("own", 2.0))]
    assert own_share(rows) == 0.95
    assert own_share(rows[:2]) is None


def test_a_step_between_refreshes_reads_the_kept_keys_and_the_newest(shape, setting):
    cycle = with_strategy(setting, "kascade-refresh", 4)
    inputs = make_inputs(workload_of(shape, "decode", 2, 200, cycle), cycle)
    q, k, v = inputs.q[:, :, 0], inputs.k, inputs.v
    zero, before = torch.zeros(2, dtype=torch.int32), torch.full((2,), 197, dtype=torch.int32)
    chosen = reference.decode_score(q, k, zero, before, scale=inputs.scale).topk(40, -1).indices.flip(1)
    keys = torch.cat([chosen, torch.arange(197, 200).expand(2, 2, 3)], -1).int()
    count, same = torch.tensor([43, 43], dtype=torch.int32), torch.arange(2, dtype=torch.int32)
    expected = reference.decode_sparse(q, k, v, keys, count, same, scale=inputs.scale)
    torch.testing.assert_close(role_call("reuse_between", inputs)()[:, :, 0], expected)
    dense = functional.scaled_dot_product_attention(inputs.q, k, v, enable_gqa=True)
    torch.testing.assert_close(role_call("layer0_between", inputs)(), dense)
    assert role_work("reuse_between", workload_of(shape, "decode", 2, 200, cycle), refresh=4).bytes == pytest.approx(
        role_work("reuse", workload_of(shape, "decode", 2, 200, cycle)).bytes * 43 / 40
    )


def test_refresh_is_the_mean_over_a_cycle(shape, setting):
    cycle = with_strategy(setting, "kascade-refresh", 4)
    chosen = baselines.choose("sdpa", setting.backend)
    rows = run_model(shape, "decode", [(1, 64)], cycle, chosen)
    ms = {row["name"]: row["ms_p50"] for row in rows if row["kind"] == "role"}
    first = ms["layer0"] + ms["anchor"] + 2 * ms["reuse"] + ms["pass"]
    between = ms["layer0_between"] + 3 * ms["reuse_between"] + ms["pass_between"]
    row = rows[-1]
    assert (row["strategy"], row["refresh"]) == ("kascade-refresh", 4)
    assert row["total_ms"] == pytest.approx((first + 3 * between) / 4, rel=1e-3)
    assert row["speedup"] == pytest.approx(4 * row["dense_ms"] / row["total_ms"], rel=1e-2)
    names = {row["name"] for row in run_model(shape, "prefill", [(1, 64)], cycle, chosen)}
    assert not {name for name in names if "between" in name}
    once = with_strategy(setting, "kascade-refresh", 1)
    assert "between_step_ms" not in run_model(shape, "decode", [(1, 64)], once, chosen)[-1]
    with pytest.raises(KascadeError, match="shorter than a cycle of 4"):
        run_model(shape, "decode", [(1, 3)], cycle, chosen)
