"""Sparse attention at run time: attach a profile to a transformers model."""

from kascade_cli.attention.attachment import Attachment, attach, compile_ahead
from kascade_cli.attention.plan import STRATEGIES

__all__ = ["STRATEGIES", "Attachment", "attach", "compile_ahead"]
