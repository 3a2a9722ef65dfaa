"""Captures that are killed, run out of disk or meet damaged weights, and what is left of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kascade_cli.capture.run import CaptureOptions, plan_capture, run_capture
from kascade_cli.capture.store import open_capture, parts_folder
from kascade_cli.devset import DevSet, load_devset
from kascade_cli.errors import KascadeError
from kascade_cli.models import describe, load_model
from tests.capture.conftest import make_model, random_tokens
from tests.capture.crash_points import everything
from tests.capture.test_store import file_size_limit

ROOT = Path(__file__).parents[2]
DEVSET = DevSet("random", "0" * 64, [random_tokens(90 + i, seed=i) for i in range(3)], 0, 128)
OPTIONS = CaptureOptions(num_prompts=3, max_length=128, tiles_per_prompt=4)


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_step_and_resumed(tmp_path):
    script = ROOT / "tests/capture/crash_points.py"
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert run.returncode == 0, run.stderr
    row = json.loads(run.stdout.splitlines()[-1])
    assert row["points"] > 30
    # Kills hit every stage: nothing finished yet, some prompts, and all of them (joining, cleaning up).
    assert set(row["finished_at_kill"]) == {0, 1, 2}


def test_the_command_killed_from_outside_and_resumed(tmp_path):
    path = tmp_path / "killed.h5"
    code = "from kascade_cli.app import main; main()"
    command = [sys.executable, "-c", code, "profile", "demo-small", "--max-length", "512", "--num-prompts", "12"]
    process = subprocess.Popen([*command, "-o", str(path)], env=environment(), stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(parts_folder(path).glob("*.h5"))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with open_capture(path) as capture:
        assert 2 <= len(capture) < 12
    run = subprocess.run([*command, "-o", str(path), "--resume"], env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    model, tokenizer = load_model("demo-small")
    devset = load_devset("pairs", tokenizer, num_prompts=12, max_length=512, seed=0)
    options = CaptureOptions(num_prompts=12, max_length=512)
    run_capture(model, describe(model, "demo-small"), devset, tmp_path / "whole.h5", options)
    first, second = everything(path), everything(tmp_path / "whole.h5")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_full_disk_in_the_middle(tmp_path):
    model = make_model("Llama")
    info, path = describe(model, "tiny"), tmp_path / "c.h5"
    # The third prompt is longer than the others: only its part is too large.
    devset = DevSet("random", "0" * 64, [random_tokens(n, seed=n) for n in (70, 80, 480)], 0, 512)
    options = CaptureOptions(num_prompts=3, max_length=512, tiles_per_prompt=8)
    with (
        file_size_limit(26_000),
        pytest.raises(KascadeError, match="larger than.*; 2 of 3 prompts.*--resume"),
    ):
        run_capture(model, info, devset, path, options)
    with open_capture(path) as capture:
        assert len(capture) == 2
    assert run_capture(model, info, devset, path, options, resume=True).captured == 1
    run_capture(model, info, devset, tmp_path / "whole.h5", options)
    first, second = everything(path), everything(tmp_path / "whole.h5")
    assert all(np.array_equal(first[name], second[name]) for name in second)
    with (
        file_size_limit(1000),
        pytest.raises(KascadeError, match="larger than.*; nothing was captured"),
    ):
        run_capture(model, info, devset, tmp_path / "none.h5", options)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c.h5", "whole.h5"]


def test_no_room_to_join_still_gives_a_capture(tmp_path):
    model = make_model("Llama")
    info, path = describe(model, "tiny"), tmp_path / "c.h5"
    with file_size_limit(60_000):
        result = run_capture(model, info, DEVSET, path, OPTIONS)
    assert (result.done, result.captured, result.joined) == (3, 3, False)
    with open_capture(path) as capture:
        assert capture.complete
        assert all(prompt.read_tile(0).any() for prompt in capture)
    again = run_capture(model, info, DEVSET, path, OPTIONS, resume=True)
    assert (again.done, again.captured, again.joined) == (3, 0, True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.h5"]


def test_damaged_weights_leave_nothing(tmp_path):
    model = make_model("Llama")
    info = describe(model, "tiny")
    model.model.layers[1].self_attn.v_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(KascadeError, match="v_proj.weight holds NaN"):
        run_capture(model, info, DEVSET, tmp_path / "c.h5", OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_after_the_first_prompt_keeps_it(tmp_path):
    model = make_model("Llama")
    info, path = describe(model, "tiny"), tmp_path / "c.h5"

    def spoil(done, total):
        if done >= len(DEVSET.prompts[0]) + 1:
            model.model.norm.weight.data[:] = float("nan")

    with pytest.raises(KascadeError, match="model.norm.weight holds NaN"):
        run_capture(model, info, DEVSET, path, OPTIONS, on_progress=spoil)
    with open_capture(path) as capture:
        assert len(capture) == 1


def test_progress_counts_tokens_and_starts_where_the_capture_stands(tmp_path):
    model = make_model("Llama")
    info, path = describe(model, "tiny"), tmp_path / "c.h5"
    seen = []
    run_capture(model, info, DEVSET, path, OPTIONS, on_progress=lambda done, total: seen.append((done, total)))
    total = sum(map(len, DEVSET.prompts))
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert len(set(seen)) > 2 * len(DEVSET.prompts), "moves within a prompt"
    seen.clear()
    run_capture(model, info, DEVSET, path, OPTIONS, resume=True, on_progress=lambda done, _: seen.append(done))
    assert set(seen) == {total}


def test_the_plan_bounds_the_size(tmp_path):
    model = make_model("Llama")
    info = describe(model, "tiny")
    options = CaptureOptions(num_prompts=3, max_length=128, tiles_per_prompt=None, decode_tokens=3)
    model.generation_config.eos_token_id = None
    plan = plan_capture(info, DEVSET, options)
    run_capture(model, info, DEVSET, tmp_path / "c.h5", options)
    with open_capture(tmp_path / "c.h5") as capture:
        stored = sum(prompt.mass.size * prompt.mass.dtype.itemsize for prompt in capture)
        filled = sum(prompt.mass.shape[0] * prompt.mass.shape[2] * 2 * int(prompt.tiles.sum()) for prompt in capture)
    assert plan.raw_bytes == stored
    assert plan.nonzero_bytes == filled
    assert plan.expected_bytes < stored


def test_a_prompt_longer_than_the_model_is_refused(tmp_path):
    model = make_model("Llama", max_position_embeddings=100)
    info = describe(model, "tiny")
    plan_capture(info, DevSet("d", "0", [random_tokens(100)], 0, 100), OPTIONS)
    with pytest.raises(KascadeError, match="prompt 0 has 101 tokens; tiny takes 100: pass --max-length 100"):
        plan_capture(info, DevSet("d", "0", [random_tokens(101)], 0, 101), OPTIONS)
    options = CaptureOptions(num_prompts=1, max_length=100, decode_tokens=8)
    with pytest.raises(KascadeError, match="100 tokens and 8 to generate; tiny takes 100: pass --max-length 92"):
        plan_capture(info, DevSet("d", "0", [random_tokens(100)], 0, 100), options)
