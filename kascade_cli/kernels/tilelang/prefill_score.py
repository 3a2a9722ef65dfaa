"""prefill_score on Hopper: tile-pooled post-softmax scores, one pass over the keys given the log-sum-exp."""

import tilelang.language as T
import torch
from torch import Tensor

from kascade_cli.errors import KascadeError
from kascade_cli.kernels.tilelang.arguments import LOG2E
from kascade_cli.kernels.tilelang.compile import kernel, require_hopper
from kascade_cli.kernels.tilelang.prefill_common import allocate, cache_view, check, queries_view, require
from kascade_cli.kernels.tilelang.prefill_dense import prefill_dense

KEYS = 128  # keys per block
CONSUMERS = 256  # two warpgroups, 64 keys each


@kernel(tl__disable_safe_memory_legalize=True, tl__disable_buffer_init_check=True)
def score_kernel(
    dtype: str,
    head_dim: int,
    group: int,
    heads: int,
    tile: int,
    pair: bool,
    add: bool = False,
    stages: int = 3,
    unroll: int = 2,
):
    """Scores of two row blocks of `tile` queries x `heads` heads per CTA, which share every block of keys.

    pair: the row blocks A and B are neighbouring tiles; otherwise two chunks of `heads` heads of one tile, added up.
    add: add to `scores` (the group's further heads) instead of overwriting. S^T = K Q^T, so that pooling sums along a
    row of the accumulator, and two tiles are two accumulators. While A is in the tensor cores, B's exponentials are
    taken; `unroll` key blocks between two full waits. Accumulators are written by WGMMA alone: ptxas serialises the
    WGMMAs otherwise.
    """
    rows, f32 = tile * heads, "float32"
    policy = T.GemmWarpPolicy.FullRow
    lanes = head_dim // 8  # threads that copy one row of Q, 16 bytes each
    step = CONSUMERS // lanes
    B, G, S, H, NQ = (T.dynamic(x) for x in ("B", "G", "S", "H", "NQ"))
    N = T.dynamic("N", "int64")

    @T.macro
    def pool(acc, norm, prob, total, scale):
        for i, j in T.Parallel(KEYS, rows):
            prob[i, j] = T.exp2(acc[i, j] * scale - norm[j])
        T.reduce_sum(prob, total, dim=1)

    @T.macro
    def load(Q, Qs, b, query, g, head, tx, i):
        T.ptx_cp_async(
            T.access_ptr(Qs[i * step + tx // lanes, tx % lanes * 8], "w", 8),
            T.access_ptr(
                Q[b, query, g * group + T.min(head + (i * step + tx // lanes) % heads, group - 1), tx % lanes * 8],
                "r",
                8,
            ),
            8,
        )

    @T.macro
    def store(scores, total_a, total_b, base, width, key, before, second):
        if pair:
            for i in T.Parallel(KEYS):
                if key + i < before:
                    scores[base + (key + i)] = total_a[i]
            for i in T.Parallel(KEYS):
                if key + i < second:
                    scores[base + width + (key + i)] = total_b[i]
        else:
            for i in T.Parallel(KEYS):
                if key + i < before:
                    if add:
                        scores[base + (key + i)] += total_a[i] + total_b[i]
                    else:
                        scores[base + (key + i)] = total_a[i] + total_b[i]

    @T.prim_func
    def main(
        Q: T.Tensor((B, NQ, H, head_dim), dtype),
        K: T.Tensor((B, G, S, head_dim), dtype),
        lse: T.Tensor((B, H, NQ), f32),
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
        with T.Kernel(T.ceildiv(tiles, 2) if pair else tiles, G, B, threads=CONSUMERS + 128) as (x, g, b):
            Qa = T.alloc_shared((rows, head_dim), dtype)
            Qb = T.alloc_shared((rows, head_dim), dtype)
            Ks = T.alloc_shared((stages, KEYS, head_dim), dtype)
            acc_a = T.alloc_fragment((KEYS, rows), f32)
            acc_b = T.alloc_fragment((KEYS, rows), f32)
            prob = T.alloc_fragment((KEYS, rows), f32)
            norm_a = T.alloc_fragment((rows,), f32)
            norm_b = T.alloc_fragment((rows,), f32)
            sum_a = T.alloc_fragment((KEYS,), f32)
            sum_b = T.alloc_fragment((KEYS,), f32)
            full = T.alloc_barrier([32] * stages)
            free = T.alloc_barrier([CONSUMERS] * stages)
            ready = T.alloc_barrier(CONSUMERS)
            tx = T.get_thread_binding()
            t = T.alloc_var("int32")
            lo = T.alloc_var("int32")
            edge = T.alloc_var("int32")  # slot of tile t's first token
            q0 = T.alloc_var("int32")  # its query, negative where the tile began before this chunk
            qb = T.alloc_var("int32")  # first query of row block B
            hb = T.alloc_var("int32")  # first head of row block B
            begin = T.alloc_var("int32")  # the row's queries are [begin, end)
            end = T.alloc_var("int32")
            before = T.alloc_var("int32")  # keys that tile t pools
            second = T.alloc_var("int32")  # keys that tile t + 1 pools
            n = T.alloc_var("int32")
            base = T.alloc_var("int64")  # of tile t's scores, at the row's first slot
            t = ((T.ceildiv(tiles, 2) - 1 - x) * 2) if pair else (tiles - 1 - x)
            lo = kv_start[b]
            edge = lo + (T.max(query_start[b] - lo, 0) // tile + first + t) * tile
            q0 = edge - query_start[b]
            qb = q0 + tile if pair else q0
            hb = head if pair else head + heads
            begin = T.max(lo - query_start[b], 0)
            end = T.min(lo + kv_len[b] - query_start[b], NQ)
            before = T.if_then_else(q0 < end, edge - lo, 0)
            second = T.if_then_else(q0 + tile < end and t + 1 < tiles, edge + tile - lo, 0) if pair else 0
            n = T.ceildiv(T.ceildiv(T.max(before, second), KEYS), unroll) * unroll
            base = ((T.cast(b, "int64") * G + g) * tiles + t) * width + lo
            if tx >= CONSUMERS:
                T.set_max_nreg(24, 0)
                if tx < CONSUMERS + 32:
                    for k in T.serial(n):
                        T.barrier_wait(free[k % stages], ((k // stages) & 1) ^ 1)
                        T.tma_copy(
                            K[b, g, lo + k * KEYS : lo + (k + 1) * KEYS, :],
                            Ks[k % stages, :, :],
                            barrier=full[k % stages],
                        )
                        T.barrier_arrive(full[k % stages])
                elif not add:
                    # The producer's idle warps zero the slots that are pooled by no query.
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
                T.set_max_nreg(240, 1)
                if n > 0:
                    # Rows outside the tile's queries and heads repeat its edge; their norm is inf below.
                    for i in T.unroll(rows // step):
                        load(
                            Q, Qa, b, T.max(T.min(q0 + (i * step + tx // lanes) // heads, end - 1), 0), g, head, tx, i
                        )
                        load(Q, Qb, b, T.max(T.min(qb + (i * step + tx // lanes) // heads, end - 1), 0), g, hb, tx, i)
                    T.cp_async_barrier_noinc(ready)
                    for r in T.Parallel(rows):
                        norm_a[r] = lse[
                            b,
                            g * group + T.min(head + r % heads, group - 1),
                            T.max(T.min(q0 + r // heads, end - 1), begin),
                        ]
                        norm_b[r] = lse[
                            b,
                            g * group + T.min(hb + r % heads, group - 1),
                            T.max(T.min(qb + r // heads, end - 1), begin),
                        ]
                    # Rows that are no query of this tile pool nothing: exp2(s - inf) = 0.
                    for r in T.Parallel(rows):
                        norm_a[r] = T.if_then_else(
                            q0 + r // heads >= begin and q0 + r // heads < end and head + r % heads < heads_end,
                            norm_a[r] * LOG2E,
                            T.infinity(f32),
                        )
                        norm_b[r] = T.if_then_else(
                            qb + r // heads >= begin and qb + r // heads < end and hb + r % heads < heads_end,
                            norm_b[r] * LOG2E,
                            T.infinity(f32),
                        )
                    T.barrier_wait(ready, 0)
                    T.fence_proxy_async()
                    for kk in T.serial(n // unroll):
                        for u in T.unroll(unroll):
                            k = kk * unroll + u
                            T.barrier_wait(full[k % stages], (k // stages) & 1)
                            T.wgmma_gemm(
                                Ks[k % stages, :, :], Qa, acc_a, transpose_B=True, clear_accum=True, policy=policy
                            )
                            if u > 0:
                                T.wait_wgmma(1)
                                T.barrier_arrive(free[(k - 1) % stages])
                                pool(acc_b, norm_b, prob, sum_b, scale)
                                store(scores, sum_a, sum_b, base, width, (k - 1) * KEYS, before, second)
                            T.wgmma_gemm(
                                Ks[k % stages, :, :], Qb, acc_b, transpose_B=True, clear_accum=True, policy=policy
                            )
                            T.wait_wgmma(1)
                            pool(acc_a, norm_a, prob, sum_a, scale)
                        T.wait_wgmma(0)
                        T.barrier_arrive(free[(kk * unroll + unroll - 1) % stages])
                        pool(acc_b, norm_b, prob, sum_b, scale)
                        store(scores, sum_a, sum_b, base, width, (kk * unroll + unroll - 1) * KEYS, before, second)

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
) -> Tensor:
    """Tile-pooled post-softmax scores; see `kascade_cli.kernels.reference.prefill_score`.

    q [B, H, T, D] (memory [B, T, H, D]); k [B, G, S, D]; lse float32 [B, H, T] from `prefill_dense`, or None to
    compute it. Returns float32 [B, G, tiles, S] for local tiles [first, first + tiles). Raises KascadeError for what
    the kernels do not take, and when the scores do not fit: the caller then asks for fewer tiles at a time.
    """
    shape = check("prefill_score", q, k, None, (query_start, kv_start, kv_len), tile)
    if lse is not None:
        require("prefill_score", "lse", lse, (shape.batch, shape.heads, shape.queries), q.device, torch.float32)
    tiles = -(-shape.queries // tile) + 1 - first if tiles is None else tiles
    if first < 0 or tiles < 0:
        raise KascadeError(f"prefill_score: no tiles [{first}, {first + tiles})")
    require_hopper(q.device)
    if lse is None:
        lse = prefill_dense(q, k, None, query_start, kv_start, kv_len, scale=scale)[1]
    sizes = (shape.batch, shape.kv_heads, tiles, shape.slots)
    scores = allocate("prefill_score", sizes, torch.float32, q.device, "score fewer tiles at a time")
    if scores.numel() == 0 or shape.queries == 0:
        return scores.zero_()
    heads, pair, launches = score_plan(shape.group, tile)
    lengths = (query_start.contiguous(), kv_start.contiguous(), kv_len.contiguous())
    queries, keys, norm = queries_view(q), cache_view(k), lse.contiguous()
    for launch in range(launches):
        run = score_kernel(
            dtype=shape.dtype,
            head_dim=shape.head_dim,
            group=shape.group,
            heads=heads,
            tile=tile,
            pair=pair,
            add=launch > 0,
        )
        head = launch * 2 * heads
        run(
            queries,
            keys,
            norm,
            *lengths,
            scores.view(-1),
            tiles,
            shape.slots,
            first,
            head,
            min(head + 2 * heads, shape.group),
            scale * LOG2E,
        )
    return scores
