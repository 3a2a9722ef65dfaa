"""How far a layer's attention turns the residual stream: w = 1 - mean over tokens of cos(x, y).

x is what the stream would be without the layer's attention, y what it is with it. What a decoder layer really adds
is found out, not assumed: families scale the attention's output (Granite, MiniCPM), norm it (Gemma, OLMo 2), keep a
normed residual (MiniMax) or add attention and MLP at once (Phi, Cohere). Hooks see the layer's input, the attention's
output and what comes next; y = a * residual + b * output is then solved for a and b on a sample of tokens, and
accepted only where it holds.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kascade_cli.errors import KascadeError

_TOKEN_BLOCK = 2048  # tokens whose float32 copies exist at once when cosines are taken
_SAMPLE = 256  # tokens on which the equation is solved
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of its relative error
_HALF_TOLERANCE = 2e-2
_LEAST_SHARE = 1e-2  # a smaller b means that the attention is not in it


class Residual:
    """Follows one decoder layer. `found` gets w (a float32 scalar) once per pass for which `wanted()` is true."""

    def __init__(self, layer: int, wanted: Callable[[], bool], found: Callable[[Tensor], None]) -> None:
        self.layer, self.wanted, self.found = layer, wanted, found
        self.forget()

    def forget(self) -> None:
        self._before: list[Tensor] = []  # the layer's input, and what its norms made of it
        self._added: Tensor | None = None
        self._other: Tensor | None = None  # what another child gave after the attention (a parallel MLP)
        self._following = False

    def follow(self, layer: nn.Module, attention: nn.Module) -> Iterator[Any]:
        """Registers the hooks and yields their handles."""
        yield layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        yield attention.register_forward_hook(self._attended)
        for child in layer.children():
            if child is not attention:
                yield child.register_forward_pre_hook(self._next, with_kwargs=True)
                yield child.register_forward_hook(self._passed, with_kwargs=True)
        yield layer.register_forward_hook(self._leave)

    def _enter(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        self.forget()
        if self.wanted():
            self._following = True
            self._before.append(_first(args, kwargs))

    def _attended(self, _: nn.Module, __: tuple, output: Any) -> None:
        if self._following:
            self._added = _tensor(output)

    def _next(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        """A child is about to read a tensor: the residual stream with the attention in it?"""
        tensor = _first(args, kwargs) if self._following else None
        if tensor is None or self._added is None or tensor is self._added:
            return
        if all(tensor is not seen for seen in self._before):
            self._settle(tensor, [])

    def _passed(self, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        tensor = _tensor(output) if self._following else None
        if tensor is None:
            return
        if self._added is None:
            self._before.append(tensor)
        elif _first(args, kwargs) is self._added:
            self._added = tensor  # a norm or dropout between the attention and the sum
        else:
            self._other = tensor

    def _leave(self, _: nn.Module, __: tuple, output: Any) -> None:
        tensor = _tensor(output) if self._following else None
        if tensor is not None and self._added is not None and not self._settle(tensor, []) and self._other is not None:
            self._settle(tensor, [self._other])
        unsettled = self._following
        self.forget()
        if unsettled:
            raise KascadeError(
                f"layer {self.layer} adds its attention to the residual stream in a way that is not known, "
                "so its importance cannot be measured"
            )

    def _settle(self, after: Tensor, others: list[Tensor]) -> bool:
        """Whether `after` is a * residual + b * added (+ c * other); if so, the pass is measured."""
        added = self._added
        assert added is not None
        for residual in self._before:
            parts = [residual, added, *others]
            if any(part.numel() != after.numel() for part in parts):
                continue
            solved = _solve(after, parts)
            if solved is not None:
                self.found(_turn(residual, added, solved))
                self.forget()
                return True
        return False


def _tensor(output: Any) -> Tensor | None:
    if isinstance(output, tuple | list):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) else None


def _first(args: tuple, kwargs: dict) -> Tensor | None:
    """The tensor that a module is called on."""
    if args:
        return _tensor(args[0])
    return _tensor(kwargs.get("hidden_states", next(iter(kwargs.values()), None)))


def _rows(tensor: Tensor, width: int) -> Tensor:
    return tensor.reshape(-1, width)


def _solve(after: Tensor, parts: list[Tensor]) -> float | None:
    """b / a of after = a * parts[0] + b * parts[1] (+ c * parts[2]), by least squares; None where it does not hold.

    Each token counts alike: the first tokens of a prompt can be a thousand times larger than all others.
    """
    width = parts[0].shape[-1]
    count = after.numel() // width
    chosen = torch.linspace(min(1, count - 1), count - 1, min(count, _SAMPLE), device=after.device).long()
    target, *columns = (_rows(tensor, width)[chosen].double() for tensor in (after, *parts))
    norms = target.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    target = (target / norms).reshape(-1)
    matrix = torch.stack([(column / norms).reshape(-1) for column in columns], dim=1)
    if not matrix[:, 1].any() or not (torch.isfinite(matrix).all() and torch.isfinite(target).all()):
        return 1.0  # no attention at all, or not a number, which the caller tells
    lengths = matrix.norm(dim=0).clamp_min(1e-30)
    scaled = matrix / lengths
    solution = torch.linalg.pinv(scaled.T @ scaled, hermitian=True) @ (scaled.T @ target)
    error = float((scaled @ solution - target).norm() / target.norm().clamp_min(1e-30))
    kept, share = (solution / lengths)[:2].tolist()
    if error > _TOLERANCE.get(after.dtype, _HALF_TOLERANCE) or kept <= 0 or share / kept < _LEAST_SHARE:
        return None
    return share / kept


def _turn(residual: Tensor, added: Tensor, scale: float) -> Tensor:
    """1 - mean over tokens of cos(x, x + scale * added): a scalar; residual and added [..., hidden]."""
    width = residual.shape[-1]
    residual, added = _rows(residual, width), _rows(added, width)
    total = torch.zeros((), dtype=torch.float32, device=residual.device)
    for start in range(0, len(residual), _TOKEN_BLOCK):
        before = residual[start : start + _TOKEN_BLOCK].float()
        after = before + scale * added[start : start + _TOKEN_BLOCK].float()
        total += nn.functional.cosine_similarity(before, after, dim=-1).sum()
    return 1 - total / len(residual)
