"""Zeroed int32 counters that kernels leave at zero: a kernel's CTAs count arrivals and the last one resets.

No memset is launched. Any number of threads and streams may ask. A stretch is handed out again only to a later call
of the same stream, which runs after the one that had it; calls captured in a CUDA graph keep theirs for good (a graph
may be replayed beside anything). All other memory that the ops need is allocated for each call, and PyTorch's
allocator keeps streams apart.
"""

import threading

import torch
from torch import Tensor


class Ring:
    """Counters of one stream, or of all graphs. Not locked: `counters` does that."""

    SIZE = 1 << 18
    STEP = 64  # 256 bytes

    def __init__(self, device: torch.device):
        self.values = torch.zeros(self.SIZE, dtype=torch.int32, device=device)
        self.next = 0

    def take(self, count: int, wraps: bool) -> Tensor | None:
        """`count` counters or a few more, on a 256-byte boundary; None if there are none (left)."""
        count = -(-count // self.STEP) * self.STEP
        begin = self.next
        if begin + count > self.SIZE:
            if not wraps or count > self.SIZE:
                return None
            begin = 0
        self.next = begin + count
        return self.values[begin : begin + count]


_lock = threading.Lock()
_streams: dict[tuple[torch.device, int], Ring] = {}
_graphs: dict[torch.device, Ring] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """`count` zeroed int32 counters or a few more on `device`, for one call of a kernel that resets them."""
    stream = torch.cuda.current_stream(device)
    with _lock:
        if torch.cuda.is_current_stream_capturing():
            ring = _graphs.get(device)  # one made here would belong to the graph
            found = ring and ring.take(count, wraps=False)
        else:
            if device not in _graphs:
                _graphs[device] = Ring(device)
                stream.synchronize()  # once: graphs run on other streams
            key = (device, stream.cuda_stream)
            if key not in _streams:
                _streams[key] = Ring(device)
            found = _streams[key].take(count, wraps=True)
    return torch.zeros(count, dtype=torch.int32, device=device) if found is None else found
