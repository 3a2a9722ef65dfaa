"""Percentiles, repeats and CPU timing."""

import time

import numpy as np
import pytest
import torch

from kascade_cli.benchmarking.timing import ceilings, quantiles, repeats_for, set_count, time_calls

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101])
def test_quantiles_are_numpys(size):
    samples = np.random.default_rng(size).random(size).tolist()
    assert quantiles(samples) == pytest.approx(np.percentile(samples, [20, 50, 80]))


def test_repeats_fill_the_time_within_bounds():
    assert repeats_for(10.0, 1.0, 5, 200) == 100
    assert repeats_for(1000.0, 1.0, 5, 200) == 5
    assert repeats_for(0.0, 1.0, 5, 200) == 200


def test_calls_take_turns_and_are_timed():
    seen = []

    def call(name):
        def run():
            seen.append(name)
            time.sleep(0.002)

        return run

    timing = time_calls([call("a"), call("b")], CPU, seconds=0.02, fewest=4, most=6)
    assert timing.method == "cpu"
    assert 4 <= timing.repeats <= 6
    assert seen[1:5] == ["a", "b", "a", "b"]
    assert 2.0 <= timing.p20 <= timing.p50 <= timing.p80 < 50


def test_one_input_set_on_a_cpu():
    assert set_count(1.0, 1e9, CPU) == 1


def test_ceilings_of_this_machine_are_possible():
    found = ceilings(CPU)
    assert 0.1 < found["copy_gb_s"] < 2000
    assert 1e-4 < found["matmul_tflop_s"] < 50
