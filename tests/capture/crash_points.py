"""Kills a capture with SIGKILL at every point that matters, resumes it, and compares. Run by test_resume.py.

    python crash_points.py FOLDER [STRIDE]

A fresh process forks for every point, so that each capture is really killed. Points are the calls that change the
disk (and every layer that is stored): the child dies right before the k-th of them. Prints one JSON row: how many
points there were, and how many prompts were finished at each kill.
"""

import json
import os
import signal
import sys
from pathlib import Path

import h5py
import numpy as np

from kascade_cli.capture import durable, store
from kascade_cli.capture.run import CaptureOptions, run_capture
from kascade_cli.capture.store import open_capture
from kascade_cli.devset import DevSet
from kascade_cli.models import describe
from tests.capture.conftest import make_model, random_tokens

PROMPTS = [random_tokens(70 + 9 * index, seed=index) for index in range(2)]
DEVSET = DevSet("random", "0" * 64, PROMPTS, 0, 128)
OPTIONS = CaptureOptions(num_prompts=2, max_length=128, tiles_per_prompt=4, decode_tokens=2)
SITES = [
    (os, "replace"),
    (os, "fsync"),
    (os, "unlink"),
    (os, "rmdir"),
    (durable.DurableFile, "__init__"),
    (durable.DurableFile, "reserve"),
    (durable._Patient, "write"),
    (store.PromptWriter, "write_mass"),
    (store.PromptWriter, "finish"),
]
EVERY = {"write": 5}  # HDF5 writes a file in dozens of pieces


def die_at(point: int) -> None:
    """Patches this process to kill itself right before the `point`-th call of a site."""
    seen = 0

    def event() -> None:
        nonlocal seen
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    def wrap(original, every):
        calls = 0

        def patched(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls % every == 0:
                event()
            return original(*args, **kwargs)

        return patched

    for owner, name in SITES:
        setattr(owner, name, wrap(getattr(owner, name), EVERY.get(name, 1)))


def everything(path: Path) -> dict[str, np.ndarray]:
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
        for name, group in file["prompts"].items():
            found |= {f"{name}@{key}": np.asarray(value) for key, value in group.attrs.items()}
    return found


def capture(path: Path, **flags) -> None:
    model = make_model("Llama", seed=1, num_hidden_layers=2)
    model.generation_config.eos_token_id = None
    run_capture(model, describe(model, "tiny"), DEVSET, path, OPTIONS, **flags)


def killed_at(point: int, path: Path) -> bool:
    child = os.fork()
    if not child:
        die_at(point)
        try:
            capture(path)
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return True
    assert os.WEXITSTATUS(status) == 0, status
    return False


def main() -> None:
    folder, stride = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    capture(folder / "whole.h5")
    whole = everything(folder / "whole.h5")
    path = folder / "killed.h5"
    finished_at_kill = []
    point = 0
    while killed_at(point, path):
        if path.exists():
            with open_capture(path) as opened:  # what is visible is whole
                finished_at_kill.append(len(opened))
                for prompt in opened:
                    for tile in range(len(prompt.tiles)):
                        expected = whole[f"prompts/{prompt.id}/mass"][:, tile]
                        assert np.array_equal(prompt.read_tile(tile), expected), (point, prompt.id)
        else:
            finished_at_kill.append(0)
        capture(path, resume=True)
        resumed = everything(path)
        assert resumed.keys() == whole.keys(), point
        for name, value in whole.items():
            assert np.array_equal(resumed[name], value), (point, name)
        left = sorted(entry.name for entry in folder.iterdir())
        assert left == ["killed.h5", "whole.h5"], (point, left)
        path.unlink()
        point += stride
    print(json.dumps({"points": len(finished_at_kill), "finished_at_kill": finished_at_kill}))


if __name__ == "__main__":
    main()
