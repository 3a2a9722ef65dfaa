"""Single ops, and the dense attention they are compared with."""

import pytest
import torch
from torch.nn import functional

from kascade_cli.benchmarking import baselines
from kascade_cli.benchmarking.ops import run_ops
from kascade_cli.benchmarking.roles import make_inputs, workload_of
from kascade_cli.errors import KascadeError, UsageError

OPS = {
    "decode": [
        "decode_dense",
        "decode_dense+scores",
        "decode_score",
        "select_topk",
        "decode_sparse",
        "decode_sparse+logits",
    ],
    "prefill": [
        "prefill_dense",
        "prefill_dense, lse",
        "prefill_score",
        "select_topk",
        "prefill_sparse",
        "prefill_sparse_lse",
    ],
}


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_every_op_has_a_row_with_a_rate(phase, shape, setting):
    rows = run_ops(shape, phase, [(2, 48)], setting, baselines.choose("sdpa", setting.backend))
    ops = [row for row in rows if row["kind"] == "op"]
    assert [row["name"] for row in ops] == OPS[phase]
    for row in ops:
        assert row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert (row["gb_s"] is None) != (row["tflop_s"] is None)


def test_scores_are_made_in_blocks_when_they_are_large(shape, setting, monkeypatch):
    from kascade_cli.benchmarking import ops

    monkeypatch.setattr(ops, "_SCORE_BYTES", 4 * 2 * 64 * 3)  # three tiles of 64 keys, two heads
    rows = run_ops(shape, "prefill", [(1, 64)], setting, [])
    assert "select_topk, last 3 of 4 tiles" in [row["name"] for row in rows]


def test_an_op_that_fails_keeps_the_others(shape, setting, monkeypatch):
    def broken(*_, **__):
        raise KascadeError("not built for this")

    monkeypatch.setattr(setting.backend, "decode_score", broken)
    rows = run_ops(shape, "decode", [(1, 32)], setting, [])
    broken_too = {"decode_score", "select_topk", "decode_sparse", "decode_sparse+logits"}
    assert {row["name"] for row in rows if "error" in row} == broken_too
    assert {row["name"] for row in rows if "ms_p50" in row} == {"decode_dense", "decode_dense+scores"}


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("name", ["sdpa", "own"])
def test_baselines_compute_dense_attention(phase, name, shape, setting):
    inputs = make_inputs(workload_of(shape, phase, 2, 40, setting), setting)
    baseline = baselines.choose(name, setting.backend)[0]
    out = baseline.prepare(inputs.q, inputs.k, inputs.v, inputs.scale)()
    expected = functional.scaled_dot_product_attention(
        inputs.q, inputs.k, inputs.v, is_causal=phase == "prefill", enable_gqa=True
    )
    torch.testing.assert_close(out.reshape(expected.shape), expected)


def test_which_baselines_run_on_a_cpu():
    cpu = torch.device("cpu")
    assert [name for name in baselines.BASELINES if not baselines.why_missing(name, cpu, "decode")] == ["sdpa"]
    assert baselines.why_missing("fa3", cpu, "prefill") == "needs a CUDA GPU"


def test_choice_of_baselines(setting):
    assert [entry.name for entry in baselines.choose("own, cudnn", setting.backend)] == ["own", "cudnn"]
    assert len(baselines.choose("all", setting.backend)) == 7
    with pytest.raises(UsageError, match="baseline 'fast' is not known"):
        baselines.choose("fast", setting.backend)
