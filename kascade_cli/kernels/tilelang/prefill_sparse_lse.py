"""prefill_sparse_lse on Hopper: log-sum-exp of each query over its tile's selected keys and, causally, its tile."""

import math

import tilelang.language as T
import torch
from torch import Tensor

from kascade_cli.kernels.contract import LOG2E
from kascade_cli.kernels.tilelang.compile import kernel, require_hopper
from kascade_cli.kernels.tilelang.prefill_common import check, check_selection, views
from kascade_cli.kernels.tilelang.prefill_gather import tile_macros
from kascade_cli.kernels.tilelang.prefill_paged import tile_finder
from kascade_cli.kernels.tilelang.prefill_sparse import LOWEST, sparse_heads


@kernel(tl__disable_safe_memory_legalize=True)
def sparse_lse_kernel(
    dtype: str, head_dim: int, group: int, heads: int, tile: int, page: int = 0, keys: int = 64, stages: int = 4
):
    """One tile of `tile` queries x `heads` heads (64 or 128 rows) per CTA, as in `prefill_sparse`, without values.

    Without them two CTAs fit on an SM: while one waits for its keys or the tensor cores, the other takes exponentials.
    Blocks of 64 keys keep the producer's row indices and the consumers' accumulator in the registers of half an SM.
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

    @T.prim_func
    def main(
        Q: T.Tensor((batch, NQ, HQ, head_dim), dtype),
        K: T.Tensor(cache, dtype),
        indices: T.Tensor((batch, G2, NT, W), "int32"),
        counts: T.Tensor((batch, NT), "int32"),
        head_map: T.Tensor((G,), "int32"),
        table: T.Tensor((R, MP), "int32"),
        loc: T.Tensor((L,), "int32"),
        query_start: T.Tensor((B,), "int32"),
        kv_start: T.Tensor((B,), "int32"),
        kv_len: T.Tensor((B,), "int32"),
        lse: T.Tensor((batch, H, NQ), f32),
        scale: T.float32,
    ):
        with T.Kernel(NT * chunks, G, batch, threads=consumers + 128) as (x, g, b):
            T.annotate_min_blocks_per_sm(2)
            Qs = T.alloc_shared((rows, head_dim), dtype)
            Ks = T.alloc_shared((stages, keys, head_dim), dtype)
            acc = T.alloc_fragment((rows, keys), f32)
            peak = T.alloc_fragment((rows,), f32)
            old = T.alloc_fragment((rows,), f32)
            part = T.alloc_fragment((rows,), f32)
            total = T.alloc_fragment((rows,), f32)
            full = T.alloc_barrier([128] * stages)
            free = T.alloc_barrier([consumers] * stages)
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
            used = T.alloc_var("int32")  # keys of this tile: itself, then the selection
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
                    T.set_max_nreg(40, 0)
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
                        T.barrier_wait(free[k % stages], ((k // stages) & 1) ^ 1)
                        gather(K, Ks, k % stages, row, b, g, tx - consumers)
                        T.cp_async_barrier_noinc(full[k % stages])
            else:
                if consumers > 128:
                    T.set_max_nreg(96, 1)
                if n > 0:
                    T.fill(total, 0)
                    T.fill(peak, LOWEST)
                    T.barrier_wait(ready, 0)
                    for k in T.serial(n):
                        T.barrier_wait(full[k % stages], (k // stages) & 1)
                        T.fence_proxy_async()
                        T.wgmma_gemm(Qs, Ks[k % stages, :, :], acc, transpose_B=True, clear_accum=True, policy=policy)
                        T.wait_wgmma(0)
                        T.barrier_arrive(free[k % stages])
                        if k * keys < tile or (k + 1) * keys > used:
                            for i, j in T.Parallel(rows, keys):
                                acc[i, j] = T.if_then_else(
                                    k * keys + j < used and (k * keys + j >= tile or k * keys + j <= i // heads),
                                    acc[i, j],
                                    -T.infinity(f32),
                                )
                        T.copy(peak, old)
                        T.reduce_max(acc, peak, dim=1, clear=False)
                        for i, j in T.Parallel(rows, keys):
                            acc[i, j] = T.exp2(acc[i, j] * scale - peak[i] * scale)
                        T.reduce_sum(acc, part, dim=1)
                        for i in T.Parallel(rows):
                            total[i] = total[i] * T.exp2((old[i] - peak[i]) * scale) + part[i]
                    for i in T.Parallel(rows):
                        if (
                            q0 + i // heads >= (begin if page else 0)
                            and q0 + i // heads < end
                            and h0 + i % heads < group
                        ):
                            lse[b, g * group + h0 + i % heads, q0 + i // heads] = (
                                T.log2(total[i]) + peak[i] * scale
                            ) * math.log(2)
                if page:
                    for i in T.Parallel(rows):
                        if (
                            q0 + i // heads >= T.max(begin, end)
                            and q0 + i // heads < behind
                            and h0 + i % heads < group
                        ):
                            lse[b, g * group + h0 + i % heads, q0 + i // heads] = -T.infinity(f32)
                else:
                    # Other queries belong to no tile: the CTA that shares their position writes them.
                    for i in T.Parallel(rows):
                        if (
                            t * tile + i // heads < NQ
                            and (t * tile + i // heads < begin or t * tile + i // heads >= covered)
                            and h0 + i % heads < group
                        ):
                            lse[b, g * group + h0 + i % heads, t * tile + i // heads] = -T.infinity(f32)

    return main


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
    """Log-sum-exp over selected keys and the diagonal tile; see `kascade_cli.kernels.reference.prefill_sparse_lse`.

    q [B, H, T, D] (memory [B, T, H, D]); k [B, G, S, D]; indices int32 [B, G2, NT, K] of slots; counts int32 [B, NT];
    head_map int32 [G] into G2. Returns float32 [B, H, T], -inf for padding and for queries past tile NT. With pages:
    indices [G2, NT, K], counts [NT], [H, N]. Raises KascadeError for what the kernels do not take.
    """
    lengths, pages = (query_start, kv_start, kv_len), (block_table, query_start_loc)
    shape = check("prefill_sparse_lse", q, k, None, lengths, tile, *pages)
    indices, counts = check_selection("prefill_sparse_lse", shape, tile, indices, counts, head_map, q.device)
    require_hopper(q.device)
    lse = torch.empty(shape.batch, shape.heads, shape.queries, dtype=torch.float32, device=q.device)
    if not shape.rows:  # padding alone
        lse.fill_(float("-inf"))
    elif lse.numel():
        made, selection = views(q, k, None, lengths, *pages), (indices, counts, head_map)
        run = sparse_lse_kernel(**shape.config(), group=shape.group, heads=sparse_heads(shape.group, tile), tile=tile)
        keys = made.k.flatten(0, 1) if shape.page else made.k
        run(made.q, keys, *(x.contiguous() for x in selection), *made.where, lse, scale * LOG2E)
    return lse[0] if shape.page else lse
