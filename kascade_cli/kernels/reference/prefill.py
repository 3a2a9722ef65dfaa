"""Many queries per row, a block of them at a time. With pages every row runs alone: see `ragged`."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import kascade_cli.kernels.reference.ragged as ragged
from kascade_cli.kernels.contract import first_tile, tile_count
from kascade_cli.kernels.ragged import is_ragged
from kascade_cli.kernels.reference.common import blame, causal, grouped, row_slots, steps, wide


def prefill_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    query_start: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    block_table: Tensor | None = None,
    query_start_loc: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Dense causal attention of T queries per row.

    q [B, H, T, D]; k, v [B, G, S, D] (v None: only the log-sum-exp), or ragged as in `kernels.ragged`.
    Returns (out [B, H, T, D] or None, log-sum-exp float32 [B, H, T] in natural log, -inf for padding).
    """
    if is_ragged("prefill_dense", block_table, query_start_loc):
        lengths, where = (
            (query_start, kv_start, kv_len),
            {"block_table": block_table, "query_start_loc": query_start_loc},
        )
        return ragged.dense(prefill_dense, q, k, v, lengths, scale, **where)
    batch, heads, queries, _ = q.shape
    groups, slots = k.shape[1], k.shape[2]
    keys, values = wide(k).transpose(-1, -2), None
    if v is not None:
        values = wide(v).masked_fill(~row_slots(k, kv_start, kv_len)[:, None, :, None], 0.0)
    outs, sums = [], []
    step = steps(q.device, batch * heads * slots)
    for begin in range(0, queries, step):
        block = grouped(wide(q[:, :, begin : begin + step]), groups).flatten(2, 3)
        slot = query_start[:, None] + torch.arange(begin, begin + block.shape[2] // (heads // groups), device=q.device)
        hidden = ~causal(slot, kv_start, kv_len, slots)[:, None, None]
        logits = (block @ keys * scale).unflatten(2, (heads // groups, -1)).masked_fill_(hidden, float("-inf"))
        sums.append(torch.logsumexp(logits, dim=-1).flatten(1, 2))
        if values is not None:
            out = (torch.softmax(logits, dim=-1).flatten(2, 3) @ values).unflatten(2, (heads // groups, -1))
            out.masked_fill_(hidden.all(-1, keepdim=True), 0.0)
            outs.append(out.flatten(1, 2).to(q.dtype))
    return (torch.cat(outs, 2) if outs else None), torch.cat(sums, 2)


def _tile_rows(
    query_start: Tensor, kv_start: Tensor, kv_len: Tensor, queries: int, tile: int, first: int, tiles: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the queries of local tiles [first, first + tiles) are; W = min(tile, queries) rows hold those of a tile.

    Returns (row into q int64 [B, tiles, W], whether it is a real query bool [B, tiles, W],
    slot at which the tile begins int64 [B, tiles]).
    """
    device = query_start.device
    index = first_tile(query_start, kv_start, tile)[:, None] + torch.arange(first, first + tiles, device=device)
    start = index * tile + (kv_start - query_start)[:, None]  # row of the tile's first token
    width = min(tile, queries)
    # A chunk shorter than a tile is packed without the rows that it does not have.
    begin = start + (-start).clamp(0, tile - width)
    row = begin[..., None] + torch.arange(width, device=device)
    token = row + (query_start - kv_start)[:, None, None]
    real = (row >= 0) & (row < queries) & (token < kv_len[:, None, None])
    return row.long(), real, (kv_start[:, None] + index * tile).long()


def _take_rows(q: Tensor, row: Tensor, kv_heads: int) -> Tensor:
    """q [B, H, T, D] at rows [B, tiles, W] -> [B, G, tiles, R * W, D], heads of a group outermost in a tile."""
    batch, heads, queries, size = q.shape
    flat = row.clamp(0, queries - 1).flatten(1)[:, None, :, None].expand(-1, heads, -1, size)
    taken = wide(q.gather(2, flat)).unflatten(2, row.shape[1:])
    return grouped(taken, kv_heads).transpose(2, 3).flatten(3, 4)


def prefill_score(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    query_start: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    tile: int,
    first: int = 0,
    tiles: int | None = None,
    block_table: Tensor | None = None,
    query_start_loc: Tensor | None = None,
) -> Tensor:
    """Post-softmax attention summed over each tile's queries and the group's heads (method: prefill pooling).

    q [B, H, T, D]; k [B, G, S, D]; lse float32 [B, H, T] from `prefill_dense`, or None to compute it here.
    Returns float32 [B, G, tiles, S] for local tiles [first, first + tiles): only slots of the row strictly before the
    tile are non-zero, while each query is normalised over its whole causal row. With an lse that lacks keys (see
    `prefill_sparse_lse`) a score may be +inf. Ragged: [G, tiles, S], of the numbers [first, first + tiles).
    """
    if is_ragged("prefill_score", block_table, query_start_loc):
        lengths, where = (
            (query_start, kv_start, kv_len),
            {"block_table": block_table, "query_start_loc": query_start_loc},
        )
        return ragged.score(prefill_score, q, k, lse, lengths, scale, tile, first, tiles, **where)
    batch, heads, queries, _ = q.shape
    groups, slots = k.shape[1], k.shape[2]
    tiles = tile_count(queries, tile) - first if tiles is None else tiles
    keys = wide(k).transpose(-1, -2)
    out = torch.zeros(batch, groups, tiles, slots, dtype=keys.dtype, device=q.device)
    step = steps(q.device, batch * heads * min(tile, queries) * slots)
    slot = torch.arange(slots, device=q.device)
    for begin in range(0, tiles, step):
        count = min(step, tiles - begin)
        row, real, begins = _tile_rows(query_start, kv_start, kv_len, queries, tile, first + begin, count)
        # Keys past the block's last tile are seen by none of its queries.
        end = min(slots, max(0, int(begins.max()) + tile))
        if end == 0 or not bool(real.any()):
            continue
        packed = (_take_rows(q, row, groups) * scale).flatten(2, 3)
        logits = (packed @ keys[..., :end]).unflatten(2, (count, heads // groups, -1))
        position = row + query_start.long()[:, None, None]
        row_end = (kv_start + kv_len)[:, None, None, None]
        seen = (slot[:end] >= kv_start[:, None, None, None]) & (slot[:end] <= position[..., None])
        seen &= slot[:end] < row_end  # behind the row there may be NaN
        # Rows that are no queries may be anything finite: they pool with weight 0.
        logits.masked_fill_(~seen[:, None, :, None], torch.finfo(logits.dtype).min)
        if lse is None:
            probability = torch.softmax(logits, dim=-1)
        else:
            flat = row.clamp(0, queries - 1).flatten(1)[:, None].expand(-1, heads, -1)
            norm = grouped(lse.gather(2, flat).unflatten(2, row.shape[1:]), groups).transpose(2, 3)
            probability = torch.exp(logits - norm[..., None])
        probability = probability.masked_fill_(~real[:, None, :, None, :, None], 0.0)
        weight = real[:, None, :, None].expand(-1, groups, -1, heads // groups, -1).flatten(3).to(keys.dtype)
        pooled = (weight[..., None, :] @ probability.flatten(3, 4)).squeeze(3)
        if math.isnan(pooled.sum()):
            pooled = (weight[..., None, :] @ blame(probability, logits).flatten(3, 4)).squeeze(3)
        before = (slot[:end] >= kv_start[:, None, None]) & (slot[:end] < begins[..., None])
        out[:, :, begin : begin + count, :end] = pooled.masked_fill_(~before[:, None], 0.0)
    return out


def _sparse_blocks(
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    counts: Tensor,
    head_map: Tensor,
    query_start: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    scale: float,
    tile: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Logits of every tile over its selected keys and its diagonal tile, a block of tiles at a time.

    Yields (row, real) as `_tile_rows`, the keys' slots int64 [B, G, tiles * N, 1] and their logits
    [B, G, tiles, R, W, N], -inf where a query does not see the key.
    """
    batch, heads, queries, size = q.shape
    groups, slots = k.shape[1], k.shape[2]
    tiles = indices.shape[2]
    mapped = indices[:, head_map.long()]
    packed = heads // groups * min(tile, queries)
    step = steps(q.device, batch * groups * (indices.shape[-1] + tile) * max(size, packed))
    within = torch.arange(tile, device=q.device)
    for begin in range(0, tiles, step):
        count = min(step, tiles - begin)
        row, real, begins = _tile_rows(query_start, kv_start, kv_len, queries, tile, begin, count)
        if not bool(real.any()):
            continue
        block_counts = counts[:, begin : begin + count]
        width = int(block_counts.max())
        used = (torch.arange(width, device=q.device) < block_counts[..., None])[:, None]
        # What is not used or behind the row is gathered from a slot of the row, which is no NaN.
        first, last = (x.long()[:, None, None, None] for x in (kv_start, kv_start + kv_len - 1))
        chosen = torch.where(used, mapped[:, :, begin : begin + count, :width], first)
        diagonal = torch.minimum((begins[..., None] + within)[:, None], last).expand(-1, groups, -1, -1)
        slot = torch.cat([chosen, diagonal], -1).clamp(0, slots - 1).flatten(2)[..., None]
        keys = wide(k.gather(2, slot.expand(-1, -1, -1, size))).unflatten(2, (count, -1))
        logits = (_take_rows(q, row, groups) * scale) @ keys.transpose(-1, -2)
        place = (row + query_start.long()[:, None, None] - begins[..., None])[..., None]  # of a query in its tile
        seen = torch.cat([used[:, 0, :, None].expand(-1, -1, row.shape[2], -1), place >= within], -1)
        logits = logits.unflatten(3, (heads // groups, -1)).masked_fill_(~seen[:, None, :, None], float("-inf"))
        yield row, real, slot, logits


def prefill_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    head_map: Tensor,
    query_start: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    tile: int,
    block_table: Tensor | None = None,
    query_start_loc: Tensor | None = None,
) -> Tensor:
    """Attention of each tile over its selected keys plus its own diagonal tile, causally (paper, section 3.1).

    q [B, H, T, D]; k, v [B, G, S, D]; indices int32 [B, G2, NT, K] of slots before the tile; counts int32 [B, NT];
    head_map int32 [G]: KV head g reads indices[:, head_map[g]]. Returns [B, H, T, D]; zeros for padding. Ragged:
    indices [G2, NT, K], counts [NT], [N, H, D] (see `kernels.ragged`).
    """
    if is_ragged("prefill_sparse", block_table, query_start_loc):
        chosen, lengths = (indices, counts, head_map), (query_start, kv_start, kv_len)
        where = {"block_table": block_table, "query_start_loc": query_start_loc}
        return ragged.sparse("prefill_sparse", prefill_sparse, q, k, v, chosen, lengths, scale, tile, **where)
    batch, heads, queries, _ = q.shape
    out = q.new_zeros(batch, heads, queries, v.shape[-1])
    lengths = (query_start, kv_start, kv_len)
    for row, real, slot, logits in _sparse_blocks(q, k, indices, counts, head_map, *lengths, scale, tile):
        values = wide(v.gather(2, slot.expand(-1, -1, -1, v.shape[-1]))).unflatten(2, (logits.shape[2], -1))
        # A row that is no query may see nothing and become NaN; it is not written.
        result = (torch.softmax(logits, -1).flatten(3, 4) @ values).unflatten(3, logits.shape[3:5])
        _put_rows(out, row, real, result.transpose(2, 3).flatten(1, 2).flatten(2, 3).to(q.dtype))
    return out


def prefill_sparse_lse(
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    counts: Tensor,
    head_map: Tensor,
    query_start: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    tile: int,
    block_table: Tensor | None = None,
    query_start_loc: Tensor | None = None,
) -> Tensor:
    """Log-sum-exp over the keys that `prefill_sparse` attends to: never above that of `prefill_dense`.

    Arguments as there. Returns float32 [B, H, T] (ragged: [H, N]) in natural log, -inf for padding.
    """
    if is_ragged("prefill_sparse_lse", block_table, query_start_loc):
        chosen, lengths = (indices, counts, head_map), (query_start, kv_start, kv_len)
        where = {"block_table": block_table, "query_start_loc": query_start_loc}
        return ragged.sparse(
            "prefill_sparse_lse", prefill_sparse_lse, q, k, None, chosen, lengths, scale, tile, **where
        )
    out = torch.full(q.shape[:3], float("-inf"), dtype=wide(q).dtype, device=q.device)
    lengths = (query_start, kv_start, kv_len)
    for row, real, _, logits in _sparse_blocks(q, k, indices, counts, head_map, *lengths, scale, tile):
        _put_rows(out, row, real, torch.logsumexp(logits, -1).transpose(2, 3).flatten(1, 2).flatten(2, 3))
    return out


def _put_rows(out: Tensor, row: Tensor, real: Tensor, result: Tensor) -> None:
    """Writes result [B, H, tiles * W, ...] to rows [B, tiles, W] of out [B, H, T, ...] where they are real."""
    batch, where = real.flatten(1).nonzero(as_tuple=True)
    out[batch, :, row.flatten(1)[batch, where]] = result[batch, :, where]
