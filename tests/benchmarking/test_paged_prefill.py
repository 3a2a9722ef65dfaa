"""The GPU script for paged prefill: refused without a GPU, and its dry run checks and agrees."""

import json

import pytest
import torch

from benchmarks import paged_prefill


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refused_in_one_line_without_a_gpu(capsys):
    assert paged_prefill.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_dry_run_measures_every_op_in_both_layouts(tmp_path):
    assert paged_prefill.main(["--dry-run", "-o", str(tmp_path / "rows.json")]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    timed = {(row["size"], row["page"], row["name"]) for row in found["rows"] if row["kind"] == "op"}
    assert timed == {("2 x last 20 of 32", page, op) for page in (0, 16) for op in paged_prefill.OPS}
    assert [row["same_bits"] for row in found["rows"] if row["kind"] == "agree"] == [
        dict.fromkeys(("dense", "lse", "sparse", "sparse_lse"), True)
    ]
    assert found["commit"]
    assert len(found["checks"]) == 6


def test_layouts_that_differ_fail():
    truth = {"dense": torch.zeros(1, 2, 3, 4)}
    row = paged_prefill.compare("1 x 3", 16, truth, {"dense": torch.full((1, 2, 3, 4), float("nan"))})
    assert not row["ok"]
