"""Where a model's weights go, and in which type."""

import os
from importlib.util import find_spec
from typing import Any

import torch

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.processes import team

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPLIT = "tp"  # the device map that splits heads over processes
_DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU; of several processes each has its own.

    Raises UsageError for what is not there.
    """
    if device.split(":")[0] == "meta":
        raise UsageError("device 'meta' holds no weights, so nothing can run there; use --device cpu or auto")
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda") if team() is None else _own_gpu()
    if device == "auto":
        return torch.device("cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{device}' is not available here; use --device cpu or auto") from error
    return resolved


def _own_gpu() -> torch.device:
    """The GPU of this process, by its number on the host; kernels run there too. Raises UsageError."""
    members, found = team(), torch.cuda.device_count()
    index = members.local_rank
    if found == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
        index = 0  # the launcher shows each process its own
    if index >= found:
        raise UsageError(
            f"process {members.rank} has no GPU of its own ({found} on this host): start as many processes as GPUs, "
            "or pass --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def resolve_dtype(dtype: str) -> torch.dtype | str:
    """`auto` is what the checkpoint was saved in. Raises UsageError."""
    if dtype == "auto":
        return dtype
    if dtype not in _DTYPES:
        raise UsageError(f"dtype '{dtype}' is not known; use auto, float32, bfloat16 or float16")
    return _DTYPES[dtype]


def _split(device: str, accelerate: bool) -> Any:
    """transformers' configuration of tensor parallelism over the processes of this command."""
    if team() is None:
        raise UsageError("--device-map tp splits a model's heads over processes: start them with torchrun")
    if device != "auto":
        raise UsageError("--device-map tp takes the GPU of each process: leave --device out")
    if not accelerate:
        raise KascadeError("--device-map needs accelerate: pip install 'kascade-cli[accelerate]'")
    from transformers.distributed import DistributedConfig

    gpus = torch.cuda.is_available()
    if gpus:
        _own_gpu()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if gpus else "gloo")
    return DistributedConfig(tp_plan="auto", tp_size=team().size)


def placement(device: str, device_map: str | None) -> tuple[Any, torch.device | None]:
    """(transformers' device_map, where to move the model once it is loaded); for `tp` a DistributedConfig instead.

    Without accelerate, which device maps need, weights are read to main memory first and then moved.
    """
    accelerate = find_spec("accelerate") is not None
    if device_map is None:
        target = torch.device("cpu") if device == "cpu" else resolve_device(device)
        return ({"": target}, None) if accelerate and target.type != "cpu" else (None, target)
    if device_map not in ("auto", SPLIT):
        raise UsageError(f"device map '{device_map}' is not known; use --device-map auto or tp, or leave it out")
    if device_map == SPLIT:
        return _split(device, accelerate), None
    if team() is not None:
        raise UsageError("--device-map auto spreads one model over all GPUs: run one process, or leave it out")
    if device != "auto":
        raise UsageError("--device-map auto chooses the devices itself: leave --device out")
    if not accelerate:
        raise KascadeError("--device-map needs accelerate: pip install 'kascade-cli[accelerate]'")
    return "auto", None


def gpu_name(device: torch.device) -> str | None:
    """`NVIDIA H100 80GB HBM3`; None for another kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
