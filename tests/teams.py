"""Runs the processes of a command as threads of this one, each with a team of its own."""

import contextvars
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from kascade_cli.processes import together

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(rank, size, port, **changes):
    """What torchrun sets."""
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in (variables | changes).items()}


def run_team(size, work, timeout=120):
    """What `work(team)` gives in each of `size` processes, or the exception that ended it."""
    port, found = free_port(), [None] * size

    def run(rank):
        try:
            with together(environment(rank, size, port)) as team:
                found[rank] = work(team)
        except BaseException as error:
            found[rank] = error

    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(run, rank), daemon=True) for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive()
    return found


def start(arguments, size, folder, **changes):
    """Processes of `python -m kascade_cli ARGUMENTS` in `folder`, as a launcher starts them."""
    port = free_port()
    own = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "kascade_cli", *arguments],
            env=own | environment(rank, size, port, **changes),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
