"""A model whose heads are split over two processes computes what one process computes, under every strategy."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from .tensor_parallel import SPECS, WORLD, measure


@pytest.fixture(scope="module")
def split(make_tiny_model, tmp_path_factory):
    """[(model, per process what it found)], with one KV head in each process and with two."""
    folder = tmp_path_factory.mktemp("split")
    models = {str(heads): make_tiny_model("llama", heads=4, kv_heads=heads).float() for heads in (2, 4)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    command = [sys.executable, "-m", "tests.integrations.transformers.tensor_parallel", str(folder)]
    processes = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(errors)
    return [
        (model, [dict(np.load(folder / f"{name}.{rank}.npz")) for rank in range(WORLD)])
        for name, model in models.items()
    ]


def test_two_processes_compute_what_one_does(split):
    for model, results in split:
        want = measure(model)
        assert len(want) == 2 * (len(SPECS) + 4)
        for found in results:
            for name, value in want.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-3, err_msg=name)
        dense = want["one dense"]
        for spec in SPECS[1:]:
            assert np.abs(want[f"one {spec}"] - dense).max() > 1e-2, spec  # sparse, or the test says little


def test_heads_that_do_not_fit_are_refused_by_every_process(split):
    for _, results in split:
        for found in results:
            assert "this way of spreading heads over devices is not supported" in str(found["refused"])
            assert "\n" not in str(found["refused"])
