"""What the reference ops share: precision, blocks, masks, and a softmax that keeps NaN."""

import math

import torch
from torch import Tensor

# Elements of the largest temporary. Blocks of tiles are cut so that logits stay near it: nothing is T x S. On a CPU a
# block should stay in the cache, on a GPU it should fill the machine.
BLOCK_ELEMENTS = 1 << 20
GPU_BLOCKS = 16


def wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def steps(device: torch.device, elements: int) -> int:
    """How many units (tiles, queries) of `elements` logits make a block."""
    return max(1, BLOCK_ELEMENTS * (1 if device.type == "cpu" else GPU_BLOCKS) // elements)


def grouped(q: Tensor, kv_heads: int) -> Tensor:
    """[B, H, ...] -> [B, G, R, ...]."""
    return q.unflatten(1, (kv_heads, q.shape[1] // kv_heads))


def row_slots(cache: Tensor, kv_start: Tensor, kv_len: Tensor) -> Tensor:
    """Which slots of [B, G, S, D] hold the row's keys, bool [B, S]."""
    slot = torch.arange(cache.shape[2], device=cache.device)
    return (slot >= kv_start[:, None]) & (slot < (kv_start + kv_len)[:, None])


def softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where `mask`, zero elsewhere. Masks the logits in place."""
    hidden = ~mask
    return torch.softmax(logits.masked_fill_(hidden, float("-inf")), dim=-1).masked_fill_(hidden, 0.0)


def blame(probability: Tensor, logits: Tensor) -> Tensor:
    """The probabilities with NaN only at the keys at fault, zero at the others of their query."""
    return probability.masked_fill(probability.isnan() & (logits < float("inf")), 0.0)


def may_hold_nan(pooled: Tensor) -> bool:
    """Whether to look for keys at fault: not asked of a GPU, which would have to wait for the answer."""
    return pooled.device.type != "cpu" or math.isnan(pooled.sum())


def causal(slot: Tensor, kv_start: Tensor, kv_len: Tensor, slots: int) -> Tensor:
    """Which keys each query sees, bool [B, T, S], for query slots [B, T]."""
    key = torch.arange(slots, device=slot.device)
    end = (kv_start + kv_len)[:, None, None]
    real = (slot >= kv_start[:, None]) & (slot < end[:, 0])
    return real[..., None] & (key >= kv_start[:, None, None]) & (key <= slot[..., None]) & (key < end)
