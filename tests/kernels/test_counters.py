"""Counters of concurrent calls: no two calls that may run at once share one, whatever threads and streams they use."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tilelang")

from kascade_cli.kernels.tilelang import counters as module
from kascade_cli.kernels.tilelang.counters import Ring, counters

CPU = torch.device("cpu")


class Slow(int):
    """A size whose comparison lets another thread run, between reading and writing the ring's position."""

    def __lt__(self, other):
        time.sleep(0.0005)
        return int(self) < other


@pytest.fixture
def cuda(monkeypatch):
    """CUDA's streams, without CUDA: set `stream` (of this thread) and `capturing`."""
    state = threading.local()
    shared = SimpleNamespace(local=state, synchronized=0)

    def current(device):
        def synchronize():
            shared.synchronized += 1

        return SimpleNamespace(cuda_stream=getattr(state, "stream", 0), synchronize=synchronize)

    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: getattr(state, "capturing", False))
    monkeypatch.setattr(module, "_streams", {})
    monkeypatch.setattr(module, "_graphs", {})
    return shared


def stretch(found: torch.Tensor) -> set[int]:
    return {found.data_ptr() + 4 * i for i in range(len(found))}


@pytest.mark.parametrize("streams", [1, 3])
def test_threads_never_share_counters(cuda, streams, monkeypatch):
    monkeypatch.setattr(Ring, "SIZE", Slow(1 << 14))
    taken, errors = [], []
    start = threading.Barrier(4)

    def run(number):
        cuda.local.stream = number % streams
        start.wait()
        try:
            for _ in range(20):
                taken.append(counters(100, CPU))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(taken) == 80
    assert len(set().union(*map(stretch, taken))) == 80 * 128
    assert len(module._streams) == streams
    assert cuda.synchronized == 1


def test_a_stream_that_goes_round_never_reaches_another_streams_counters(cuda, monkeypatch):
    monkeypatch.setattr(Ring, "SIZE", 1024)
    cuda.local.stream = 7
    waiting = stretch(counters(64, CPU))  # its kernel has not run yet
    cuda.local.stream = 8
    for _ in range(40):
        found = counters(64, CPU)
        assert not waiting & stretch(found)
        assert len(found) == 64
    cuda.local.stream = 7
    again = [stretch(counters(64, CPU)) for _ in range(16)]
    assert waiting == again[15]  # a whole round later, on its own stream


def test_graphs_keep_their_counters(cuda, monkeypatch):
    monkeypatch.setattr(Ring, "SIZE", 256)
    cuda.local.capturing = True
    early = counters(10, CPU)  # before any eager call: no ring is made inside a graph
    assert len(early) == 10
    assert not module._graphs
    cuda.local.capturing = False
    eager = counters(64, CPU)
    cuda.local.capturing = True
    captured = [counters(64, CPU) for _ in range(6)]  # the last two find the ring used up
    cuda.local.capturing = False
    eager = [eager, *(counters(64, CPU) for _ in range(12))]
    used = set().union(*map(stretch, captured))
    assert len(used) == 6 * 64
    assert not used & set().union(*map(stretch, eager))


def test_more_counters_than_the_ring_has(cuda, monkeypatch):
    monkeypatch.setattr(Ring, "SIZE", 128)
    for count in (129, 1000):
        found = counters(count, CPU)
        assert len(found) == count
        assert not found.any()
    assert len(counters(128, CPU)) == 128
