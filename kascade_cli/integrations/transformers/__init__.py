"""Sparse attention inside transformers: attach a profile to a model."""

from kascade_cli.integrations.transformers.attach import Attachment, attach, attach_setting, compile_ahead

__all__ = ["Attachment", "attach", "attach_setting", "compile_ahead"]
