"""Which implementation of the attention ops runs. TileLang ops fall back one by one, and say so once."""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.kernels import reference
from kascade_cli.kernels.contract import OPS, Progress, Unsupported

BACKENDS = ("auto", "torch", "tilelang")

log = logging.getLogger("kascade")


@dataclass(frozen=True)
class _Registered:
    ops: dict[str, Callable[..., Any]]
    why_not: Callable[[torch.device], str | None] | None


_registered: dict[str, _Registered] = {}


class Backend:
    """The ops as attributes. `name` is `torch`, `tilelang` or one that `register_backend` knows.

    With `strict`, an op that cannot run raises; otherwise the reference runs and one warning names the reason.
    `fused`: its dense attention leaves a log-sum-exp at no cost and `prefill_score` is faster with one; the reference
    computes its own.
    """

    def __init__(self, name: str, *, strict: bool = False):
        self.name = name
        self.strict = strict
        self.fused = name != "torch"
        self.fallbacks: dict[str, str] = {}
        for op in OPS:
            setattr(self, op, self._op(op))

    def _op(self, op: str) -> Callable[..., Any]:
        plain = getattr(reference, op)
        if self.name == "torch":
            return plain
        if self.name in _registered:
            fast = _registered[self.name].ops[op]
        else:
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

    def compile_ahead(
        self,
        group: int,
        head_dim: int,
        dtype: torch.dtype,
        tile: int,
        progress: Progress | None = None,
        page: int = 0,
    ) -> None:
        """Compiles the kernels of a shape that are not cached yet, in parallel; `progress` is told of each.

        page: slots of a page for the kernels of a paged cache, 0 for those of a contiguous one.
        Without this every kernel is compiled when it is first called, one after the other.
        """
        if self.name == "tilelang":
            ahead = importlib.import_module("kascade_cli.kernels.tilelang.ahead")
            ahead.compile_ahead(ahead.shape_specs(group, head_dim, dtype, tile, page), progress)

    def __repr__(self) -> str:
        return f"Backend({self.name})"


def register_backend(
    name: str,
    ops: Mapping[str, Callable[..., Any]] | ModuleType,
    why_not: Callable[[torch.device], str | None] | None = None,
) -> None:
    """Makes `get_backend(name, ...)` run `ops`: all of `OPS`, by name or as attributes; a second call replaces them.

    why_not(device) gives the reason why they cannot run there, or None. An op may raise `Unsupported` for arguments
    that it does not take: nothing takes over for a backend that was asked for by name. Raises UsageError for a name
    that is taken and for missing ops.
    """
    if name in BACKENDS:
        raise UsageError(f"backend '{name}' is built in; register yours under another name")
    found = {op: ops.get(op) if isinstance(ops, Mapping) else getattr(ops, op, None) for op in OPS}
    missing = [op for op, function in found.items() if not callable(function)]
    if missing:
        raise UsageError(f"backend '{name}' lacks {', '.join(missing)}")
    _registered[name] = _Registered(found, why_not)


def backend_names() -> tuple[str, ...]:
    """Every name that `get_backend` takes."""
    return (*BACKENDS, *_registered)


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
    if name not in backend_names():
        raise UsageError(f"backend '{name}' is not known; use one of {', '.join(backend_names())}")


def get_backend(name: str, device: torch.device | str) -> Backend:
    """The backend called `name` (`auto`, `torch`, `tilelang` or a registered one) for tensors on `device`.

    `auto` is TileLang where it can run and PyTorch elsewhere. Raises UsageError for another name, KascadeError if a
    backend was asked for by name and cannot run.
    """
    check_backend(name)
    if name == "torch":
        return Backend("torch")
    if name in _registered:
        why_not = _registered[name].why_not
        if why_not and (reason := why_not(torch.device(device))):
            raise KascadeError(f"the {name} backend cannot run here: {reason}")
        return Backend(name, strict=True)
    reason = _why_not_tilelang(torch.device(device))
    if reason and name == "tilelang":
        raise KascadeError(f"the TileLang kernels cannot run here: {reason}")
    return Backend("torch") if reason else Backend("tilelang", strict=name == "tilelang")
