"""Where the supported versions of vLLM differ, without one of them."""

import sys
from types import SimpleNamespace

import pytest
import torch

from kascade_cli.integrations.vllm.compat import Layouts, after_warm_up, longest, supported


@pytest.mark.parametrize("version", ["0.26.0", "0.26.0+cu130", "0.27.1rc2", "0.30.0", "0.32.0", "0.32.5.dev1+g0"])
def test_supported(version):
    assert supported(version)


@pytest.mark.parametrize("version", ["0.25.9", "0.33.0", "1.26.0", "0.2", "dev", ""])
def test_not_supported(version):
    assert not supported(version)


def test_both_ways_of_asking_give_one_memory():
    """0.26 reshapes its bytes to what it is told; 0.32 always makes [B, H, N, 2 D] in the order LBHNC."""
    assert Layouts.get_kv_cache_shape(7, 32, 8, 128) == (7, 8, 32, 256)
    assert Layouts.get_required_kv_cache_layout() == "HND"


def test_how_long_rows_are_by_what_the_host_knows():
    upper, exact = torch.tensor([5, 7, 9]), torch.tensor([4, 6, 8])
    new = SimpleNamespace(seq_lens_cpu_upper_bound=upper, num_reqs=2, max_seq_len=9)
    assert longest(new) == [5, 7]
    old = SimpleNamespace(seq_lens_cpu_upper_bound=None, _seq_lens_cpu=exact, num_reqs=2, max_seq_len=9)
    assert longest(old) == [4, 6]
    none = SimpleNamespace(seq_lens_cpu_upper_bound=None, num_reqs=2, max_seq_len=9)
    assert longest(none) == [9, 9]


def test_what_warmed_up_is_forgotten_when_the_worker_says_so(monkeypatch):
    """The worker warms up by steps like any other; the newest reset counts, and the worker is wrapped once."""

    class Worker:
        def compile_or_warm_up_model(self, *seconds):
            done.append("warm")
            return seconds

    done = []
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_worker", SimpleNamespace(Worker=Worker))
    after_warm_up(lambda: done.append("first"))
    after_warm_up(lambda: done.append("second"))
    assert Worker().compile_or_warm_up_model(1.5) == (1.5,)
    assert done == ["warm", "second"]


def test_without_a_gpu_worker_nothing_is_wrapped(monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm.v1.worker.gpu_worker", raising=False)
    after_warm_up(lambda: None)
