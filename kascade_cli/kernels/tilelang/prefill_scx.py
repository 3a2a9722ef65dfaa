"""prefill_score on Hopper: tile-pooled post-softmax scores (method.md section 4), one pass over the keys given the log-sum-exp."""

import math

import tilelang.language as T
import torch

from kascade_cli.kernels.tilelang.compile import kernel

LOG2E = math.log2(math.e)
KEYS = 128


@kernel()
def score_kernel(dtype: str, head_dim: int, heads: int, group: int, tile: int, pair: bool, accumulate: bool, stages: int = 3):
    """Scores of two row blocks of `tile` queries x `heads` heads per CTA, which share every block of keys.

    pair=True: the blocks are two neighbouring tiles. pair=False: they are two chunks of `heads` heads of one tile, added up.
    accumulate=True: add to what is in `scores` (further heads of the group). S^T = K Q^T, so that pooling is a row sum.
    """
    rows, f32 = tile * heads, "float32"
    policy = T.GemmWarpPolicy.FullRow
    B, G, S, SS, H, NQ, NT = (T.dynamic(x) for x in ("B", "G", "S", "SS", "H", "NQ", "NT"))
    threads = 256
    chunks = head_dim // 8
    step = 128 // chunks

    @T.macro
    def pool(acc, norm, prob, total, scale):
        for i, j in T.Parallel(KEYS, rows):
            prob[i, j] = T.exp2(acc[i, j] * scale - norm[j])
        T.reduce_sum(prob, total, dim=1)

    @T.macro
    def store(scores, total, b, g, t, slot, edge):
        for i in T.Parallel(KEYS):
            if slot + i < edge:
                scores[b, g, t, slot + i] = total[i]

    @T.prim_func
    def main(
        Q: T.Tensor((B, NQ, H, head_dim), dtype), K: T.Tensor((B, G, S, head_dim), dtype), lse: T.Tensor((B, H, NQ), f32),
        query_start: T.Tensor((B,), "int32"), kv_start: T.Tensor((B,), "int32"), kv_len: T.Tensor((B,), "int32"),
        scores: T.Tensor((B, G, NT, SS), f32), first: T.int32, head: T.int32, last: T.int32, scale: T.float32,
    ):
        with T.Kernel(T.ceildiv(NT, 2) if pair else NT, G, B, threads=threads + 128) as (x, g, b):
            Qa = T.alloc_shared((rows, head_dim), dtype)
            Qb = T.alloc_shared((rows, head_dim), dtype)
            Ks = T.alloc_shared((stages, KEYS, head_dim), dtype)
            acc_a = T.alloc_fragment((KEYS, rows), f32)
            acc_b = T.alloc_fragment((KEYS, rows), f32)
            prob = T.alloc_fragment((KEYS, rows), f32)
            lse_a = T.alloc_fragment((rows,), f32)
            lse_b = T.alloc_fragment((rows,), f32)
            sum_a = T.alloc_fragment((KEYS,), f32)
            sum_b = T.alloc_fragment((KEYS,), f32)
            full = T.alloc_barrier([128] * stages)
            free = T.alloc_barrier([threads] * stages)
            ready = T.alloc_barrier(128)
            tx = T.get_thread_binding()
            t = T.alloc_var("int32")
            lo = T.alloc_var("int32")
            edge = T.alloc_var("int32")
            q0 = T.alloc_var("int32")
            qmax = T.alloc_var("int32")
            n = T.alloc_var("int32")
            t = ((T.ceildiv(NT, 2) - 1 - x) * 2) if pair else (NT - 1 - x)
            lo = kv_start[b]
            edge = lo + (T.max(query_start[b] - lo, 0) // tile + first + t) * tile
            q0 = edge - query_start[b]
            qmax = T.max(T.min(NQ, lo + kv_len[b] - query_start[b]) - 1, 0)
            n = T.ceildiv(edge + (tile if pair else 0) - lo, KEYS)
            if edge >= lo + kv_len[b] or q0 >= NQ:
                n = 0
            if tx >= threads:
                T.set_max_nreg(24, 0)
                if n > 0:
                    for i in T.serial(rows // step):
                        r = i * step + (tx - threads) // chunks
                        T.ptx_cp_async(
                            T.access_ptr(Qa[r, (tx - threads) % chunks * 8], "w", 8),
                            T.access_ptr(Q[b, T.max(T.min(q0 + r // heads, qmax), 0), T.min(head + r % heads + g * group, H - 1),
                                           (tx - threads) % chunks * 8], "r", 8), 8)
                        T.ptx_cp_async(
                            T.access_ptr(Qb[r, (tx - threads) % chunks * 8], "w", 8),
                            T.access_ptr(Q[b, T.max(T.min(q0 + (tile if pair else 0) + r // heads, qmax), 0),
                                           T.min(head + (0 if pair else heads) + r % heads + g * group, H - 1),
                                           (tx - threads) % chunks * 8], "r", 8), 8)
                    T.cp_async_barrier_noinc(ready)
                    for k in T.serial(n):
                        T.barrier_wait(free[k % stages], ((k // stages) & 1) ^ 1)
                        T.tma_copy(K[b, g, lo + k * KEYS:lo + (k + 1) * KEYS, :], Ks[k % stages, :, :], barrier=full[k % stages])
                        T.barrier_arrive(full[k % stages])
            else:
                T.set_max_nreg(240, 1)
                if n > 0:
                    for r in T.Parallel(rows):
                        lse_a[r] = lse[b, T.min(head + r % heads, last - 1) + g * group, T.max(T.min(q0 + r // heads, NQ - 1), 0)] * LOG2E
                        lse_b[r] = lse[b, T.min(head + (0 if pair else heads) + r % heads, last - 1) + g * group,
                                       T.max(T.min(q0 + (tile if pair else 0) + r // heads, NQ - 1), 0)] * LOG2E
                    for r in T.Parallel(rows):
                        if lse_a[r] < -1e30 or q0 + r // heads < 0 or q0 + r // heads >= NQ or head + r % heads >= last:
                            lse_a[r] = T.infinity(f32)
                        if lse_b[r] < -1e30 or q0 + (tile if pair else 0) + r // heads < 0 or q0 + (tile if pair else 0) + r // heads >= NQ or head + (0 if pair else heads) + r % heads >= last:
                            lse_b[r] = T.infinity(f32)
                    T.barrier_wait(ready, 0)
                    for kk in T.serial(n // 2):
                        k0 = kk * 2
                        k1 = kk * 2 + 1
                        T.barrier_wait(full[k0 % stages], (k0 // stages) & 1)
                        T.fence_proxy_async()
                        T.wgmma_gemm(Ks[k0 % stages, :, :], Qa, acc_a, transpose_B=True, clear_accum=True, policy=policy)
                        T.wgmma_gemm(Ks[k0 % stages, :, :], Qb, acc_b, transpose_B=True, clear_accum=True, policy=policy)
                        T.wait_wgmma(1)
                        pool(acc_a, lse_a, prob, sum_a, scale)
                        store(scores, sum_a, b, g, t, lo + k0 * KEYS, edge)
                        T.barrier_wait(full[k1 % stages], (k1 // stages) & 1)
                        T.wgmma_gemm(Ks[k1 % stages, :, :], Qa, acc_a, transpose_B=True, clear_accum=True, policy=policy)
                        T.wait_wgmma(1)
                        T.barrier_arrive(free[k0 % stages])
                        pool(acc_b, lse_b, prob, sum_b, scale)
                        if t + 1 < NT:
                            store(scores, sum_b, b, g, t + 1, lo + k0 * KEYS, edge + tile)
                        T.wgmma_gemm(Ks[k1 % stages, :, :], Qb, acc_b, transpose_B=True, clear_accum=True, policy=policy)
                        T.wait_wgmma(1)
                        pool(acc_a, lse_a, prob, sum_a, scale)
                        store(scores, sum_a, b, g, t, lo + k1 * KEYS, edge)
                        T.wait_wgmma(0)
                        T.barrier_arrive(free[k1 % stages])
                        pool(acc_b, lse_b, prob, sum_b, scale)
                        if t + 1 < NT:
                            store(scores, sum_b, b, g, t + 1, lo + k1 * KEYS, edge + tile)
    return main
