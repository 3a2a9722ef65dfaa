"""A model whose heads are split over two processes is captured as one process captures it."""

import os
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from kascade_cli.capture.probe import Probe
from kascade_cli.errors import KascadeError
from kascade_cli.models import attention_modules, describe
from kascade_cli.partition import Partition, partition_of
from tests.capture.conftest import make_model
from tests.capture.tensor_parallel import TILES, TOKENS, measure


def run_processes(models, folder, world=2):
    """{name: the results of `world` processes of tests.capture.tensor_parallel}."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "tests.capture.tensor_parallel", str(folder)]
    processes = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(errors)
    return {name: [dict(np.load(folder / f"{name}.{rank}.npz")) for rank in range(world)] for name in models}


def test_two_processes_capture_what_one_does(tmp_path):
    changes = {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
    models = {"qwen3": make_model("Qwen3", **changes), "granite": make_model("Granite")}
    for model in models.values():
        model.generation_config.eos_token_id = None
    for name, results in run_processes(models, tmp_path).items():
        expected = measure(models[name])
        for found in results:
            assert found.keys() == expected.keys()
            assert found["fingerprint"] == expected["fingerprint"]
            assert (found["generated"] == expected["generated"]).all()
            for key in expected.keys() - {"fingerprint", "generated"}:
                assert found[key].shape == expected[key].shape
                # float16 with 7 bits of mantissa; sums of another order
                np.testing.assert_allclose(
                    found[key].astype(np.float64), expected[key].astype(np.float64), rtol=2**-7, atol=1e-5
                )


def test_heads_that_cannot_be_split_evenly_are_refused_by_every_process(llama, llama_info, monkeypatch):
    monkeypatch.setattr("kascade_cli.capture.probe.partition_of", lambda module: Partition(1, 4, None))
    with (
        pytest.raises(KascadeError, match="2 KV heads cannot be split evenly over 4 processes"),
        Probe(llama, llama_info),
    ):
        pass
    assert llama.config._attn_implementation == "sdpa"


def test_a_model_of_one_process_has_no_partition(llama):
    assert partition_of(attention_modules(llama)[0]) is None


def test_heads_other_than_described_are_refused(llama, monkeypatch):
    """Local heads that nothing tells of are not stored as if they were all."""
    info = replace(describe(llama, "m"), query_heads=8, kv_heads=4)
    with Probe(llama, info) as probe, pytest.raises(KascadeError, match="4 query and 2 KV heads, where m has 8 and 4"):
        probe.run(TOKENS, TILES, lambda *_: None)
