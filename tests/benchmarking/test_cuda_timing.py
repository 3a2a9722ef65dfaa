"""The CUDA side of timing on a stand-in for torch.cuda: a clock that every call advances by a known amount."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from kascade_cli.benchmarking import timing

CUDA = torch.device("cuda")


class FakeCuda:
    """Calls advance `now` by their cost; a graph remembers the cost of what ran inside it."""

    def __init__(self):
        self.now, self.capturing, self.refuse = 0.0, None, False
        self.flushed = self.replays = 0

    def call(self, cost):
        def run():
            if self.capturing is None:
                self.now += cost
            elif self.refuse:
                raise RuntimeError("operation not permitted when stream is capturing")
            else:
                self.capturing.cost += cost
                self.capturing.calls.append(cost)

        return run

    def install(self, patch):
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.now

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def __init__(self):
                self.cost, self.calls = 0.0, []
                fake.last = self

            def replay(self):
                fake.replays += 1
                fake.now += self.cost

        @contextlib.contextmanager
        def capture(graph):
            fake.capturing = graph
            try:
                yield
            finally:
                fake.capturing = None

        stream = SimpleNamespace(wait_stream=lambda other: None)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(torch.cuda, "Stream", lambda device: stream)
        patch.setattr(torch.cuda, "current_stream", lambda device: stream)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        properties = SimpleNamespace(L2_cache_size=50_000_000)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (80_000_000_000, 80_000_000_000))

        def flush():
            fake.flushed += 1
            fake.now += 5.0

        patch.setattr(timing.torch, "empty", lambda *_, **__: SimpleNamespace(zero_=flush))


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def test_a_graph_holds_whole_rounds_over_the_sets_and_lasts_two_milliseconds(cuda):
    found = timing.time_calls([cuda.call(0.125), cuda.call(0.375)], CUDA, graph=True, seconds=0.1)
    # the estimate is the first set's 0.125 ms: 8 rounds over two sets
    assert cuda.last.calls == [0.125, 0.375] * 8
    assert (found.p20, found.p50, found.p80) == pytest.approx((0.25, 0.25, 0.25))
    assert found.method == "graph"
    assert found.repeats == 50  # 100 ms over an estimated 2 ms
    assert cuda.replays == found.repeats + 1
    assert not found.note


def test_long_calls_are_one_round(cuda):
    timing.time_calls([cuda.call(30.0)], CUDA, graph=True, seconds=0.1, fewest=3)
    assert cuda.last.calls == [30.0]


def test_events_leave_the_flush_out(cuda):
    found = timing.time_calls([cuda.call(1.0), cuda.call(3.0)], CUDA, seconds=0.01, fewest=4)
    assert found.method == "events"
    assert cuda.flushed == found.repeats
    assert (found.p20, found.p80) == pytest.approx((1.0, 3.0))


def test_what_cannot_be_captured_is_timed_by_events_and_says_so(cuda):
    cuda.refuse = True
    found = timing.time_calls([cuda.call(1.0)], CUDA, graph=True, seconds=0.01, fewest=4)
    assert (found.method, found.p50) == ("events", pytest.approx(1.0))
    assert "not permitted when stream is capturing" in found.note


def test_input_sets_outgrow_the_cache_and_leave_memory(cuda):
    assert timing.set_count(8e9, 8e9, CUDA) == 1
    assert timing.set_count(50e6, 500e6, CUDA) == 16
    assert timing.set_count(400e6, 500e6, CUDA) == 2
    assert timing.set_count(50e6, 10e9, CUDA) == 3  # 40 % of 80 GB
