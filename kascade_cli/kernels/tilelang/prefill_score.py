"""prefill_score on Hopper: tile-pooled post-softmax scores, one pass over the keys given the log-sum-exp."""

import tilelang.language as T
import torch
from torch import Tensor

from kascade_cli.errors import KascadeError
from kascade_cli.kernels.contract import LOG2E, tile_count
from kascade_cli.kernels.ragged import tile_room
from kascade_cli.kernels.tilelang.compile import kernel, require_hopper
from kascade_cli.kernels.tilelang.prefill_common import allocate, check, require, views
from kascade_cli.kernels.tilelang.prefill_dense import prefill_dense
from kascade_cli.kernels.tilelang.prefill_paged import page_loader, tile_finder

KEYS = 256  # keys per block
CONSUMERS = 512  # four warpgroups, 64 keys each


@kernel(tl__disable_safe_memory_legalize=True, tl__disable_buffer_init_check=True)
def score_kernel(
    dtype: str,
    head_dim: int,
    group: int,
    heads: int,
    tile: int,
    pair: bool,
    add: bool = False,
    page: int = 0,
    stages: int = 2,
):
    """Scores of two row blocks of `tile` queries x `heads` heads per CTA, which share every block of KEYS.

    pair: the row blocks are neighbouring tiles; otherwise two chunks of `heads` heads of one tile, added up.
    add: add to `scores` (the group's further heads) instead of overwriting. S^T = K Q^T, so that pooling sums along a
    row of the accumulator. Four consumer warpgroups with one accumulator each take the row blocks in turn: while some
    wait for the tensor cores, the others take exponentials. One WGMMA in the loop: with two, ptxas spills.
    page: keys in pages of so many slots under ragged rows (0: contiguous). Pairs begin at even numbers there, so that
    no two rows share one; where `first` is odd, the first pair begins before it.
    """
    rows, f32 = tile * heads, "float32"
    policy = T.GemmWarpPolicy.FullRow
    lanes = head_dim // 8
    step = 128 // lanes
    B, G, S, H, NQ, L, R, MP = (T.dynamic(x) for x in ("B", "G", "S", "H", "NQ", "L", "R", "MP"))
    batch, cache = (1, (S, page, G, head_dim)) if page else (B, (B, G, S, head_dim))
    HQ = T.dynamic("HQ") if page else H  # ragged queries may be the front of longer rows
    place = tile_finder(tile) if page else None
    look, take = page_loader(page, KEYS, head_dim)
    N = T.dynamic("N", "int64")

    @T.macro
    def load(Q, Qs, u, b, query, g, head, t, i):
        T.ptx_cp_async(
            T.access_ptr(Qs[u, i * step + t // lanes, t % lanes * 8], "w", 8),
            T.access_ptr(
                Q[b, query, g * group + T.min(head + (i * step + t // lanes) % heads, group - 1), t % lanes * 8],
                "r",
                8,
            ),
            8,
        )

    @T.macro
    def pool(acc, norm, total, scale, k):
        for i, j in T.Parallel(KEYS, rows):
            acc[i, j] = T.exp2(acc[i, j] * scale - norm[k, j])
        T.reduce_sum(acc, total, dim=1)

    def finite(value):
        return T.if_then_else(value < T.infinity(f32), value, T.infinity(f32))

    @T.prim_func
    def main(
        Q: T.Tensor((batch, NQ, HQ, head_dim), dtype),
        K: T.Tensor(cache, dtype),
        lse: T.Tensor((batch, H, NQ), f32),
        table: T.Tensor((R, MP), "int32"),
        loc: T.Tensor((L,), "int32"),
        query_start: T.Tensor((B,), "int32"),
        kv_start: T.Tensor((B,), "int32"),
        kv_len: T.Tensor((B,), "int32"),
        scores: T.Tensor((N,), f32),
        tiles: T.int32,
        width: T.int32,
        first: T.int32,
        head: T.int32,
        heads_end: T.int32,
        scale: T.float32,
    ):
        ahead = first % 2 if page and pair else 0
        with T.Kernel(T.ceildiv(tiles + ahead, 2) if pair else tiles, G, batch, threads=CONSUMERS + 128) as (x, g, b):
            Qs = T.alloc_shared((2, rows, head_dim), dtype)
            Ks = T.alloc_shared((stages, KEYS, head_dim), dtype)
            norm = T.alloc_shared((2, rows), f32)
            acc = T.alloc_fragment((KEYS, rows), f32)
            sum_a = T.alloc_fragment((KEYS,), f32)
            sum_b = T.alloc_fragment((KEYS,), f32)
            full = T.alloc_barrier([32] * stages)
            free = T.alloc_barrier([CONSUMERS] * stages)
            ready = T.alloc_barrier(128)
            if page:
                entry = T.alloc_var("int32")
                at = T.alloc_var("int32")
                row = T.alloc_var("int32")
                behind = T.alloc_var("int32")
                last = T.alloc_var("int32")
            tx = T.get_thread_binding()
            t = T.alloc_var("int32")
            lo = T.alloc_var("int32")
            edge = T.alloc_var("int32")
            q0 = T.alloc_var("int32")
            qb = T.alloc_var("int32")
            hb = T.alloc_var("int32")
            begin = T.alloc_var("int32")
            end = T.alloc_var("int32")
            before = T.alloc_var("int32")
            second = T.alloc_var("int32")
            n = T.alloc_var("int32")
            base = T.alloc_var("int64")
            t = ((T.ceildiv(tiles + ahead, 2) - 1 - x) * 2 - ahead) if pair else (tiles - 1 - x)
            if page:
                lo = 0
                place(
                    loc, query_start, kv_len, B, NQ, first + t, tx % 32, row, edge, q0, begin, end, behind, last
                )  # fmt: skip
                last = T.max(last, 0) // page
            else:
                lo = kv_start[b]
                edge = lo + (T.max(query_start[b] - lo, 0) // tile + first + t) * tile
                q0 = edge - query_start[b]
            qb = q0 + tile if pair else q0
            hb = head if pair else head + heads
            if not page:
                begin = T.max(lo - query_start[b], 0)
                end = T.min(lo + kv_len[b] - query_start[b], NQ)
            before = T.if_then_else(q0 < end and t >= 0 if page else q0 < end, edge - lo, 0)
            second = T.if_then_else(q0 + tile < end and t + 1 < tiles, edge + tile - lo, 0) if pair else 0
            n = T.ceildiv(T.max(before, second), KEYS)
            base = ((T.cast(b, "int64") * G + g) * tiles + t) * width + lo
            # Norms of the rows that are no query of this tile are inf: they pool nothing. So are those that are NaN:
            # such a query pools NaN at the keys whose logit is NaN or inf, and nothing at the others.
            if tx < rows:
                norm[0, tx] = T.infinity(f32)
                norm[1, tx] = T.infinity(f32)
                if q0 + tx // heads >= begin and q0 + tx // heads < end and head + tx % heads < heads_end:
                    norm[0, tx] = finite(lse[b, g * group + head + tx % heads, q0 + tx // heads] * LOG2E)
                if qb + tx // heads >= begin and qb + tx // heads < end and hb + tx % heads < heads_end:
                    norm[1, tx] = finite(lse[b, g * group + hb + tx % heads, qb + tx // heads] * LOG2E)
            T.sync_threads()
            if tx >= CONSUMERS:
                T.set_max_nreg(32, 0)
                if n > 0:
                    for i in T.serial(rows // step):
                        load(
                            Q,
                            Qs,
                            0,
                            b,
                            T.max(
                                T.min(q0 + (i * step + (tx - CONSUMERS) // lanes) // heads, end - 1),
                                begin if page else 0,
                            ),
                            g,
                            head,
                            tx - CONSUMERS,
                            i,
                        )
                        load(
                            Q,
                            Qs,
                            1,
                            b,
                            T.max(
                                T.min(qb + (i * step + (tx - CONSUMERS) // lanes) // heads, end - 1),
                                begin if page else 0,
                            ),
                            g,
                            hb,
                            tx - CONSUMERS,
                            i,
                        )
                    T.cp_async_barrier_noinc(ready)
                if tx < CONSUMERS + 32:
                    for k in T.serial(n):
                        if page:
                            look(table, entry, row, k, last, tx % 32)
                        T.barrier_wait(free[k % stages], ((k // stages) & 1) ^ 1)
                        if page:
                            take(K, Ks, k % stages, entry, at, g, k, full)
                        else:
                            T.tma_copy(
                                K[b, g, lo + k * KEYS : lo + (k + 1) * KEYS, :],
                                Ks[k % stages, :, :],
                                barrier=full[k % stages],
                            )
                        T.barrier_arrive(full[k % stages])
                elif not add and not page:
                    for i in T.serial(T.ceildiv(width, 96)):
                        slot = i * 96 + tx - (CONSUMERS + 32)
                        if slot < width and (slot < lo or slot >= lo + before):
                            scores[base + (slot - lo)] = 0
                    if pair and t + 1 < tiles:
                        for i in T.serial(T.ceildiv(width, 96)):
                            slot = i * 96 + tx - (CONSUMERS + 32)
                            if slot < width and (slot < lo or slot >= lo + second):
                                scores[base + width + (slot - lo)] = 0
            else:
                T.set_max_nreg(112, 1)
                if n > 0:
                    T.barrier_wait(ready, 0)
                    T.fence_proxy_async()
                    for s in T.serial(2 * n):
                        k = s // 2
                        u = s % 2
                        T.barrier_wait(full[k % stages], (k // stages) & 1)
                        T.wgmma_gemm(
                            Ks[k % stages, :, :], Qs[u, :, :], acc, transpose_B=True, clear_accum=True, policy=policy
                        )
                        T.wait_wgmma(0)
                        if u == 1:
                            T.barrier_arrive(free[k % stages])
                        pool(acc, norm, sum_b, scale, u)
                        if pair:
                            for i in T.Parallel(KEYS):
                                if k * KEYS + i < T.if_then_else(u == 0, before, second):
                                    scores[base + T.cast(u, "int64") * width + (k * KEYS + i)] = sum_b[i]
                        else:
                            if u == 1:
                                for i in T.Parallel(KEYS):
                                    if k * KEYS + i < before:
                                        if add:
                                            scores[base + (k * KEYS + i)] += sum_a[i] + sum_b[i]
                                        else:
                                            scores[base + (k * KEYS + i)] = sum_a[i] + sum_b[i]
                            T.copy(sum_b, sum_a)

    return main


def score_plan(group: int, tile: int) -> tuple[int, bool, int]:
    """How `group` heads are cut: (heads per row block of at most 128 rows, whether blocks are two tiles, launches)."""
    most = max(1, 128 // tile)
    if group <= most:
        return group, True, 1
    launches = -(-group // (2 * most))
    return -(-group // (2 * launches)), False, launches


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
    """Tile-pooled post-softmax scores; see `kascade_cli.kernels.reference.prefill_score`.

    q [B, H, T, D] (memory [B, T, H, D]); k [B, G, S, D]; lse float32 [B, H, T] from `prefill_dense`, or None to
    compute it. Returns float32 [B, G, tiles, S] for local tiles [first, first + tiles); with pages
    [G, tiles, S] for tile numbers. Raises KascadeError for what
    the kernels do not take, and when the scores do not fit: the caller then asks for fewer tiles at a time.
    """
    lengths, pages = (query_start, kv_start, kv_len), (block_table, query_start_loc)
    shape = check("prefill_score", q, k, None, lengths, tile, *pages)
    if lse is not None:
        norms = (shape.heads, shape.queries) if shape.page else (shape.batch, shape.heads, shape.queries)
        require("prefill_score", "lse", lse, norms, q.device, torch.float32)
    if tiles is None:
        room = tile_room(shape.queries, shape.rows, tile) if shape.page else tile_count(shape.queries, tile)
        tiles = room - first
    if first < 0 or tiles < 0:
        raise KascadeError(f"prefill_score: no tiles [{first}, {first + tiles})")
    require_hopper(q.device)
    paged = {"block_table": block_table, "query_start_loc": query_start_loc}
    if lse is None:
        lse = prefill_dense(q, k, None, *lengths, scale=scale, **paged)[1]
    sizes = (shape.batch, shape.kv_heads, tiles, shape.slots)
    scores = allocate("prefill_score", sizes, torch.float32, q.device, "score fewer tiles at a time")
    if scores.numel() == 0 or shape.queries == 0 or not shape.rows:
        return scores.zero_()[0] if shape.page else scores.zero_()
    heads, pair, launches = score_plan(shape.group, tile)
    made, norm = views(q, k, None, lengths, *pages), lse.contiguous().view(shape.batch, shape.heads, shape.queries)
    config = {**shape.config(), "group": shape.group, "heads": heads, "tile": tile, "pair": pair}
    for launch in range(launches):
        head = launch * 2 * heads
        score_kernel(**config, add=launch > 0)(
            made.q,
            made.k,
            norm,
            *made.where,
            scores.view(-1),
            tiles,
            shape.slots,
            first,
            head,
            min(head + 2 * heads, shape.group),
            scale * LOG2E,
        )
    return scores[0] if shape.page else scores
