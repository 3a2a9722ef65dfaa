"""The attention ops in plain PyTorch: the specification of every other backend, and the one that runs anywhere.

Shapes, used throughout
    B batch, H query heads, G KV heads, R = H // G heads of a group, T queries, S key slots, D head size,
    NT tiles, K the widest selection.
Sequences
    `kv_start`, `kv_len`, `query_start` are int32 tensors [B] on the device. Row b's keys are the slots
    [kv_start, kv_start + kv_len) of the cache; query i of row b sits at slot query_start + i and sees the row's slots
    up to its own. A query outside the row's slots is padding: it gives zeros and pools nothing. Slots that are no
    row's may hold anything, NaN too.
Tiles
    A token's index is slot - kv_start, and tile t holds the tokens [t * tile, (t + 1) * tile), so a left-padded row is
    tiled as if it ran alone. Local tile j of row b is tile `first_tile(...)[b] + j`; `tile_count(T, tile)` of them
    always suffice. A tile of which only some queries are present (chunked prefill) uses those.
Pooling is post-softmax (paper, section 3.2). Arithmetic is float32, or float64 for float64 inputs.
NaN
    Only what sees nothing becomes zero. A query that sees a NaN key, or is NaN, gives NaN output and log-sum-exp. It
    pools NaN at the keys at fault (their logit is NaN or +inf) and nothing at the others; NaN ranks above every score.
    So the keys at fault are chosen first, and attention over the selection is NaN where dense attention is. A NaN
    value makes the queries of its row (sparse: of its tile) NaN, those before it too.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kascade_cli.kernels.contract import LN2, first_tile, tile_count

# Elements of the largest temporary. Blocks of tiles are cut so that logits stay near it: nothing is T x S. On a CPU a
# block should stay in the cache, on a GPU it should fill the machine.
_BLOCK_ELEMENTS = 1 << 20
_GPU_BLOCKS = 16


def gather_pages(cache: Tensor, block_table: Tensor) -> Tensor:
    """A paged cache [P, page, G, D] through `block_table` [B, MP] as contiguous [B, G, MP * page, D]."""
    pages = cache[block_table.long()]
    return pages.flatten(1, 2).transpose(1, 2)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _steps(device: torch.device, elements: int) -> int:
    """How many units (tiles, queries) of `elements` logits make a block."""
    return max(1, _BLOCK_ELEMENTS * (1 if device.type == "cpu" else _GPU_BLOCKS) // elements)


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """[B, H, ...] -> [B, G, R, ...]."""
    return q.unflatten(1, (kv_heads, q.shape[1] // kv_heads))


def _slots(cache: Tensor, kv_start: Tensor, kv_len: Tensor) -> Tensor:
    """Which slots of [B, G, S, D] hold the row's keys, bool [B, S]."""
    slot = torch.arange(cache.shape[2], device=cache.device)
    return (slot >= kv_start[:, None]) & (slot < (kv_start + kv_len)[:, None])


def _softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where `mask`, zero elsewhere. Masks the logits in place."""
    hidden = ~mask
    return torch.softmax(logits.masked_fill_(hidden, float("-inf")), dim=-1).masked_fill_(hidden, 0.0)


def _blame(probability: Tensor, logits: Tensor) -> Tensor:
    """The probabilities with NaN only at the keys at fault, zero at the others of their query."""
    return probability.masked_fill(probability.isnan() & (logits < float("inf")), 0.0)


def _may_hold_nan(pooled: Tensor) -> bool:
    """Whether to look for keys at fault: not asked of a GPU, which would have to wait for the answer."""
    return pooled.device.type != "cpu" or bool(pooled.isnan().any())


def _pool(probability: Tensor, logits: Tensor) -> Tensor:
    """Probabilities [B, G, R, S] summed over the heads of each group."""
    pooled = probability.sum(2)
    return _blame(probability, logits).sum(2) if _may_hold_nan(pooled) else pooled


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
    logits = _grouped(_wide(q), k.shape[1]) @ _wide(k).transpose(-1, -2) * scale
    slots = _slots(k, kv_start, kv_len)[:, None]
    probability = _softmax(logits, slots[:, None])
    out = (probability @ _wide(v).masked_fill(~slots[..., None], 0.0)).flatten(1, 2).to(q.dtype)
    return out, (_pool(probability, logits) if scores else None)


def decode_score(
    q: Tensor,
    k: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    logits: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Post-softmax attention of one query per row, summed over the heads of each group (method: decode pooling).

    q [B, H, D]; k [B, G, S, D] or paged. Returns float32 [B, G, S]; zero outside the row's keys; sums to R.
    With `logits` also the scaled logits in log2 units, [B, G, S', R'] with S' >= S, R' >= R, valid for the row's keys
    and the group's heads: `decode_sparse` need not read K again. Their dtype and padding are the backend's.
    """
    if block_table is not None:
        k = gather_pages(k, block_table)
    raw = _grouped(_wide(q), k.shape[1]) @ _wide(k).transpose(-1, -2) * scale
    kept = raw.transpose(2, 3) / LN2 if logits else None  # the softmax masks in place
    scores = _pool(_softmax(raw, _slots(k, kv_start, kv_len)[:, None, None]), raw)
    return (scores, kept) if logits else scores


def select_topk(scores: Tensor, count: Tensor, start: Tensor, length: Tensor, *, max_count: int) -> Tensor:
    """The `count` highest-scoring slots among [start, start + length), NaN before all, ties to the lowest slot.

    scores [..., S], of any sign (`tilelang`: not negative); count, start, length int32, broadcastable to [...]. count
    is clamped to length. Slots that are not the row's may hold anything.
    Returns int32 [..., max_count], ascending; entries past the row's count are -1.
    """
    shape, width = scores.shape[:-1], scores.shape[-1]
    if not min(width, max_count):
        return torch.full((*shape, max_count), -1, dtype=torch.int32, device=scores.device)
    rows = scores.reshape(-1, width)
    start, length, count = (
        value.expand(shape).reshape(-1, 1) if value.dim() else value.expand(len(rows), 1)
        for value in (start, length, count)
    )
    slot = torch.arange(width, device=scores.device)
    inside = (slot >= start) & (slot < start + length)
    wanted = torch.minimum(count, inside.sum(-1, keepdim=True)).clamp_max(max_count)
    values = rows.masked_fill(~inside, float("-inf"))
    top = torch.topk(values, min(max_count, width), dim=-1).values  # NaN first
    threshold = top.gather(-1, (wanted - 1).clamp_min(0).long())
    above, equal = values > threshold, values == threshold
    if _may_hold_nan(top[..., :1]):
        broken, cut = values.isnan(), threshold.isnan()
        above, equal = above | (broken & ~cut), equal | (broken & cut)
    equal = equal & inside
    taken = above | (equal & (equal.cumsum(-1) <= wanted - above.sum(-1, keepdim=True)))
    taken &= wanted > 0
    row, column = taken.nonzero(as_tuple=True)
    out = torch.full((len(rows), max_count), -1, dtype=torch.int32, device=scores.device)
    out[row, taken.cumsum(-1)[row, column] - 1] = column.int()
    return out.reshape(*shape, max_count)


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
    values = _wide(v.gather(2, chosen.expand(-1, -1, -1, v.shape[-1])))
    if logits is None:
        keys = _wide(k.gather(2, chosen.expand(-1, -1, -1, k.shape[-1])))
        raw = _grouped(_wide(q), groups) @ keys.transpose(-1, -2) * scale
    else:
        known = logits[..., : q.shape[1] // groups]
        raw = _wide(known.gather(2, chosen.expand(-1, -1, -1, known.shape[-1]))).transpose(2, 3) * LN2
    used = (torch.arange(width, device=q.device) < counts[:, None])[:, None, None]
    values = values.masked_fill(~used.transpose(2, 3), 0.0)  # what a row of no keys gathers may be NaN
    return (_softmax(raw, used) @ values).flatten(1, 2).to(q.dtype)


def prefill_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    query_start: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
) -> tuple[Tensor | None, Tensor]:
    """Dense causal attention of T queries per row.

    q [B, H, T, D]; k, v [B, G, S, D] (v None: only the log-sum-exp).
    Returns (out [B, H, T, D] or None, log-sum-exp float32 [B, H, T] in natural log, -inf for padding).
    """
    batch, heads, queries, _ = q.shape
    groups, slots = k.shape[1], k.shape[2]
    keys, values = _wide(k).transpose(-1, -2), None
    if v is not None:
        values = _wide(v).masked_fill(~_slots(k, kv_start, kv_len)[:, None, :, None], 0.0)
    outs, sums = [], []
    step = _steps(q.device, batch * heads * slots)
    for begin in range(0, queries, step):
        block = _grouped(_wide(q[:, :, begin : begin + step]), groups).flatten(2, 3)
        slot = query_start[:, None] + torch.arange(begin, begin + block.shape[2] // (heads // groups), device=q.device)
        hidden = ~_causal(slot, kv_start, kv_len, slots)[:, None, None]
        logits = (block @ keys * scale).unflatten(2, (heads // groups, -1)).masked_fill_(hidden, float("-inf"))
        sums.append(torch.logsumexp(logits, dim=-1).flatten(1, 2))
        if values is not None:
            probability = torch.softmax(logits, dim=-1).masked_fill_(hidden, 0.0)
            out = (probability.flatten(2, 3) @ values).unflatten(2, (heads // groups, -1))
            out.masked_fill_(hidden.all(-1, keepdim=True), 0.0)  # a NaN value is no business of padding
            outs.append(out.flatten(1, 2).to(q.dtype))
    return (torch.cat(outs, 2) if outs else None), torch.cat(sums, 2)


def _causal(slot: Tensor, kv_start: Tensor, kv_len: Tensor, slots: int) -> Tensor:
    """Which keys each query sees, bool [B, T, S], for query slots [B, T]."""
    key = torch.arange(slots, device=slot.device)
    end = (kv_start + kv_len)[:, None, None]
    real = (slot >= kv_start[:, None]) & (slot < end[:, 0])
    return real[..., None] & (key >= kv_start[:, None, None]) & (key <= slot[..., None]) & (key < end)


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
    taken = _wide(q.gather(2, flat)).unflatten(2, row.shape[1:])
    return _grouped(taken, kv_heads).transpose(2, 3).flatten(3, 4)


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
) -> Tensor:
    """Post-softmax attention summed over each tile's queries and the group's heads (method: prefill pooling).

    q [B, H, T, D]; k [B, G, S, D]; lse float32 [B, H, T] from `prefill_dense`, or None to compute it here.
    Returns float32 [B, G, tiles, S] for local tiles [first, first + tiles): only slots of the row strictly before the
    tile are non-zero, while each query is normalised over its whole causal row. With an lse that lacks keys (see
    `prefill_sparse_lse`) a score may be +inf.
    """
    batch, heads, queries, _ = q.shape
    groups, slots = k.shape[1], k.shape[2]
    tiles = tile_count(queries, tile) - first if tiles is None else tiles
    keys = _wide(k).transpose(-1, -2)
    out = torch.zeros(batch, groups, tiles, slots, dtype=keys.dtype, device=q.device)
    step = _steps(q.device, batch * heads * min(tile, queries) * slots)
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
            norm = _grouped(lse.gather(2, flat).unflatten(2, row.shape[1:]), groups).transpose(2, 3)
            probability = torch.exp(logits - norm[..., None])
        probability = probability.masked_fill_(~real[:, None, :, None, :, None], 0.0)
        weight = real[:, None, :, None].expand(-1, groups, -1, heads // groups, -1).flatten(3).to(keys.dtype)
        pooled = (weight[..., None, :] @ probability.flatten(3, 4)).squeeze(3)
        if bool(pooled.isnan().any()):
            pooled = (weight[..., None, :] @ _blame(probability, logits).flatten(3, 4)).squeeze(3)
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
    step = _steps(q.device, batch * groups * (indices.shape[-1] + tile) * max(size, packed))
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
        keys = _wide(k.gather(2, slot.expand(-1, -1, -1, size))).unflatten(2, (count, -1))
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
) -> Tensor:
    """Attention of each tile over its selected keys plus its own diagonal tile, causally (paper, section 3.1).

    q [B, H, T, D]; k, v [B, G, S, D]; indices int32 [B, G2, NT, K] of slots before the tile; counts int32 [B, NT];
    head_map int32 [G]: KV head g reads indices[:, head_map[g]]. Returns [B, H, T, D]; zeros for padding.
    """
    batch, heads, queries, _ = q.shape
    out = q.new_zeros(batch, heads, queries, v.shape[-1])
    lengths = (query_start, kv_start, kv_len)
    for row, real, slot, logits in _sparse_blocks(q, k, indices, counts, head_map, *lengths, scale, tile):
        values = _wide(v.gather(2, slot.expand(-1, -1, -1, v.shape[-1]))).unflatten(2, (logits.shape[2], -1))
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
) -> Tensor:
    """Log-sum-exp over the keys that `prefill_sparse` attends to: never above that of `prefill_dense`.

    Arguments as there. Returns float32 [B, H, T] in natural log, -inf for padding.
    """
    out = torch.full(q.shape[:3], float("-inf"), dtype=_wide(q).dtype, device=q.device)
    lengths = (query_start, kv_start, kv_len)
    for row, real, _, logits in _sparse_blocks(q, k, indices, counts, head_map, *lengths, scale, tile):
        _put_rows(out, row, real, torch.logsumexp(logits, -1).transpose(2, 3).flatten(1, 2).flatten(2, 3))
    return out


def _put_rows(out: Tensor, row: Tensor, real: Tensor, result: Tensor) -> None:
    """Writes result [B, H, tiles * W, ...] to rows [B, tiles, W] of out [B, H, T, ...] where they are real."""
    batch, where = real.flatten(1).nonzero(as_tuple=True)
    out[batch, :, row.flatten(1)[batch, where]] = result[batch, :, where]
