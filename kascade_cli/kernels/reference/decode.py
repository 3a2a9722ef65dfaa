"""One query per row, over all of its keys or over chosen ones."""

import torch
from torch import Tensor

from kascade_cli.kernels.contract import LN2
from kascade_cli.kernels.reference.common import blame, grouped, may_hold_nan, row_slots, softmax, wide


def gather_pages(cache: Tensor, block_table: Tensor) -> Tensor:
    """A paged cache [P, page, G, D] through `block_table` [B, MP] as contiguous [B, G, MP * page, D]."""
    pages = cache[block_table.long()]
    return pages.flatten(1, 2).transpose(1, 2)


def _pool(probability: Tensor, logits: Tensor) -> Tensor:
    """Probabilities [B, G, R, S] summed over the heads of each group."""
    pooled = probability.sum(2)
    return blame(probability, logits).sum(2) if may_hold_nan(pooled) else pooled


def decode_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    scores: bool = False,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Dense attention of one query per row.

    q [B, H, D]; k, v [B, G, S, D], or [P, page, G, D] with `block_table` int32 [B, MP].
    Returns (out [B, H, D] in q's dtype, pooled scores float32 [B, G, S] or None); scores as in `decode_score`.
    """
    if block_table is not None:
        k, v = gather_pages(k, block_table), gather_pages(v, block_table)
    logits = grouped(wide(q), k.shape[1]) @ wide(k).transpose(-1, -2) * scale
    slots = row_slots(k, kv_start, kv_len)[:, None]
    probability = softmax(logits, slots[:, None])
    out = (probability @ wide(v).masked_fill(~slots[..., None], 0.0)).flatten(1, 2).to(q.dtype)
    return out, (_pool(probability, logits) if scores else None)


def decode_score(
    q: Tensor,
    k: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    logits: bool = False,
    pooled: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Post-softmax attention of one query per row, summed over the heads of each group (method: decode pooling).

    q [B, H, D]; k [B, G, S, D] or paged. Returns float32 [B, G, S]; zero outside the row's keys; sums to R. With
    `pooled` the sum is over all heads: [B, 1, S], sums to H.
    With `logits` also the scaled logits in log2 units, [B, G, S', R'] with S' >= S, R' >= R, valid for the row's keys
    and the group's heads: `decode_sparse` need not read K again. Their dtype and padding are the backend's.
    """
    if block_table is not None:
        k = gather_pages(k, block_table)
    raw = grouped(wide(q), k.shape[1]) @ wide(k).transpose(-1, -2) * scale
    kept = raw.transpose(2, 3) / LN2 if logits else None  # the softmax masks in place
    scores = _pool(softmax(raw, row_slots(k, kv_start, kv_len)[:, None, None]), raw)
    scores = scores.sum(1, keepdim=True) if pooled else scores
    return (scores, kept) if logits else scores


def decode_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    head_map: Tensor,
    *,
    scale: float,
    logits: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attention of one query per row over the selected keys only (paper, section 3.1).

    q [B, H, D]; k, v [B, G, S, D] or paged; indices int32 [B, G2, K] of slots; counts int32 [B] entries in use;
    head_map int32 [G]: KV head g reads indices[:, head_map[g]]; logits as `decode_score` gives them, or None to
    compute them. Returns [B, H, D]; zeros where the count is 0.
    """
    if block_table is not None:
        k, v = gather_pages(k, block_table), gather_pages(v, block_table)
    width, groups = indices.shape[-1], k.shape[1]
    chosen = indices[:, head_map.long()].clamp_min(0).long()[..., None]
    values = wide(v.gather(2, chosen.expand(-1, -1, -1, v.shape[-1])))
    if logits is None:
        keys = wide(k.gather(2, chosen.expand(-1, -1, -1, k.shape[-1])))
        raw = grouped(wide(q), groups) @ keys.transpose(-1, -2) * scale
    else:
        known = logits[..., : q.shape[1] // groups]
        raw = wide(known.gather(2, chosen.expand(-1, -1, -1, known.shape[-1]))).transpose(2, 3) * LN2
    used = (torch.arange(width, device=q.device) < counts[:, None])[:, None, None]
    values = values.masked_fill(~used.transpose(2, 3), 0.0)  # what a row of no keys gathers may be NaN
    return (softmax(raw, used) @ values).flatten(1, 2).to(q.dtype)
