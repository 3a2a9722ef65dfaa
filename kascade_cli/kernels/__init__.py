"""Attention kernels: ops with one signature, in two backends (`torch`, `tilelang`)."""

from kascade_cli.kernels.backend import BACKENDS, Backend, get_backend

__all__ = ["BACKENDS", "Backend", "get_backend"]
