"""prefill_sparse on Hopper: each tile of queries attends to its selected keys and, causally, to itself."""

import tilelang.language as T
from torch import Tensor

from kascade_cli.kernels.contract import LOG2E
from kascade_cli.kernels.tilelang.compile import kernel, require_hopper
from kascade_cli.kernels.tilelang.prefill_common import allocate, check, check_selection, views
from kascade_cli.kernels.tilelang.prefill_gather import tile_macros
from kascade_cli.kernels.tilelang.prefill_paged import tile_finder

LOWEST = -(2.0**30)


@kernel(tl__disable_safe_memory_legalize=True)
def sparse_kernel(
    dtype: str, head_dim: int, group: int, heads: int, tile: int, page: int = 0, keys: int = 128, stages: int = 2
):
    """One tile of `tile` queries x `heads` heads (64 or 128 rows) per CTA; heads past the group are dropped.

    A producer warpgroup gathers keys and values with cp.async, its row indices read before it waits for a free slot.
    The list of keys is the tile itself followed by the selection, so a padded last block is all that is wasted. QK of
    the next block and PV of the last one are issued together; the softmax runs while PV does.
    page: keys in pages of so many slots under ragged rows, the caches then [slots of all pages, G, D] (0: contiguous).
    """
    f32, rows = "float32", tile * heads
    consumers = rows * 2
    policy = T.GemmWarpPolicy.FullRow
    chunks = -(-group // heads)  # CTAs that share a tile
    load_queries, list_slots, gather = tile_macros(head_dim, group, heads, tile, keys, page)
    passes = keys * head_dim // (8 * 128)  # rows of a block that a producer thread copies a part of
    B, G, G2, S, H, NQ, NT, W = (T.dynamic(x) for x in ("B", "G", "G2", "S", "H", "NQ", "NT", "W"))
    L, R, MP = (T.dynamic(x) for x in ("L", "R", "MP"))
    batch, cache = (1, (S, G, head_dim)) if page else (B, (B, G, S, head_dim))
    HQ = T.dynamic("HQ") if page else H  # ragged queries may be the front of longer rows
    place = tile_finder(tile) if page else None

    @T.macro
    def update(logits, peak, old, decay, part, total, scale):
        T.copy(peak, old)
        T.reduce_max(logits, peak, dim=1, clear=False)
        for i in T.Parallel(rows):
            decay[i] = T.exp2((old[i] - peak[i]) * scale)
        for i, j in T.Parallel(rows, keys):
            logits[i, j] = T.exp2(logits[i, j] * scale - peak[i] * scale)
        T.reduce_sum(logits, part, dim=1)
        for i in T.Parallel(rows):
            total[i] = total[i] * decay[i] + part[i]

    @T.prim_func
    def main(
        Q: T.Tensor((batch, NQ, HQ, head_dim), dtype),
        K: T.Tensor(cache, dtype),
        V: T.Tensor(cache, dtype),
        indices: T.Tensor((batch, G2, NT, W), "int32"),
        counts: T.Tensor((batch, NT), "int32"),
        head_map: T.Tensor((G,), "int32"),
        table: T.Tensor((R, MP), "int32"),
        loc: T.Tensor((L,), "int32"),
        query_start: T.Tensor((B,), "int32"),
        kv_start: T.Tensor((B,), "int32"),
        kv_len: T.Tensor((B,), "int32"),
        Out: T.Tensor((batch, NQ, H, head_dim), dtype),
        scale: T.float32,
    ):
        # Tiles of one KV head run side by side, the heaviest first: its keys stay in L2.
        with T.Kernel(NT * chunks, G, batch, threads=consumers + 128) as (x, g, b):
            Qs = T.alloc_shared((rows, head_dim), dtype)
            Ks = T.alloc_shared((stages, keys, head_dim), dtype)
            Vs = T.alloc_shared((stages, keys, head_dim), dtype)
            acc = T.alloc_fragment((rows, keys), f32)
            prob = T.alloc_fragment((rows, keys), dtype)
            out = T.alloc_fragment((rows, head_dim), f32)
            peak = T.alloc_fragment((rows,), f32)
            old = T.alloc_fragment((rows,), f32)
            decay = T.alloc_fragment((rows,), f32)
            part = T.alloc_fragment((rows,), f32)
            total = T.alloc_fragment((rows,), f32)
            kfull = T.alloc_barrier([128] * stages)
            vfull = T.alloc_barrier([128] * stages)
            kfree = T.alloc_barrier([consumers] * stages)
            vfree = T.alloc_barrier([consumers] * stages)
            ready = T.alloc_barrier(128)
            row = T.alloc_local((passes,), "int32")
            if page:
                source = T.alloc_var("int32")  # row of the lengths and the table
                behind = T.alloc_var("int32")  # like end, but of the padding behind the rows too
            tx = T.get_thread_binding()
            t = T.alloc_var("int32")
            h0 = T.alloc_var("int32")  # first head, within the group
            lo = T.alloc_var("int32")
            edge = T.alloc_var("int32")  # slot of the tile's first token
            q0 = T.alloc_var("int32")  # its query, negative where the tile began before this chunk
            end = T.alloc_var("int32")  # queries before this one are the row's
            begin = T.alloc_var("int32")  # queries from this one are the row's
            covered = T.alloc_var("int32")  # like end, but not past the last tile there are indices for
            used = T.alloc_var("int32")  # keys of this tile
            last = T.alloc_var("int32")  # slot of the last token of the row
            n = T.alloc_var("int32")
            hm = T.alloc_var("int32")
            t = NT - 1 - x // chunks
            h0 = x % chunks * heads
            if page:
                lo = 0
                place(
                    loc, query_start, kv_len, B, NQ, t, tx % 32, source, edge, q0, begin, end, behind, last
                )  # fmt: skip
                hm = head_map[g]
            else:
                lo = kv_start[b]
                edge = lo + (T.max(query_start[b] - lo, 0) // tile + t) * tile
                q0 = edge - query_start[b]
                begin = T.max(lo - query_start[b], 0)
                end = T.min(lo + kv_len[b] - query_start[b], NQ)
                last = lo + kv_len[b] - 1
                hm = head_map[g]
                covered = T.min(end, q0 + (NT - t) * tile)
            used = T.max(T.min(counts[b, t], W), 0) + tile
            n = T.ceildiv(used, keys)
            if q0 >= end:
                n = 0
            if tx >= consumers:
                if consumers > 128:  # with one consumer warpgroup there are registers enough for all
                    T.set_max_nreg(72, 0)
                if n > 0:
                    load_queries(Q, Qs, b, g, q0, end, h0, tx - consumers)
                    T.cp_async_barrier_noinc(ready)
                    for k in T.serial(n):
                        list_slots(
                            indices,
                            table,
                            row,
                            b,
                            hm,
                            t,
                            k,
                            used,
                            edge,
                            lo,
                            last,
                            source if page else b,
                            tx - consumers,
                        )
                        T.barrier_wait(kfree[k % stages], ((k // stages) & 1) ^ 1)
                        gather(K, Ks, k % stages, row, b, g, tx - consumers)
                        T.cp_async_barrier_noinc(kfull[k % stages])
                        T.barrier_wait(vfree[k % stages], ((k // stages) & 1) ^ 1)
                        gather(V, Vs, k % stages, row, b, g, tx - consumers)
                        T.cp_async_barrier_noinc(vfull[k % stages])
            else:
                if consumers > 128:
                    T.set_max_nreg(216, 1)
                if n > 0:
                    T.fill(out, 0)
                    T.fill(total, 0)
                    T.fill(peak, LOWEST)
                    T.barrier_wait(ready, 0)
                    T.barrier_wait(kfull[0], 0)
                    T.fence_proxy_async()
                    T.wgmma_gemm(Qs, Ks[0, :, :], acc, transpose_B=True, clear_accum=True, policy=policy)
                    T.wait_wgmma(0)
                    T.barrier_arrive(kfree[0])
                    for i, j in T.Parallel(rows, keys):
                        acc[i, j] = T.if_then_else(
                            (j < tile and j <= i // heads) or (j >= tile and j < used), acc[i, j], -T.infinity(f32)
                        )
                    update(acc, peak, old, decay, part, total, scale)
                    T.copy(acc, prob)
                    for k in T.serial(n - 1):
                        T.barrier_wait(kfull[(k + 1) % stages], ((k + 1) // stages) & 1)
                        T.fence_proxy_async()
                        T.wgmma_gemm(
                            Qs, Ks[(k + 1) % stages, :, :], acc, transpose_B=True, clear_accum=True, policy=policy
                        )
                        T.barrier_wait(vfull[k % stages], (k // stages) & 1)
                        T.fence_proxy_async()
                        T.wgmma_gemm(prob, Vs[k % stages, :, :], out, policy=policy)
                        T.wait_wgmma(1)
                        T.barrier_arrive(kfree[(k + 1) % stages])
                        if (k + 2) * keys > used:
                            for i, j in T.Parallel(rows, keys):
                                acc[i, j] = T.if_then_else((k + 1) * keys + j < used, acc[i, j], -T.infinity(f32))
                        update(acc, peak, old, decay, part, total, scale)
                        T.wait_wgmma(0)
                        T.barrier_arrive(vfree[k % stages])
                        for i, j in T.Parallel(rows, head_dim):
                            out[i, j] *= decay[i]
                        T.copy(acc, prob)
                    T.barrier_wait(vfull[(n - 1) % stages], ((n - 1) // stages) & 1)
                    T.fence_proxy_async()
                    T.wgmma_gemm(prob, Vs[(n - 1) % stages, :, :], out, policy=policy)
                    T.wait_wgmma(0)
                    for i, j in T.Parallel(rows, head_dim):
                        out[i, j] /= total[i]
                    T.copy(out, Qs)
                    for i, h, j in T.Parallel(tile, heads, head_dim):
                        if q0 + i >= (begin if page else 0) and q0 + i < end and h0 + h < group:
                            Out[b, q0 + i, g * group + h0 + h, j] = Qs[i * heads + h, j]
                if page:
                    for i, h, j in T.Parallel(tile, heads, head_dim):
                        if q0 + i >= T.max(begin, end) and q0 + i < behind and h0 + h < group:
                            Out[b, q0 + i, g * group + h0 + h, j] = 0
                else:
                    # Other queries belong to no tile: the CTA that shares their position zeroes them.
                    for i, h, j in T.Parallel(tile, heads, head_dim):
                        if t * tile + i < NQ and (t * tile + i < begin or t * tile + i >= covered) and h0 + h < group:
                            Out[b, t * tile + i, g * group + h0 + h, j] = 0

    return main


def sparse_heads(group: int, tile: int) -> int:
    """Heads per CTA, so that tile * heads rows are 64 or 128; the fewest CTAs, then the fewest idle rows."""
    chunks = -(-group // max(1, 128 // tile))
    return 64 // tile if tile <= 64 and -(-group // chunks) * tile <= 64 else 128 // tile


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
    """Attention over selected keys plus the diagonal tile; see `kascade_cli.kernels.reference.prefill_sparse`.

    q [B, H, T, D] (memory [B, T, H, D]); k, v [B, G, S, D]; indices int32 [B, G2, NT, K] of slots; counts int32
    [B, NT]; head_map int32 [G] into G2. Returns [B, H, T, D] as a view of [B, T, H, D]; zeros for padding and for
    queries past tile NT. With pages: indices [G2, NT, K], counts [NT], [N, H, D].
    Raises KascadeError for what the kernels do not take.
    """
    lengths, pages = (query_start, kv_start, kv_len), (block_table, query_start_loc)
    shape = check("prefill_sparse", q, k, v, lengths, tile, *pages)
    indices, counts = check_selection("prefill_sparse", shape, tile, indices, counts, head_map, q.device)
    require_hopper(q.device)
    sizes = (shape.batch, shape.queries, shape.heads, shape.head_dim)
    out = allocate("prefill_sparse", sizes, q.dtype, q.device, "prefill in smaller chunks")
    if not shape.rows:  # padding alone
        out.zero_()
    elif out.numel():
        made, selection = views(q, k, v, lengths, *pages), (indices, counts, head_map)
        run = sparse_kernel(**shape.config(), group=shape.group, heads=sparse_heads(shape.group, tile), tile=tile)
        caches = (x.flatten(0, 1) if shape.page else x for x in (made.k, made.v))
        run(made.q, *caches, *(x.contiguous() for x in selection), *made.where, out, scale * LOG2E)
    return out[0] if shape.page else out.transpose(1, 2)
