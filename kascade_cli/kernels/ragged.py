"""Prefill over a serving engine's batch: ragged rows of queries, keys in pages. What its callers and backends share.

The `prefill_*` ops take both forms, padded and ragged; `block_table` and `query_start_loc`, given together, make a
call ragged. Nothing is padded and no cache is gathered. Shapes, beside those of `reference`:

    q                  [N, H, D]           queries of all rows, one row after the other; tokens may be strided (a view
                                           of what an engine projects q, k and v into), heads are not
    k, v               [P, page, G, D]     pages of the cache (`page` a power of two from 16 to 256 in `tilelang`)
    block_table        int32 [B, MP]       slot s of row b is slot s % page of page block_table[b, s // page]; S below
                                           is MP * page, so cut the table to what the longest row needs
    query_start_loc    int32 [B + 1]       row b's queries are q[query_start_loc[b] : query_start_loc[b + 1]]; begins
                                           with 0, never falls. Tokens behind the last row are padding
    query_start        int32 [B]           slot of the row's first query: kv_len - its queries, of an engine
    kv_start           int32 [B]           zeros: a paged row begins at its first page. `tilelang` does not read it
    kv_len             int32 [B]           keys of the row, those of these queries included

    prefill_dense(q, k, v, query_start, kv_start, kv_len, *, scale, block_table, query_start_loc)
        -> (out [N, H, D] or None, log-sum-exp float32 [H, N])
    prefill_score(q, k, lse [H, N] or None, query_start, kv_start, kv_len, *, scale, tile, first, tiles, block_table,
                  query_start_loc) -> float32 [G, tiles, S]
    prefill_sparse(q, k, v, indices int32 [G2, NT, K], counts int32 [NT], head_map int32 [G], query_start, kv_start,
                   kv_len, *, scale, tile, block_table, query_start_loc) -> [N, H, D]
    prefill_sparse_lse(the same without v) -> float32 [H, N]

Padding gives zeros, and a log-sum-exp of -inf. Entries of the table past a row's pages are not followed.

Tiles are those of the padded form: tile t of a row holds its tokens [t * tile, (t + 1) * tile), wherever a chunk
begins, so that what a cached prefix chose does not depend on who wrote it. They are numbered through the batch: row b
takes the numbers from tile_base(...)[b], an even one, with room for all that its queries can touch; what is left over
is nobody's. `NT = tile_room(N, B, tile)` depends on shapes only, so nothing waits for the device:

    row, before = ragged_tiles(query_start_loc, query_start, kv_len, tile, N)    # int32 [NT] each, once a pass
    counts = k(before)                                                           # 0 for tiles that are nobody's
    _, lse = prefill_dense(q, k, None, ...)
    for here in blocks of tiles:
        scores = prefill_score(q, k, lse, ..., first=here.start, tiles=len(here))
        indices[:, here] = select_topk(scores, counts[here], zeros, before[here], max_count=K)

In ragged scores, slots that are not before the tile, and tiles that are nobody's, may hold anything: `select_topk`
does not look there.
"""

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError


def is_ragged(op: str, block_table: Tensor | None, query_start_loc: Tensor | None) -> bool:
    """Whether a call is ragged; KascadeError where only one of the two is given."""
    if (block_table is None) != (query_start_loc is None):
        raise KascadeError(f"{op}: block_table and query_start_loc go together: ragged queries over a paged cache")
    return block_table is not None


def check_ragged(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    lengths: tuple[Tensor, Tensor, Tensor],
    block_table: Tensor,
    query_start_loc: Tensor,
) -> None:
    """KascadeError, of one line, where shapes, dtypes or devices contradict each other. lengths: query_start,
    kv_start, kv_len."""
    if q.dim() != 3 or k.dim() != 4 or (v is not None and v.shape != k.shape):
        found = f"{list(q.shape)}, {list(k.shape)}" + ("" if v is None else f", {list(v.shape)}")
        raise KascadeError(f"{op}: ragged q, k, v are [N, H, D] and twice [P, page, G, D], not {found}")
    if k.shape[3] != q.shape[2] or not k.shape[2] or q.shape[1] % k.shape[2]:
        raise KascadeError(f"{op}: q {list(q.shape)} does not fit pages {list(k.shape)}")
    if block_table.dim() != 2 or not block_table.shape[1] or not k.shape[0] or not k.shape[1]:
        raise KascadeError(
            f"{op}: block_table is {list(block_table.shape)} over {k.shape[0]} pages of {k.shape[1]}: there must be "
            "at least one page, for an entry of [B, pages]"
        )
    rows = len(block_table)
    names = ("query_start", "kv_start", "kv_len")
    given = [(name, x, (rows,)) for name, x in zip(names, lengths, strict=True)]
    given += [
        ("query_start_loc", query_start_loc, (rows + 1,)),
        ("block_table", block_table, tuple(block_table.shape)),
    ]
    for name, x, shape in given:
        if x.shape != shape or x.dtype != torch.int32:
            raise KascadeError(f"{op}: {name} must be int32 {list(shape)}, not {str(x.dtype)[6:]} {list(x.shape)}")
    if any(x is not None and x.device != q.device for x in (k, v, *(x for _, x, _ in given))):
        raise KascadeError(f"{op}: q, k, v, lengths and tables must be on one device")


def tile_room(queries: int, rows: int, tile: int) -> int:
    """NT: numbers of tiles for `queries` tokens in `rows` rows, padding behind them included. Even."""
    return 2 * (queries // (2 * tile) + 2 * rows + 1)


def tile_base(query_start_loc: Tensor, tile: int) -> Tensor:
    """Number of each row's first tile and, last, the first that is no row's: int32 [B + 1], even.

    n queries touch at most n // (2 * tile) + 2 pairs of tiles, which is the least that is between two rows' bases.
    """
    row = torch.arange(len(query_start_loc), dtype=torch.int32, device=query_start_loc.device)
    return 2 * (query_start_loc // (2 * tile) + 2 * row)


def ragged_tiles(
    query_start_loc: Tensor, query_start: Tensor, kv_len: Tensor, tile: int, queries: int
) -> tuple[Tensor, Tensor]:
    """(row, keys before it) of every tile of N = `queries` tokens: int32 [NT] each, without waiting for the device.

    A tile that no query of a row is in has row B and nothing before it.
    """
    rows, device = len(query_start), query_start.device
    base = tile_base(query_start_loc, tile)
    number = torch.arange(tile_room(queries, rows, tile), dtype=torch.int32, device=device)
    row = torch.searchsorted(base[1:], number, right=True, out_int32=True)
    if not rows:
        return row, torch.zeros_like(row)
    at = row.clamp_max(rows - 1).long()
    before = (query_start[at] // tile + number - base[at]) * tile
    end = torch.minimum(query_start + query_start_loc.diff(), kv_len)[at]
    real = (row < rows) & (before < end) & (query_start_loc.diff()[at] > 0)
    return torch.where(real, row, rows), torch.where(real, before, 0)


def check_tiles(op: str, queries: int, rows: int, tile: int, indices: Tensor, counts: Tensor) -> None:
    """KascadeError unless a selection has an entry for every tile of N = `queries` tokens in `rows` rows."""
    room = tile_room(queries, rows, tile)
    if indices.dim() != 3 or indices.shape[1] != room or counts.shape != (room,):
        raise KascadeError(
            f"{op}: ragged indices and counts are [G2, {room}, K] and [{room}], not {list(indices.shape)} and "
            f"{list(counts.shape)}"
        )
