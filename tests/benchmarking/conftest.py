"""A CPU setting and a shape small enough for tests."""

import pytest
import torch

from kascade_cli.benchmarking.roles import Bench
from kascade_cli.benchmarking.shapes import Shape
from kascade_cli.kernels import get_backend
from kascade_cli.schema import Budget

CONFIG = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def shape():
    return Shape("tiny", 4, 2, 8, 4, 2, ("LlamaConfig", CONFIG))


@pytest.fixture
def setting():
    cpu = torch.device("cpu")
    return Bench(get_backend("torch", cpu), cpu, torch.float32, Budget(ratio=0.2, min_keys=8, tile=16), 0.001)
