"""Which implementation of the attention ops runs. TileLang ops fall back one by one, and say so once."""

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.kernels import reference

OPS = (
    "decode_dense",
    "decode_score",
    "select_topk",
    "decode_sparse",
    "prefill_dense",
    "prefill_score",
    "prefill_sparse",
    "prefill_sparse_lse",
)
BACKENDS = ("auto", "torch", "tilelang")

log = logging.getLogger("kascade")


class Unsupported(KascadeError):
    """This op cannot run these arguments; the message says why. With `auto` the reference takes over."""


class Backend:
    """The ops as attributes. `name` is `torch` or `tilelang`.

    With `strict`, a TileLang op that cannot run raises; otherwise the reference runs and one warning names the reason.
    """

    def __init__(self, name: str, *, strict: bool = False):
        self.name = name
        self.strict = strict
        self.fallbacks: dict[str, str] = {}
        for op in OPS:
            setattr(self, op, self._op(op))

    def _op(self, op: str) -> Callable[..., Any]:
        plain = getattr(reference, op)
        if self.name == "torch":
            return plain
        fast = getattr(importlib.import_module(f"kascade_cli.kernels.tilelang.{op}"), op)

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return fast(*args, **kwargs)
            except Unsupported as reason:
                if self.strict:
                    raise
                if op not in self.fallbacks:
                    self.fallbacks[op] = str(reason)
                    log.warning("%s runs on PyTorch: %s", op, reason)
                return plain(*args, **kwargs)

        return call

    def compile_ahead(self, group: int, head_dim: int, dtype: torch.dtype, tile: int) -> None:
        """Compiles the kernels of a shape that are not cached yet, in parallel and with a progress bar.

        Without this every kernel is compiled when it is first called, one after the other.
        """
        if self.name == "tilelang":
            ahead = importlib.import_module("kascade_cli.kernels.tilelang.ahead")
            ahead.compile_ahead(ahead.shape_specs(group, head_dim, dtype, tile))

    def __repr__(self) -> str:
        return f"Backend({self.name})"


def _why_not_tilelang(device: torch.device) -> str | None:
    """Why the TileLang kernels cannot run on `device`, or None."""
    if device.type != "cuda":
        return f"they need a CUDA GPU, and the model is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"they are built for sm_90 (Hopper), and this GPU is sm_{major}{minor}"
    if importlib.util.find_spec("tilelang") is None:
        return "tilelang is not installed: pip install 'kascade-cli[kernels]'"
    return None


def check_backend(name: str) -> None:
    """Raises UsageError for a name that is no backend's."""
    if name not in BACKENDS:
        raise UsageError(f"backend '{name}' is not known; use one of {', '.join(BACKENDS)}")


def get_backend(name: str, device: torch.device | str) -> Backend:
    """The backend called `name` (`auto`, `torch`, `tilelang`) for tensors on `device`.

    `auto` is TileLang where it can run and PyTorch elsewhere. Raises UsageError for another name, KascadeError if
    `tilelang` was asked for by name and cannot run.
    """
    check_backend(name)
    if name == "torch":
        return Backend("torch")
    reason = _why_not_tilelang(torch.device(device))
    if reason and name == "tilelang":
        raise KascadeError(f"the TileLang kernels cannot run here: {reason}")
    return Backend("torch") if reason else Backend("tilelang", strict=name == "tilelang")
