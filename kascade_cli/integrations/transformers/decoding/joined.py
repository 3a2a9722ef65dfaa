"""One product in place of several: q, k and v of a decode step project the same vectors, a gated MLP's two also."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kascade_cli.models import decoder_layers

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # as transformers' models run them
_SHARE = 0.25  # of the free memory that the joined weights, which are copies, may take


class Joined(nn.Module):
    """In place of the first of several linear layers; the others take their parts of what it has computed."""

    def __init__(self, parts: Sequence[nn.Linear]):
        super().__init__()
        self.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        biases = [part.bias for part in parts]
        self.bias = None if biases[0] is None else nn.Parameter(torch.cat(biases), requires_grad=False)
        self.sizes = [part.out_features for part in parts]
        self.parts: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.parts = linear(x, self.weight, self.bias).split(self.sizes, -1)
        return self.parts[0]


class Part(nn.Module):
    """In place of another of them; it runs after the first, on the same input."""

    def __init__(self, joined: Joined, index: int):
        super().__init__()
        self.joined, self.index = joined, index

    def forward(self, _: Tensor) -> Tensor:
        return self.joined.parts[self.index]


def joinable(module: nn.Module, names: Sequence[str]) -> list[nn.Linear]:
    """The module's projections of these names, in the order in which they run; none where they cannot be joined."""
    found = [getattr(module, name, None) for name in names]
    if not all(type(part) is nn.Linear for part in found):  # not adapters, quantised layers, or a joined one
        return []
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in found):
        return []
    alike = {(part.in_features, part.weight.dtype, part.weight.device, part.bias is None) for part in found}
    return found if len(alike) == 1 else []


@contextlib.contextmanager
def joined_projections(model: nn.Module) -> Iterator[list[Joined]]:
    """Inside, decoder layers project once where they can; left, they are what they were. The joined ones, which graphs
    read on: copies, so that attention goes first where memory is short.
    """
    made: list[Joined] = []
    with contextlib.ExitStack() as undo, torch.no_grad():
        for names in GROUPS:
            inside = [module for layer in decoder_layers(model).values() for module in layer.modules()]
            found = {module: parts for module in inside if (parts := joinable(module, names))}
            needed = sum(part.weight.nbytes for parts in found.values() for part in parts)
            for module, parts in found.items() if _fits(needed, model) else ():
                made.append(Joined(parts))
                replacements = [made[-1], *(Part(made[-1], index) for index in range(1, len(parts)))]
                for name, part, replacement in zip(names, parts, replacements, strict=True):
                    setattr(module, name, replacement)
                    undo.callback(setattr, module, name, part)
        yield made
        for joined in made:
            joined.parts = ()


def _fits(size: int, model: nn.Module) -> bool:
    device = next(model.parameters()).device
    return device.type != "cuda" or size <= _SHARE * torch.cuda.mem_get_info(device)[0]
