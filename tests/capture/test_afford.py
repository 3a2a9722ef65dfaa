"""The length of prompts that nobody gave one for."""

import pytest
import torch

from kascade_cli.capture.afford import affordable_length


class Sized:
    """A model of `count` parameters, without their memory."""

    def __init__(self, count, device="cpu"):
        self.device, self.count = torch.device(device), count

    def parameters(self):
        return iter([torch.empty(self.count, device="meta")])


@pytest.mark.parametrize(
    ("parameters", "prompts", "limit", "length"),
    [
        (7_600_000, 16, 2048, 2048),  # what the model takes
        (7_600_000, 16, None, 4096),  # the most on a CPU
        (494_000_000, 16, 32768, 1024),  # 300 s of 80 GFLOP/s on one core: 1.5k tokens a prompt
        (494_000_000, 4, 32768, 4096),
        (494_000_000, 8, 32768, 2048),
        (494_000_000, 64, 32768, 1024),  # the least
        (8_000_000_000, 16, 131072, 1024),
        (7_600_000, 16, 100, 100),
    ],
)
def test_on_one_core(parameters, prompts, limit, length, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    assert affordable_length(Sized(parameters), prompts, limit) == length


def test_on_a_gpu():
    assert affordable_length(Sized(10**9, "cuda"), 16, 131072) == 16384
    assert affordable_length(Sized(10**9, "cuda"), 16, 8192) == 8192
