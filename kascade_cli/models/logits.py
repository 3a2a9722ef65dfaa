"""Logits at a few positions, of models that can leave the others out and of those that cannot."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kascade_cli.models.tree import unwrap


@functools.cache
def _takes_positions(kind: type[nn.Module]) -> bool:
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


def logits_at(model: nn.Module, ids: Tensor, at: int | Sequence[int] = 1, **options: Any) -> tuple[Tensor, Any]:
    """One forward over ids [B, T]: (logits [B, P, vocabulary], the model's whole output, cache included).

    `at`: the last n positions of `ids`, or a list of positions in it, which all rows share and which may be in any
    order. Where the model's forward takes `logits_to_keep`, the logits of the other positions never exist: all of
    a long prompt take gigabytes. `options` go to the model (past_key_values, attention_mask, use_cache ...).
    """
    length = ids.shape[1]
    positions = list(range(length - at, length)) if isinstance(at, int) else [int(position) for position in at]
    if not positions or not 0 <= min(positions) <= max(positions) < length:
        raise ValueError(f"positions {at} of {length} tokens")
    keep = ids.new_tensor(positions)
    if _takes_positions(type(unwrap(model))):
        last = list(range(length - len(positions), length))
        output = model(input_ids=ids, logits_to_keep=len(last) if positions == last else keep, **options)
        return output.logits, output
    output = model(input_ids=ids, **options)
    return output.logits[:, keep.to(output.logits.device)], output
