"""Runs a test module in several gloo processes, one for each part of a model."""

import os
import socket
import subprocess
import sys

import numpy as np


def run_processes(module, models, folder, world=2, timeout=180):
    """{name: the results of `world` processes of `python -m module folder`}: what each saved as name.rank.npz.

    models: name -> model, saved to folder/name first.
    """
    for name, model in models.items():
        model.save_pretrained(folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(errors)
    return {name: [dict(np.load(folder / f"{name}.{rank}.npz")) for rank in range(world)] for name in models}
