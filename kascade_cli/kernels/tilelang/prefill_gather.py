"""What the producer warpgroup of the sparse prefill kernels does, as TileLang macros."""

from typing import Any

import tilelang.language as T


def tile_macros(head_dim: int, group: int, heads: int, tile: int, keys: int, page: int = 0) -> tuple[Any, Any, Any]:
    """(load_queries, list_slots, gather) for tiles of `tile` queries x `heads` heads and blocks of `keys` keys.

    `t` is the thread within the producer warpgroup. All copies are cp.async of 16 bytes; `row` holds the slots of the
    keys that a thread copies: of the row or, with `page`, of the pages one after the other, row `source` of the table.
    """
    lanes = head_dim // 8  # threads that copy one row
    step = 128 // lanes  # rows copied at once
    passes = keys // step

    @T.macro
    def load_queries(Q, Qs, b, g, q0: T.Ref, end: T.Ref, h0: T.Ref, t):
        # Rows that are no query of the row, or heads past the group, repeat another: they are not written.
        for i in T.serial(tile * heads // step):
            T.ptx_cp_async(
                T.access_ptr(Qs[i * step + t // lanes, t % lanes * 8], "w", 8),
                T.access_ptr(
                    Q[
                        b,
                        T.max(T.min(q0 + (i * step + t // lanes) // heads, end - 1), 0),
                        g * group + T.min(h0 + (i * step + t // lanes) % heads, group - 1),
                        t % lanes * 8,
                    ],
                    "r",
                    8,
                ),
                8,
            )

    @T.macro
    def list_slots(
        indices,
        table,
        row,
        b,
        hm: T.Ref,
        tile_index: T.Ref,
        k,
        used: T.Ref,
        edge: T.Ref,
        lo: T.Ref,
        last: T.Ref,
        source,
        t,
    ):
        # The tile's own slots come first, then its selection. Slots outside of [lo, last] are no row's and may hold
        # NaN; an entry of -1 is read where nothing is selected.
        for i in T.unroll(passes):
            row[i] = indices[b, hm, tile_index, T.max(T.min(k * keys + i * step + t // lanes, used - 1) - tile, 0)]
        for i in T.unroll(passes):
            row[i] = T.max(
                T.min(
                    T.if_then_else(
                        k * keys + i * step + t // lanes < tile, edge + k * keys + i * step + t // lanes, row[i]
                    ),
                    last,
                ),
                lo,
            )
        if page:
            for i in T.unroll(passes):
                row[i] = table[source, row[i] // page] * page + row[i] % page

    @T.macro
    def gather(Cache, ring, stage, row, b, g, t):
        for i in T.unroll(passes):
            if page:
                T.ptx_cp_async(
                    T.access_ptr(ring[stage, i * step + t // lanes, t % lanes * 8], "w", 8),
                    T.access_ptr(Cache[row[i], g, t % lanes * 8], "r", 8),
                    8,
                )
            else:
                T.ptx_cp_async(
                    T.access_ptr(ring[stage, i * step + t // lanes, t % lanes * 8], "w", 8),
                    T.access_ptr(Cache[b, g, row[i], t % lanes * 8], "r", 8),
                    8,
                )

    return load_queries, list_slots, gather
