from torch import Tensor

from kascade_cli.sparse.layer import Layer
from kascade_cli.sparse.strategy import Strategy


class Dense(Strategy):
    """Every layer attends to every visible key: what the others are compared with."""

    name, summary, rank = "dense", "the model's own attention", 0

    def attend(self, layer: Layer) -> Tensor:
        return layer.dense()
