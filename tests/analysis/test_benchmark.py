"""The benchmark script runs at a size that takes seconds, and its capture is one that the reader accepts."""

import json
import subprocess
import sys
from pathlib import Path

from kascade_cli.analysis.similarity import measure

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "select_anchors.py"


def test_small_run(tmp_path):
    result, capture = tmp_path / "result.json", tmp_path / "capture.h5"
    size = {"layers": 5, "heads": 2, "tiles": 6, "prompts": 3, "keys": 512}
    arguments = [part for name, value in size.items() for part in (f"--{name}", str(value))]
    subprocess.run(
        [sys.executable, SCRIPT, *arguments, "--keep", capture, "--output", result], check=True, capture_output=True
    )
    row = json.loads(result.read_text())
    assert {name: row[name] for name in size} == size
    assert row["raw_bytes"] == 5 * 2 * 6 * 3 * 512 * 2
    assert 0 < row["seconds"] < 120
    assert 20e6 < row["peak_rss_bytes"] < 2e9  # a Python with NumPy takes 20 MB at least
    measured = measure(capture)
    assert measured.prompts == 3
    assert measured.tiles == {"decode": 9, "prefill": 9}
    sim = measured.mean("decode")
    # The four families of layers that the script makes: layers 0 and 1 share one, 0 and 2 do not.
    assert sim[0, 1].max() > sim[0, 2].max()
