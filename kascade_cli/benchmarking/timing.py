"""Time calls on a GPU or a CPU, and measure what the machine can do at best.

On a GPU: CUDA events around every repeat, all queued before one synchronisation, so that the host is out of the
numbers. Short calls are captured in a CUDA graph that runs many of them over rotating input sets; long ones are timed
singly with the L2 cache overwritten before each.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]

_FLUSH_BYTES = 256 * 1024**2
# A graph of rotating calls lasts at least this long, so that its launch does not show.
_GRAPH_MS = 2.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: 20th, 50th and 80th percentile of `repeats` samples.

    method: `graph` (mean of the calls of one CUDA graph is a sample), `events` or `cpu`. note: why a graph failed.
    """

    p20: float
    p50: float
    p80: float
    repeats: int
    method: str
    note: str = ""


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile with linear interpolation."""
    ordered = sorted(samples)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return at(0.2), at(0.5), at(0.8)


def repeats_for(estimate_ms: float, seconds: float, fewest: int, most: int) -> int:
    """How many repeats of a call of `estimate_ms` fit into `seconds`."""
    return max(fewest, min(most, int(seconds * 1000 / max(estimate_ms, 1e-4))))


def time_calls(
    calls: Sequence[Call],
    device: torch.device,
    *,
    graph: bool = False,
    seconds: float = 0.4,
    fewest: int = 5,
    most: int = 200,
) -> Timing:
    """Times one call; `calls` are the same call on different input sets, used in turn.

    graph: capture into a CUDA graph (ignored on a CPU; falls back to events, with a note, if capture fails).
    seconds: time to spend on repeats. Everything is warmed up first, compilation included.
    """
    with torch.no_grad():
        if device.type != "cuda":
            return _time_cpu(calls, seconds, fewest, most)
        for call in calls:
            call()
        torch.cuda.synchronize(device)
        estimate = _events(calls, 1, device, flush=None)[0]
        if not graph:
            return _time_events(calls, device, estimate, seconds, fewest, most)
        try:
            return _time_graph(calls, device, estimate, seconds, fewest, most)
        except Exception as error:
            torch.cuda.synchronize(device)
            line = " ".join(str(error).split())[:160]
            timing = _time_events(calls, device, estimate, seconds, fewest, most)
            return Timing(**{**timing.__dict__, "note": f"no CUDA graph: {type(error).__name__}: {line}"})


def _time_cpu(calls: Sequence[Call], seconds: float, fewest: int, most: int) -> Timing:
    begin = time.perf_counter()
    calls[0]()
    estimate = (time.perf_counter() - begin) * 1000
    samples = []
    for i in range(repeats_for(estimate, seconds, fewest, most)):
        begin = time.perf_counter()
        calls[i % len(calls)]()
        samples.append((time.perf_counter() - begin) * 1000)
    return Timing(*quantiles(samples), len(samples), "cpu")


def _events(calls: Sequence[Call], repeats: int, device: torch.device, flush: torch.Tensor | None) -> list[float]:
    """Milliseconds of each of `repeats` calls in turn, L2 overwritten before each where `flush` is given."""
    pairs = []
    for i in range(repeats):
        if flush is not None:
            flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        calls[i % len(calls)]()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in pairs]


def _time_events(
    calls: Sequence[Call], device: torch.device, estimate: float, seconds: float, fewest: int, most: int
) -> Timing:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    samples = _events(calls, repeats_for(estimate, seconds, fewest, most), device, flush)
    return Timing(*quantiles(samples), len(samples), "events")


def _time_graph(
    calls: Sequence[Call], device: torch.device, estimate: float, seconds: float, fewest: int, most: int
) -> Timing:
    rounds = max(1, min(200, math.ceil(_GRAPH_MS / max(estimate, 1e-3) / len(calls))))

    def run() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    graph = capture(run, device)
    count = rounds * len(calls)
    graph.replay()
    torch.cuda.synchronize(device)
    samples = _events([graph.replay], repeats_for(estimate * count, seconds, fewest, most), device, None)
    return Timing(*quantiles([sample / count for sample in samples]), len(samples), "graph")


def capture(call: Call, device: torch.device) -> "torch.cuda.CUDAGraph":
    """Runs `call` once on a side stream, then captures it in a CUDA graph."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def set_count(touched: float, held: float, device: torch.device, most: int = 16) -> int:
    """How many input sets to rotate so that a set's `touched` bytes have left the L2 cache when its turn comes.

    held: bytes that one set occupies; all sets together take at most 40 % of the free memory.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    free, _ = torch.cuda.mem_get_info(device)
    wanted = math.ceil(16 * cache / max(touched, 1))
    return max(1, min(wanted, most, int(0.4 * free // max(held, 1))))


@functools.cache
def ceilings(device: torch.device) -> dict[str, float]:
    """What this machine does at best: `copy_gb_s` (bytes read plus written) and `matmul_tflop_s`.

    bfloat16 on a GPU (2 GB copied, 8192^3 product on random data), float32 on a CPU (64 MB, 512^3).
    """
    gpu = device.type == "cuda"
    elements, side, dtype = (1 << 30, 8192, torch.bfloat16) if gpu else (1 << 24, 512, torch.float32)
    source = torch.empty(elements, dtype=dtype, device=device).normal_()
    target = torch.empty_like(source)
    seconds = 0.2 if gpu else 0.05
    copy = time_calls([lambda: target.copy_(source)], device, seconds=seconds)
    moved = 2 * source.numel() * source.element_size()
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    product = time_calls([lambda: left @ right], device, seconds=seconds)
    return {"copy_gb_s": moved / copy.p50 / 1e6, "matmul_tflop_s": 2 * side**3 / product.p50 / 1e9}


def free_memory(device: torch.device) -> None:
    """Gives cached blocks back to the GPU, so that the next case starts with all of its memory."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
