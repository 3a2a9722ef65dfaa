import json
import os

import pytest

from kascade_cli.analysis import cost
from kascade_cli.errors import KascadeError

K = 1024
# The paper's own last columns: mean latency per layer (ms) and speed-up of 32 layers with 5 anchors.
PAPER = [
    ("decode", 32, 0.74, 3.97), ("decode", 64, 1.43, 4.08),
    ("decode", 128, 2.83, 4.12), ("decode", 256, 5.34, 4.08),
    ("prefill", 32, 6.42, 1.91), ("prefill", 64, 24.63, 2.18),
    ("prefill", 128, 98.55, 2.19), ("prefill", 256, 408.30, 2.12),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "context", "mean", "speedup"), PAPER)
def test_published_table_gives_the_papers_speedups(phase, context, mean, speedup):
    table = cost.published()
    row = table.at(phase, context * K)
    assert (row.layer0 + 4 * row.anchor + 27 * row.reuse) / 32 == pytest.approx(mean, abs=0.011)
    assert table.speedup(phase, context * K, 32, 5) == pytest.approx(speedup, abs=0.02)


def test_more_anchors_are_never_predicted_faster():
    values = [cost.published().speedup("decode", 128 * K, 32, anchors) for anchors in range(1, 33)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(("asked", "used"), [(1024, 32), (45_000, 32), (48_000, 64), (10**7, 256)])
def test_nearest_context_on_a_log_scale(asked, used):
    assert cost.published().at("decode", asked).context == used * K


def write(path, document):
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


ROW = {"phase": "decode", "context": 4096, "dense_ms": 10, "layer0_ms": 11, "anchor_ms": 9, "reuse_ms": 1}


def test_bench_result(tmp_path):
    rows = [ROW | {"reuse_ms": 5}, ROW, {"step": "prefill", "op": "no costs here"}]
    table = cost.load(write(tmp_path / "bench.json", {"gpu": "NVIDIA H100", "rows": rows}))
    assert table.speedup("decode", 4096, 4, 2) == pytest.approx(40 / (11 + 9 + 1 + 1))  # the later row counts
    assert table.speedup("prefill", 4096, 4, 2) is None
    assert "H100" in table.source
    assert cost.load(write(tmp_path / "list.json", [ROW])).at("decode", 1).reuse == 1


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "not readable as JSON"),
        ({"rows": []}, "no cost row"),
        ({"rows": [3]}, "no cost row"),
        ("7", "no cost row"),
        ([ROW, ROW | {"anchor_ms": 0}], r"rows\.1"),
        ([ROW | {"dense_ms": "fast"}], r"rows\.0"),
        ([ROW | {"context": None}], r"rows\.0"),
        ([ROW | {"context": True}], r"rows\.0"),
        ([ROW | {"context": 0.5}], r"rows\.0"),
        ([ROW | {"context": 10**400}], r"rows\.0"),
        ([ROW | {"dense_ms": float("nan")}], r"rows\.0"),
        ([ROW | {"dense_ms": float("inf")}], r"rows\.0"),
        ([ROW | {"phase": ["decode"]}], "no cost row"),
        ('{"rows": [{"context": ' + "9" * 5000 + "}]}", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"a":' * 100_000, "not readable as JSON"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, document, message):
    with pytest.raises(KascadeError, match=message):
        cost.load(write(tmp_path / "bench.json", document))


def test_rows_of_approximations_are_no_costs(tmp_path):
    row = {"phase": "decode", "context": 1024, "dense_ms": 4, "layer0_ms": 5, "anchor_ms": 3, "reuse_ms": 1}
    rows = [row | {"strategy": "kascade"}, row | {"strategy": "kascade-refresh", "anchor_ms": 2}]
    table = cost.load(write(tmp_path / "suite.json", {"rows": rows}))
    assert table.at("decode", 1024).anchor == 3
    with pytest.raises(KascadeError, match="no cost row"):
        cost.load(write(tmp_path / "only.json", {"rows": rows[1:]}))


def test_names_in_a_table_are_plain_text(tmp_path):
    table = cost.load(write(tmp_path / "b\x1b[1m[x].json", {"gpu": "[/x]\x1b[31m\nH100" + "y" * 500, "rows": [ROW]}))
    assert table.source.startswith("b[x].json ([/x] H100yyy")
    assert len(table.source) < 150


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", "/dev/zero", tmp_path):
        with pytest.raises(KascadeError, match="cannot read cost table"):
            cost.load(path)
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(KascadeError, match="has more than 67108864 bytes"):
        cost.load(large)


def test_missing_file():
    with pytest.raises(KascadeError, match="cannot read cost table"):
        cost.load("/nonexistent/bench.json")
