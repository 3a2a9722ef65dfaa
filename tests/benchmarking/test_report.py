"""Result documents: the machine, the table, CSV and picture; and the README's table made from them."""

import csv
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import gpu_parts, gpu_speed, gpu_suite, performance_table
from kascade_cli.benchmarking import baselines, report
from kascade_cli.benchmarking.model import run_model

LIMITS = {"copy_gb_s": 4264.1, "matmul_tflop_s": 795.3}


@pytest.fixture
def result(shape, setting):
    rows = run_model(shape, "decode", [(1, 32)], setting, baselines.choose("sdpa,cudnn", setting.backend))
    return report.document(torch.device("cpu"), rows, LIMITS)


def test_document_names_machine_versions_date_and_commit(result):
    assert result["gpu"] is None
    assert result["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", result["date"])
    assert json.loads(json.dumps(result)) == result


def test_table_says_plainly_that_these_are_cpu_figures(result):
    text = io.StringIO()
    report.render(result, Console(file=text, width=120))
    assert "CPU figures" in text.getvalue()
    assert "not measured: cudnn: needs a CUDA GPU" in text.getvalue()
    assert "1.00x" in text.getvalue()


def test_csv_has_a_line_per_row(result):
    rows = list(csv.DictReader(io.StringIO(report.to_csv(result["rows"]))))
    assert len(rows) == len(result["rows"])
    assert [row["name"] for row in rows] == [row["name"] for row in result["rows"]]
    assert float(rows[0]["ms_p50"]) == result["rows"][0]["ms_p50"]


def test_plot_is_a_png(result, tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def suite_result():
    """What a suite leaves, with the paper's figures for 32k decode."""
    model = {"kind": "model", "name": "model", "phase": "decode", "size": "64 x 32k", "shape": "llama-3.1-8b"}
    model |= {"query_heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "ratio": 0.1, "layers": 32}
    model |= {"anchors": 5, "dense_ms": 2.93, "layer0_ms": 3.35, "anchor_ms": 2.71, "reuse_ms": 0.35}
    model |= {"mean_ms": 0.7387, "speedup": 3.966, "baseline": "cudnn"}
    whole = {"kind": "e2e", "phase": "decode", "size": "8 x 64k", "shape": "llama-3.1-8b"}
    rows = [
        {"kind": "dense", "phase": "decode", "size": "64 x 32k", "name": "cudnn", "ms_p50": 2.93},
        {"kind": "dense", "phase": "decode", "size": "64 x 32k", "name": "own", "ms_p50": 3.0},
        model,
        whole | {"name": "dense", "tokens_s": 395.4, "ms_p50": 20.2, "speedup": 1.0},
        whole | {"name": "sparse", "tokens_s": 1067.0, "ms_p50": 7.5, "speedup": 2.7},
    ]
    versions = {"torch": "2.11.0", "tilelang": "0.1.15"}
    about = {"gpu": "NVIDIA H200", "date": "2026-11-24T09:00:00+00:00", "commit": "abc", "versions": versions}
    return about | {"ceilings": LIMITS, "rows": rows, "parts": {"model": {"status": "ended", "seconds": 60.0}}}


def test_readme_table_from_a_result():
    lines = performance_table.table(suite_result()).splitlines()
    assert "| decode | 64 x 32k | 2.93 (cuDNN) | 3.35 | 2.71 | 0.350 | 0.739 | **3.97x** |" in lines
    assert "| decode | 8 x 64k | 395 tokens/s | 1067 tokens/s | **2.70x** |" in lines
    assert "NVIDIA H200" in lines[0]
    assert "`abc`" in lines[-1]


def test_readme_is_rewritten_between_its_markers_only(tmp_path, monkeypatch):
    readme, source = tmp_path / "README.md", tmp_path / "r.json"
    source.write_text(json.dumps(suite_result()))
    readme.write_text(f"before\n{performance_table.BEGIN}\nold\n{performance_table.END}\nafter\n")
    arguments = ["performance_table.py", str(source), "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    assert performance_table.main() == 1
    monkeypatch.setattr(sys, "argv", arguments)
    assert performance_table.main() == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    assert performance_table.main() == 0


def test_a_readme_without_markers_is_refused():
    with pytest.raises(SystemExit, match="the README needs"):
        performance_table.replace("nothing", "x")


def test_the_newest_gpu_result_counts(tmp_path):
    for name, gpu, date in (("gpu_suite_a", "H200", "2026-01-02"), ("gpu_suite_b", "H100", "2026-01-01")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"gpu": gpu, "date": date}))
    (tmp_path / "gpu_suite_dry.json").write_text(json.dumps({"gpu": None, "date": "2027-01-01"}))
    assert performance_table.newest(tmp_path).name == "gpu_suite_a.json"
    with pytest.raises(SystemExit, match="no GPU result"):
        performance_table.newest(tmp_path / "nowhere")


def test_summary_sets_results_beside_targets():
    summary = gpu_suite.summarise(suite_result())
    assert summary["ok"]
    text = "\n".join(summary["lines"])
    assert "decode 64 x 32k    3.97x (must 4.5, aim 5)" in text
    assert "own decode 64 x 32k: 0.98 of the best dense (must 0.97, aim 1)" in text
    assert "e2e decode 8 x 64k 2.70x (must 2, aim 2.5)" in text


def test_a_failed_check_fails_the_suite():
    result = suite_result()
    result["parts"]["decode"] = {"status": "ended", "seconds": 3.0, "failures": ["decode_sparse B1: error 1"]}
    summary = gpu_suite.summarise(result)
    assert not summary["ok"]
    assert any("decode_sparse B1" in line for line in summary["lines"])


def test_the_speed_part_writes_as_it_goes(tmp_path):
    context = gpu_parts.Context(tmp_path / "model.json", float("inf"), dry=True)
    gpu_speed.part_model(context)
    written = json.loads((tmp_path / "model.json").read_text())
    assert {row["phase"] for row in written["rows"] if row["kind"] == "model"} == {"decode", "prefill"}
    assert not written["failures"]


def test_numerics_parts_judge_the_reference_as_right(tmp_path):
    context = gpu_parts.Context(tmp_path / "prefill.json", float("inf"), dry=True)
    gpu_parts.part_prefill(context)
    assert context.data["failures"] == []
    assert context.data["rows"]


def test_a_part_that_dies_is_reported_and_the_rest_is_joined(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    options = type("Options", (), {"dry_run": True, "minutes": 1.0, "output": None})()
    suite = gpu_suite.Suite(["compile"], options)
    monkeypatch.setattr(gpu_suite, "environment", lambda: {"PATH": "/nonexistent", "PYTHONPATH": str(tmp_path)})
    (tmp_path / "torch.py").write_text("raise ImportError('no torch today')\n")
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    assert suite.run() == 1
    joined = json.loads((tmp_path / "gpu_suite_dry.json").read_text())
    assert joined["parts"]["compile"]["status"] == "failed"
    assert "no torch today" in joined["parts"]["compile"]["error"]
    assert Path(suite.output).exists()
