"""Decoder layers compiled for a decode step: norms, rotary embeddings, activations and cache writes in few kernels.

One layer's code serves all of them: it is compiled once or twice, not once a layer, and for all strategies. So a layer
gets its own part of the cache in place of the whole. Attention is one node of the graph and runs as it is (attach.py).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kascade_cli.integrations.transformers.decoding.joined import joined_projections
from kascade_cli.integrations.transformers.decoding.slots import SlotLayer, Slots
from kascade_cli.models import decoder_layers


class OneLayer:
    """A cache, as one layer sees it."""

    def __init__(self, layer: SlotLayer):
        self.layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.layer.update(key_states, value_states)


@contextlib.contextmanager
def compiled_layers(model: nn.Module, slots: Slots, backend: Any = "inductor") -> Iterator[Any]:
    """Inside, the model's decoder layers run compiled, over `slots`; left, they are what they were.

    Gives what graphs that are recorded inside read on: keep it as long as they. Raises what torch.compile raises, when
    the model runs.
    """
    made: dict[type, Any] = {}
    with contextlib.ExitStack() as undo:
        # Every number of rows and of slots is compiled for anew.
        kept = undo.enter_context(joined_projections(model))
        undo.enter_context(torch._dynamo.config.patch(recompile_limit=64))
        for index, layer in decoder_layers(model).items():
            kind = type(layer)
            if kind not in made:
                made[kind] = torch.compile(
                    kind.forward, fullgraph=True, dynamic=False, backend=backend,
                    options={"combo_kernels": True} if backend == "inductor" else None,  # q's and k's in one kernel
                )  # fmt: skip
            own = vars(layer).get("forward")
            layer.forward = _one(made[kind], layer, OneLayer(slots.cache.layers[index]))
            undo.callback(_restore, layer, own)
        yield kept


def _one(compiled: Any, layer: nn.Module, cache: OneLayer) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled(layer, *args, **kwargs | {"past_key_values": cache})

    return forward


def _restore(layer: nn.Module, own: Any) -> None:
    del layer.forward
    if own is not None:
        layer.forward = own
