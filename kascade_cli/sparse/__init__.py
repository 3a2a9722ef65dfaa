"""Sparse attention at run time, whatever the engine: which keys a layer reads, and reading them.

An engine (transformers, vLLM, a benchmark) describes a forward pass as a `Batch`, starts a `Pass` of a strategy, and
asks the strategy to `attend` for each full-attention `Layer`.
"""

from kascade_cli.sparse.batch import Batch, Lengths
from kascade_cli.sparse.layer import Keys, Layer
from kascade_cli.sparse.setting import Setting
from kascade_cli.sparse.state import Pass
from kascade_cli.sparse.strategy import Option, Strategy, known_strategies, make_strategy

__all__ = [
    "Batch",
    "Keys",
    "Layer",
    "Lengths",
    "Option",
    "Pass",
    "Setting",
    "Strategy",
    "known_strategies",
    "make_strategy",
]
