"""A model whose heads are split over two processes is captured as one process captures it."""

from dataclasses import replace

import numpy as np
import pytest

from kascade_cli.capture.probe import Probe
from kascade_cli.errors import KascadeError
from kascade_cli.models import attention_modules, describe
from kascade_cli.partition import Partition, partition_of
from tests.capture.conftest import make_model
from tests.capture.tensor_parallel import TILES, TOKENS, measure
from tests.processes import run_processes


def test_two_processes_capture_what_one_does(tmp_path):
    changes = {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
    models = {"qwen3": make_model("Qwen3", **changes), "granite": make_model("Granite")}
    for model in models.values():
        model.generation_config.eos_token_id = None
    for name, results in run_processes("tests.capture.tensor_parallel", models, tmp_path).items():
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
