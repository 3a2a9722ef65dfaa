"""Decoder layers compiled for a decode step: norms, rotary embeddings, activations and cache writes in few kernels.

A few layers in a row are compiled as one, so that a layer's last addition runs in the kernel of the next one's first
norm. Their code serves all such rows of layers: it is compiled once or twice, not once a row, and for all strategies.
So a layer gets its own part of the cache in place of the whole. Attention is one node of the graph and runs as it is
(attach.py).
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kascade_cli.errors import KascadeError
from kascade_cli.integrations.transformers.decoding.joined import joined_projections
from kascade_cli.integrations.transformers.decoding.slots import SlotLayer, Slots
from kascade_cli.models import decoder_layers

TOGETHER = 4  # layers; the more, the longer compiling takes
ENDS = ("rotary_emb", "norm", "final_layernorm", "ln_f")  # what runs once a step beside the layers, as models name it


# Every number of rows, of slots and of layers together is compiled for anew. Hooks of modules inside layers are looked
# at, as one code serves layers that may have other ones.
_CONFIG = {"recompile_limit": 1024, "accumulated_recompile_limit": 4096, "skip_nnmodule_hook_guards": False}


class OneLayer:
    """A cache, as one layer sees it."""

    def __init__(self, layer: SlotLayer):
        self.layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.layer.update(key_states, value_states)


ELSEWHERE = "another thread is compiling this model's decode steps: let it finish before this one runs the model"
BETWEEN = "the model does more between two layers than to hand the hidden states on"


class Later(Tensor):
    """What a layer of a row hands on: nothing has been computed yet, so that it must not be read."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") != "__get__":  # shape, dtype, device
            raise KascadeError(BETWEEN)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


class Row:
    """Layers that a model runs one after the other. All but the last only take down what they are given; the last
    runs them all. Raises KascadeError where the model does anything in between.
    """

    def __init__(self, compiled: Any, layers: Sequence[nn.Module], caches: Sequence[OneLayer]):
        self.compiled, self.layers, self.caches = compiled, tuple(layers), caches
        self.given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.hidden: Tensor | None = None
        self.later: Tensor | None = None

    def forward_of(self, place: int) -> Any:
        """What stands in for the forward of the row's layer number `place`."""

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if place == 0:  # whatever a step that failed on its way has left
                self.given, self.hidden, self.later = [], hidden, hidden.as_subclass(Later)
            elif hidden is not self.later or len(self.given) != place:
                raise KascadeError(BETWEEN)
            self.given.append((args, kwargs | {"past_key_values": self.caches[place]}))
            if place + 1 < len(self.layers):
                return self.later
            hidden, given = self.hidden, tuple(self.given)
            self.given, self.hidden, self.later = [], None, None
            return self.compiled(self.layers, hidden, given)

        return forward


@contextlib.contextmanager
def compiled_layers(
    model: nn.Module, slots: Slots, backend: Any = "inductor", together: int = TOGETHER
) -> Iterator[Any]:
    """Inside, the model's decoder layers run compiled, up to `together` as one, over `slots`, and where that is more
    than one the final norm and the rotary embedding too; left, they are what they were.

    Gives what graphs that are recorded inside read on: keep it as long as they. Raises, when the model runs, what
    torch.compile raises, and KascadeError for a model whose layers cannot run together.
    """
    made: dict[type, Any] = {}

    def compiled(kind: type, function: Any) -> Any:
        if kind not in made:
            made[kind] = torch.compile(
                function, fullgraph=True, dynamic=False, backend=backend,
                options={"combo_kernels": True} if backend == "inductor" else None,  # q's and k's in one kernel
            )  # fmt: skip
        return made[kind]

    with contextlib.ExitStack() as undo:
        kept = undo.enter_context(joined_projections(model))
        undo.enter_context(torch._dynamo.config.patch(_CONFIG))
        layers = decoder_layers(model)
        if any("forward" in vars(layer) for layer in layers.values()):
            raise KascadeError("a decoder layer's forward has been replaced, which compiled code would pass over")
        for indices in in_rows(layers, together):
            kind = type(layers[indices[0]])
            caches = [OneLayer(slots.cache.layers[index]) for index in indices]
            row = Row(compiled(kind, _one_after_the_other(kind)), [layers[index] for index in indices], caches)
            for place, layer in enumerate(row.layers):
                _replace(layer, row.forward_of(place), undo)
        for module in ends(model, layers) if together > 1 else ():
            _replace(module, partial(compiled(type(module), type(module).forward), module), undo)
        yield kept


def in_rows(layers: dict[int, nn.Module], together: int) -> list[list[int]]:
    """Indices of layers that can run as one: of one kind, nothing between them, nobody who looks at what one gives."""
    rows: list[list[int]] = []
    for index, layer in layers.items():
        before = layers.get(index - 1)
        alone = before is None or type(before) is not type(layer) or before._forward_hooks or layer._forward_pre_hooks
        if alone or len(rows[-1]) == together:
            rows.append([])
        rows[-1].append(index)
    return rows


def ends(model: nn.Module, layers: dict[int, nn.Module]) -> list[nn.Module]:
    """The final norm and the rotary embedding, where they are beside the layers under a name that is known."""
    first = next(iter(layers.values()))
    held = [module for module in model.modules() if isinstance(module, nn.ModuleList) and first in module.children()]
    beside = [module for module in model.modules() if any(child in held for child in module.children())]
    found = [getattr(module, name, None) for module in beside for name in ENDS]
    # Built-in ones (nn.LayerNorm) are one kernel as they are.
    return [
        module
        for module in found
        if module is not None and not type(module).__module__.startswith("torch.") and "forward" not in vars(module)
    ]


def _one_after_the_other(kind: type) -> Any:
    def run(layers: tuple[nn.Module, ...], hidden: Any, given: tuple[tuple[tuple, dict], ...]) -> Any:
        for layer, (args, kwargs) in zip(layers, given, strict=True):
            hidden = kind.forward(layer, hidden, *args, **kwargs)
        return hidden

    return run


def _replace(module: nn.Module, forward: Any, undo: contextlib.ExitStack) -> None:
    ours = threading.get_ident()

    def of_this_thread(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != ours:  # it would write into this thread's cache
            raise KascadeError(ELSEWHERE)
        return forward(*args, **kwargs)

    module.forward = of_this_thread
    undo.callback(delattr, module, "forward")
