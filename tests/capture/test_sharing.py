"""One capture by several processes holds what one process captures; a process that dies loses only what it was at."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kascade_cli.capture import loop
from kascade_cli.capture.run import CaptureOptions, follow_capture, run_capture
from kascade_cli.capture.store import open_capture, parts_folder
from kascade_cli.devset import DevSet
from kascade_cli.errors import KascadeError
from kascade_cli.models import describe
from tests.capture.conftest import make_model, random_tokens
from tests.capture.crash_points import everything
from tests.teams import ROOT, free_port, run_team, start

LENGTHS = (70, 131, 64, 97, 200)
DEVSET = DevSet("random", "0" * 64, [random_tokens(n, seed=n) for n in LENGTHS], 0, 256)
OPTIONS = CaptureOptions(num_prompts=len(LENGTHS), max_length=256, tiles_per_prompt=6, decode_tokens=3)


MAKING = threading.Lock()  # seeds are the process's, and threads stand for processes here


def capture(path, team=None, devset=DEVSET, **options):
    with MAKING:
        model = make_model("Llama")
    info = describe(model, "tiny")
    if team is None or team.leader:
        return run_capture(model, info, devset, path, OPTIONS, team=team, **options)
    return follow_capture(model, info, devset, path, OPTIONS, team=team)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "c.h5"
    capture(path)
    return path


def same(first, second):
    first, second = everything(first), everything(second)
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_several_processes_make_the_file_that_one_makes(whole, tmp_path, monkeypatch, size):
    path, seen, real, made = tmp_path / "c.h5", [], loop._capture_prompt, []
    monkeypatch.setattr(loop, "_capture_prompt", lambda *given: made.append(given[2]) or real(*given))
    found = run_team(
        size, lambda team: capture(path, team, on_progress=lambda *at: seen.append(at)) if team.leader
        else capture(path, team)
    )  # fmt: skip
    assert found[0].done == found[0].captured == len(LENGTHS)
    assert found[0].joined
    assert not parts_folder(path).exists()
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(made) == list(range(len(LENGTHS)))  # nobody does what another one does
    assert 4 in made[:size]  # the longest is among those that begin; which of these comes first is chance
    assert seen == sorted(seen)
    assert seen[-1] == (sum(LENGTHS), sum(LENGTHS))


def test_going_on_with_another_number_of_processes(whole, tmp_path, monkeypatch):
    path, real, left = tmp_path / "c.h5", loop._capture_prompt, [3]

    def limited(*arguments):
        if not left[0]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        left[0] -= 1
        return real(*arguments)

    monkeypatch.setattr(loop, "_capture_prompt", limited)
    found = run_team(2, lambda team: capture(path, team))
    assert isinstance(found[0], KascadeError)
    assert "out of memory at prompt" in str(found[0])
    with open_capture(path) as unfinished:
        kept = len(unfinished)
    assert kept in (2, 3)  # a prompt that another process was at is given up
    assert f"; {kept} of 5 prompts are finished and kept: " in str(found[0])
    assert str(found[0]).endswith("run again with --resume")
    assert found[1].code == 1
    monkeypatch.setattr(loop, "_capture_prompt", real)
    found = run_team(3, lambda team: capture(path, team, resume=True) if team.leader else capture(path, team))
    assert (found[0].done, found[0].captured) == (5, 5 - kept)
    assert path.read_bytes() == whole.read_bytes()
    found = run_team(2, lambda team: capture(path, team, resume=True) if team.leader else capture(path, team))
    assert (found[0].done, found[0].captured, found[1]) == (5, 0, 0)


def test_nothing_is_left_where_nothing_was_finished(tmp_path, monkeypatch):
    path = tmp_path / "c.h5"

    def fails(*_):
        raise KascadeError("no")

    monkeypatch.setattr(loop, "_capture_prompt", fails)
    assert "no" in str(run_team(2, lambda team: capture(path, team))[0])
    assert not path.exists()
    assert not parts_folder(path).exists()


def test_other_prompts_than_the_leaders_are_refused(tmp_path):
    path = tmp_path / "c.h5"
    other = DevSet("random", "1" * 64, DEVSET.prompts, 0, 256)
    found = run_team(2, lambda team: capture(path, team, devset=DEVSET if team.leader else other))
    assert "process 1: it has another dev set than process 0" in str(found[0])


def test_a_folder_that_not_all_see_is_one_line(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    paths = [tmp_path / "c.h5", tmp_path / "elsewhere" / "c.h5"]
    found = run_team(2, lambda team: capture(paths[team.rank], team))
    assert "process 1: " in str(found[0])
    assert "is not seen by every process: name an --output in a folder that all of them share" in str(found[0])


def test_nobody_else_writes_while_one_of_the_processes_is_there(tmp_path):
    """The lock outlives the leader: a second run cannot mix its parts with those of the first's other processes."""
    from kascade_cli.capture.parts import only_writer, writer_beside

    folder = tmp_path / "c.h5.parts"
    with only_writer(folder, "c.h5") as share:
        share()
        beside = writer_beside(folder, "c.h5")
        beside.__enter__()
    with pytest.raises(KascadeError, match="another process is writing"), only_writer(folder, "c.h5"):
        pass
    beside.__exit__(None, None, None)
    with only_writer(folder, "c.h5"), pytest.raises(KascadeError, match="another process"), writer_beside(folder, "c"):
        pass


SMALL = ["profile", "demo-small", "--max-length", "256", "--tiles-per-prompt", "8"]


def in_place(*arguments):
    from kascade_cli.app import main

    with pytest.raises(SystemExit) as ended:
        main([*SMALL, *arguments])
    return ended.value.code


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_loses_only_the_prompt_it_was_at(tmp_path, monkeypatch, killed):
    monkeypatch.chdir(tmp_path)
    processes, parts = start([*SMALL, "-o", "c.h5", "--num-prompts", "6"], 2, tmp_path), Path("c.h5.parts")
    try:
        while all(each.poll() is None for each in processes) and not list(parts.glob("*.h5")):
            time.sleep(0.002)
        processes[killed].send_signal(signal.SIGKILL)
        outputs = [each.communicate(timeout=60) for each in processes]
    finally:
        for each in processes:
            each.kill()
    other = 1 - killed
    assert [processes[killed].returncode, processes[other].returncode] == [-signal.SIGKILL, 1]
    lines = [line for line in outputs[other][1].splitlines() if line.startswith("error: ")]
    kept = len(list(parts.glob("*.h5")))
    assert 1 <= kept < 6
    # Without the `of 6` where the first part was there before the other process had its prompts.
    told = rf"{kept} (of 6 )?prompts are finished and kept: run again with --resume"
    assert len(lines) == 1
    assert re.fullmatch(rf"error: c\.h5: process {killed} ended; {told}", lines[0])
    assert [outputs[rank][0] for rank in (0, 1)] == ["", ""]
    assert in_place("-o", "c.h5", "--num-prompts", "6", "--resume", "--json") == 0
    with open_capture("c.h5") as found:
        assert found.complete


def test_a_model_split_over_processes_is_captured_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("accelerate")
    options = ["--num-prompts", "2", "--dtype", "float32", "--decode-tokens", "2"]
    processes = start([*SMALL, *options, "-o", "c.h5", "--device-map", "tp"], 2, tmp_path)
    try:
        outputs = [each.communicate(timeout=100) for each in processes]
    finally:
        for each in processes:
            each.kill()
    assert [each.returncode for each in processes] == [0, 0], outputs
    assert outputs[0][0].count("c.h5: 2 prompts, ") == 1
    assert outputs[1] == ("", "")
    assert in_place(*options, "-o", "one.h5") == 0
    found, want = everything("c.h5"), everything("one.h5")
    assert found.keys() == want.keys()
    for name in (name for name in want if "@" not in name):  # sums of another order; float16 with 7 bits of mantissa
        np.testing.assert_allclose(found[name].astype(float), want[name].astype(float), rtol=2**-7, atol=1e-5)
    assert not same("c.h5", "one.h5")  # else nothing was split


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SMALL, "--device-map", "tp"), "tp splits a model's heads over processes: start them with torchrun"),
        (("select-anchors", "c.h5", "--device-map", "tp"), "tp is for profile and evaluate"),
    ],
)
def test_a_model_is_split_only_where_it_can_be(tmp_path, monkeypatch, capsys, arguments, message):
    from kascade_cli.app import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    assert f"--device-map {message}" in capsys.readouterr().err


def test_torchrun_with_more_processes_than_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "3", "--master-port", str(free_port())]
    run = subprocess.run(
        [sys.executable, *launch, "-m", "kascade_cli", *SMALL, "-o", "c.h5", "--num-prompts", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("2 prompts for 3 processes: 1 of them have nothing to do") == 1
    assert run.stdout.count("c.h5: 2 prompts, ") == 1
    assert in_place("-o", "one.h5", "--num-prompts", "2") == 0
    assert same("c.h5", "one.h5")


def test_a_process_that_had_not_begun_says_what_is_kept_too(tmp_path):
    from kascade_cli.commands.profile import _interruptible
    from kascade_cli.errors import KascadeError
    from kascade_cli.processes import Ended

    output = tmp_path / "c.h5"
    for kept, wanted in ((0, "process 0 ended"), (2, f"{output}: process 0 ended; 2 prompts are finished and kept: ")):
        for part in range(kept):
            (tmp_path / "c.h5.parts").mkdir(exist_ok=True)
            (tmp_path / "c.h5.parts" / f"{part:06}.h5").touch()
        with pytest.raises(KascadeError) as raised, _interruptible(output, begun=False):
            raise Ended("process 0 ended")
        assert str(raised.value) == wanted + ("run again with --resume" if kept else "")
