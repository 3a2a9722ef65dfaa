"""Kascade sparse attention: calibrate, inspect and run it for any Hugging Face causal language model."""

from kascade_cli.version import __version__

__all__ = ["Profile", "attach", "__version__"]


def __getattr__(name: str):
    # Lazy, so that `kascade --help` does not import torch.
    if name == "attach":
        from kascade_cli.integrations.transformers import attach

        return attach
    if name == "Profile":
        from kascade_cli.schema import Profile

        return Profile
    raise AttributeError(f"module 'kascade_cli' has no attribute {name!r}")
