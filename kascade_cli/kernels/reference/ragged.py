"""Ragged prefill over pages (see `kernels.ragged`): every row alone, through the padded op on its gathered keys."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError
from kascade_cli.kernels.ragged import check_ragged, check_tiles, tile_base, tile_room
from kascade_cli.kernels.reference.common import wide
from kascade_cli.kernels.reference.decode import gather_pages

Lengths = tuple[Tensor, Tensor, Tensor]  # query_start, kv_start, kv_len


class Row(NamedTuple):
    """One sequence: `tokens` of q; q [1, H, T, D], k, v [1, G, kv_len, D] and lengths as the padded op reads them.

    Its queries are in `tiles` tiles, whose numbers begin at `base`.
    """

    tokens: slice
    q: Tensor
    k: Tensor
    v: Tensor | None
    lengths: Lengths
    base: int
    tiles: int


def rows(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    lengths: Lengths,
    block_table: Tensor,
    query_start_loc: Tensor,
    tile: int = 1,
) -> Iterator[Row]:
    """Every row that has queries and keys. It waits for the device. Raises KascadeError for what does not fit."""
    check_ragged(op, q, k, v, lengths, block_table, query_start_loc)
    starts, begins, counts = (x.tolist() for x in lengths)
    bounds, bases = query_start_loc.tolist(), tile_base(query_start_loc, tile).tolist()
    if any(begins):
        raise KascadeError(f"{op}: kv_start is {begins}: rows of a paged cache begin at their first page")
    if bounds[0] or sorted(bounds) != bounds or bounds[-1] > len(q):
        raise KascadeError(f"{op}: query_start_loc {bounds} must rise from 0 to at most {len(q)} tokens")
    if any(count > block_table.shape[1] * k.shape[1] for count in counts):
        raise KascadeError(f"{op}: rows of {counts} keys do not fit {block_table.shape[1]} pages of {k.shape[1]}")
    for b, (begin, end) in enumerate(pairwise(bounds)):
        count = counts[b]
        if begin == end or not count:
            continue
        table = block_table[b : b + 1, : -(-count // k.shape[1])]
        keys, values = (None if x is None else gather_pages(x, table)[:, :, :count] for x in (k, v))
        mine = tuple(x[b : b + 1] for x in lengths)
        touched = (starts[b] + end - begin - 1) // tile - starts[b] // tile + 1
        queries = q[begin:end].transpose(0, 1)[None]
        yield Row(slice(begin, end), queries, keys, values, mine, bases[b], touched)


def dense(
    run: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor | None, lengths: Lengths, scale: float, **pages: Tensor
) -> tuple[Tensor | None, Tensor]:
    """`prefill_dense`, ragged; `run` is the padded one."""
    out = None if v is None else q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=wide(q).dtype, device=q.device)
    for row in rows("prefill_dense", q, k, v, lengths, **pages):
        found, norm = run(row.q, row.k, row.v, *row.lengths, scale=scale)
        lse[:, row.tokens] = norm[0]
        if out is not None:
            out[row.tokens] = found[0].transpose(0, 1)
    return out, lse


def score(
    run: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    lengths: Lengths,
    scale: float,
    tile: int,
    first: int,
    tiles: int | None,
    **pages: Tensor,
) -> Tensor:
    """`prefill_score`, ragged; `run` is the padded one. Zero where scores are undefined."""
    table = pages["block_table"]
    tiles = tile_room(len(q), len(table), tile) - first if tiles is None else tiles
    out = torch.zeros(k.shape[2], tiles, table.shape[1] * k.shape[1], dtype=wide(q).dtype, device=q.device)
    for row in rows("prefill_score", q, k, None, lengths, **pages, tile=tile):
        low, high = max(first, row.base), min(first + tiles, row.base + row.tiles)
        if low < high:
            norm = None if lse is None else lse[None, :, row.tokens]
            part = {"first": low - row.base, "tiles": high - low}
            found = run(row.q, row.k, norm, *row.lengths, scale=scale, tile=tile, **part)
            out[:, low - first : high - first, : found.shape[-1]] = found[0]
    return out


def sparse(
    op: str,
    run: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    selection: tuple[Tensor, Tensor, Tensor],
    lengths: Lengths,
    scale: float,
    tile: int,
    **pages: Tensor,
) -> Tensor:
    """`prefill_sparse` or, without v, `prefill_sparse_lse`, ragged; `run` is the padded one.

    selection: indices, counts, head_map.
    """
    indices, counts, head_map = selection
    check_tiles(op, len(q), len(pages["block_table"]), tile, indices, counts)
    if v is None:
        out = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=wide(q).dtype, device=q.device)
    else:
        out = q.new_zeros(*q.shape[:2], v.shape[-1])
    for row in rows(op, q, k, v, lengths, **pages, tile=tile):
        here = slice(row.base, row.base + row.tiles)
        keys = (row.q, row.k) if v is None else (row.q, row.k, row.v)
        found = run(*keys, indices[None, :, here], counts[None, here], head_map, *row.lengths, scale=scale, tile=tile)[
            0
        ]
        if v is None:
            out[:, row.tokens] = found
        else:
            out[row.tokens] = found.transpose(0, 1)
    return out
