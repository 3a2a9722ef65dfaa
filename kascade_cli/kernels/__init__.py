"""Attention kernels: ops with one signature, in two backends (`torch`, `tilelang`) and those that register."""

from kascade_cli.kernels.backend import BACKENDS, Backend, get_backend, register_backend
from kascade_cli.kernels.contract import OPS, Unsupported

__all__ = ["BACKENDS", "OPS", "Backend", "Unsupported", "get_backend", "register_backend"]
