"""Dense attention through PyTorch's SDPA, for every kind of batch: chunks, caches, padded rows."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kascade_cli.sparse.batch import Batch

_QUERY_BLOCK = 1024


def dense_sdpa(query: Tensor, key: Tensor, value: Tensor, batch: Batch, scale: float) -> Tensor:
    """query [B, H, T, D]; key, value [B, G, S, D] -> [B, H, T, Dv]; zeros for queries that are padding."""
    query_start, kv_start, kv_len = (tensor[:, None, None, None] for tensor in batch.lengths)
    inside = batch.inside[:, None, None]
    if not batch.plain:  # a mask that is added does not silence a NaN, nor does a weight of 0
        key, value = (tensor.masked_fill(~inside.transpose(-1, -2), 0.0) for tensor in (key, value))
    groups = key.shape[1]
    if batch.queries == 1 and batch.phase == "decode":
        # The heads of a group stand in for queries, so that K and V are not repeated.
        grouped = query.unflatten(1, (groups, -1)).flatten(2, 3)
        mask = None if batch.plain else inside
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
        return out.flatten(1, 2)[:, :, None]
    options = {"scale": scale, "enable_gqa": query.shape[1] != groups}
    if batch.plain and batch.queries == batch.slots:
        return scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    outs, slot = [], torch.arange(batch.slots, device=query.device)
    for begin in range(0, batch.queries, _QUERY_BLOCK):
        block = query[:, :, begin : begin + _QUERY_BLOCK]
        position = query_start + torch.arange(begin, begin + block.shape[2], device=query.device)[:, None]
        out = scaled_dot_product_attention(block, key, value, attn_mask=inside & (slot <= position), **options)
        real = (position >= kv_start) & (position < kv_start + kv_len)
        outs.append(out.masked_fill(~real, 0.0))
    return torch.cat(outs, 2)
