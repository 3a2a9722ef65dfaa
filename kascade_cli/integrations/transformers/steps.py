"""Decode steps whose tokens are known, run together (teacher forcing): the same keys, a fraction of the launches.

T tokens behind a cache run as one chunk of the model; attention takes them as T rows of one query each, whose keys are
the cache and the tokens up to their own. A layer's keys depend on earlier tokens and layers alone, so that every row
sees what a step by itself would have seen.
"""

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError
from kascade_cli.schema import Budget
from kascade_cli.sparse import Batch, Lengths


def steps_batch(query: Tensor, key: Tensor, budget: Budget, partition: object) -> Batch:
    """The batch of T steps: query [1, H, T, D], key [1, G, S, D] with the T tokens last.

    Raises KascadeError for several sequences.
    """
    if len(query) > 1:
        raise KascadeError("decode steps run together for one sequence at a time")
    count, slots = query.shape[2], key.shape[2]
    kv_len = torch.arange(slots - count + 1, slots + 1, dtype=torch.int32, device=query.device)
    lengths = Lengths(kv_len - 1, torch.zeros_like(kv_len), kv_len)
    return Batch(lengths, "decode", 1, slots, budget, partition=partition)


def as_rows(query: Tensor, key: Tensor, value: Tensor, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[1, heads, T or S, D] -> [T, H, 1, D] and [T, G, S, D]; packed: K and V copied, as kernels want them."""
    count = query.shape[2]
    key, value = (tensor.expand(count, -1, -1, -1) for tensor in (key, value))
    if packed:
        key, value = key.contiguous(), value.contiguous()
    return query.transpose(0, 2), key, value
