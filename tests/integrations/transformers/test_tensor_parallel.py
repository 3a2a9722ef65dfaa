"""A model whose heads are split over two processes computes what one process computes, under every strategy."""

import numpy as np
import pytest

from tests.processes import run_processes

from .tensor_parallel import SPECS, WORLD, measure


@pytest.fixture(scope="module")
def split(make_tiny_model, tmp_path_factory):
    """[(model, per process what it found)], with one KV head in each process and with two."""
    folder = tmp_path_factory.mktemp("split")
    models = {str(heads): make_tiny_model("llama", heads=4, kv_heads=heads).float() for heads in (2, 4)}
    found = run_processes("tests.integrations.transformers.tensor_parallel", models, folder, WORLD)
    return [(model, found[name]) for name, model in models.items()]


def test_two_processes_compute_what_one_does(split):
    for model, results in split:
        want = measure(model)
        assert len(want) == 2 * (len(SPECS) + 4 * 3)
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
