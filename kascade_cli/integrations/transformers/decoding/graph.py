"""Capturing a step in a CUDA graph: the only code here that needs a GPU."""

from collections.abc import Callable

import torch

from kascade_cli.integrations.transformers.interface import capturing

Step = Callable[[], None]


def warm_up(steps: list[Step], device: torch.device) -> None:
    """Runs the steps once on a side stream, as capturing wants it: libraries set themselves up, kernels are loaded."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for step in steps:
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)


def record(step: Step, device: torch.device) -> Step:
    """What replays `step`, which has run before; it is recorded, not run.

    Raises whatever the step raises, and RuntimeError for what cannot be in a graph (waiting for the device, copies
    from unpinned memory).
    """
    graph = torch.cuda.CUDAGraph()
    token = capturing.set(True)
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            step()
    except BaseException:
        torch.cuda.synchronize(device)
        raise
    finally:
        capturing.reset(token)
    return graph.replay
