"""How the prefill kernels find ragged rows and read pages (see `kernels.ragged`), as TileLang macros."""

from typing import Any

import tilelang.language as T

BOX = 64  # elements of a row that one TMA copy takes: what its swizzle spans


def row_finder(block: int, slack: int) -> Any:
    """A macro find(loc, B, x, lane, row): the row in [0, B] that work unit x belongs to, in every warp at once.

    Units are `block` queries wide; row j's begin at unit loc[j] // block + slack * j, those behind row B - 1 are
    nobody's. One load for up to 32 rows, and no list to prepare: a row's first unit depends on its first token alone.
    """

    @T.macro
    def find(loc, B, x, lane, row: T.Ref):
        row = 0
        for c in T.serial(T.ceildiv(B, 32)):
            row += T.warp_reduce_sum(
                T.if_then_else(
                    c * 32 + lane < B and loc[T.min(c * 32 + lane + 1, B)] // block + slack * (c * 32 + lane + 1) <= x,
                    1,
                    0,
                )
            )

    return find


def block_finder(rows: int, keys: int, page: int) -> Any:
    """A macro place(...) for kernels that take `rows` queries of one head: block x of the batch.

    It sets the row (of the lengths and the table), its first query q0 in Q, end: queries before this one are the
    row's, token: q0's position, length: keys of the row, last: its last page, and n: blocks of `keys` keys to read.
    Padding behind the rows has length 0.
    """
    find = row_finder(rows, 1)

    @T.macro
    def place(
        loc, query_start, kv_len, B, NQ, x, lane,
        row: T.Ref, q0: T.Ref, end: T.Ref, token: T.Ref, length: T.Ref, last: T.Ref, n: T.Ref,
    ):  # fmt: skip
        find(loc, B, x, lane, row)
        end = T.if_then_else(row < B, loc[T.min(row + 1, B)], NQ)
        q0 = loc[row] + (x - loc[row] // rows - row) * rows
        length = T.if_then_else(row < B, kv_len[T.min(row, B - 1)], 0)
        token = q0 - loc[row]
        row = T.min(row, B - 1)
        token += query_start[row]
        last = T.max(length - 1, 0) // page  # noqa: F841 - a T.Ref, as others below
        n = T.ceildiv(T.max(T.min(token + T.min(rows, end - q0), length), 0), keys)
        if token >= length or q0 >= end:
            n = 0  # noqa: F841

    return place


def tile_finder(tile: int) -> Any:
    """A macro place(...) for kernels that take tiles: number x of the batch.

    It sets the row (of the lengths and the table), edge: the slot of the tile's first token, q0: its query in Q (one
    of another row where the tile began before this chunk), begin and end: queries from and before these are the
    row's, behind: queries before this one are the row's or padding, and last: the slot of the row's last token.
    q0 >= end where no query is a real one.
    """
    find = row_finder(2 * tile, 2)

    @T.macro
    def place(
        loc, query_start, kv_len, B, NQ, x, lane,
        row: T.Ref, edge: T.Ref, q0: T.Ref, begin: T.Ref, end: T.Ref, behind: T.Ref, last: T.Ref,
    ):  # fmt: skip
        find(loc, B, x // 2, lane, row)
        begin = loc[row]
        behind = T.if_then_else(row < B, loc[T.min(row + 1, B)], NQ)
        edge = x - 2 * (begin // (2 * tile) + 2 * row)  # tiles from the row's first
        q0 = begin + edge * tile
        end = begin
        if row < B:
            q0 -= query_start[row] % tile
            edge += query_start[row] // tile
            end = T.min(behind, begin + kv_len[row] - query_start[row])
            if end <= begin:
                end = T.min(begin, q0)  # noqa: F841 - as above
        edge = edge * tile
        row = T.min(row, B - 1)
        last = kv_len[row] - 1  # noqa: F841

    return place


def page_loader(page: int, block: int, head_dim: int) -> tuple[Any, Any]:
    """(look, load): block k of `block` keys of a row, head g, by TMA from pages of `page` slots, in one warp.

    look(Table, entry, row, k, last, lane) reads the numbers of the block's pages before its place is free, a lane one:
    an array of them would cost a producer its registers. Past the row's last page, behind which the table may hold
    anything, it repeats that one. load(Cache, ring, stage, entry, at, g, k, full) copies; `at` is a variable for it.
    """
    part = min(page, block) if page else block
    parts = block // part

    @T.macro
    def look(Table, entry: T.Ref, row: T.Ref, k, last: T.Ref, lane):
        entry = Table[row, T.min((k * block + lane % parts * part) // page, last)]  # noqa: F841

    @T.macro
    def load(Cache, ring, stage, entry: T.Ref, at: T.Ref, g, k, full):
        for p in T.unroll(parts):
            at = T.shfl_sync(entry, p)
            for d in T.unroll(head_dim // BOX):
                T.tma_copy(
                    Cache[
                        at,
                        (k * block + p * part) % page : (k * block + p * part) % page + part,
                        g,
                        d * BOX : (d + 1) * BOX,
                    ],
                    ring[stage, p * part : (p + 1) * part, d * BOX : (d + 1) * BOX],
                    barrier=full[stage],
                )

    return look, load
