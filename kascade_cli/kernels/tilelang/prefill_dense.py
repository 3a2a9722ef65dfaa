"""prefill_dense on Hopper: dense causal attention with its log-sum-exp, or the log-sum-exp alone (half the work)."""

import math

import tilelang.language as T
import torch
from torch import Tensor

from kascade_cli.kernels.contract import LOG2E, Unsupported
from kascade_cli.kernels.ragged import is_ragged
from kascade_cli.kernels.tilelang.compile import kernel, require_hopper
from kascade_cli.kernels.tilelang.prefill_common import allocate, cache_view, check, queries_view

KEYS = 128  # keys per block
CONSUMERS = 256  # of the dense kernel: two warpgroups, 64 rows each
LOWEST = -(2.0**30)  # running maximum of a row that has seen nothing: finite, so that exp2(-inf - LOWEST) is 0


@kernel(tl__disable_safe_memory_legalize=True, tl__disable_buffer_init_check=True)
def lse_kernel(dtype: str, head_dim: int, stages: int = 4):
    """Log-sum-exp of 256 queries of one head per CTA.

    Four consumer warpgroups with one accumulator each: while some of them wait for the tensor cores, the others take
    exponentials. (Two warpgroups with two accumulators each did not overlap: WGMMA is issued in order.)
    """
    f32, rows, consumers = "float32", 256, 512
    policy = T.GemmWarpPolicy.FullRow
    B, G, S, H, NQ = (T.dynamic(x) for x in ("B", "G", "S", "H", "NQ"))

    @T.prim_func
    def main(
        Q: T.Tensor((B, NQ, H, head_dim), dtype),
        K: T.Tensor((B, G, S, head_dim), dtype),
        query_start: T.Tensor((B,), "int32"),
        kv_start: T.Tensor((B,), "int32"),
        kv_len: T.Tensor((B,), "int32"),
        lse: T.Tensor((B, H, NQ), f32),
        scale: T.float32,
    ):
        with T.Kernel(T.ceildiv(NQ, rows), H, B, threads=consumers + 128) as (x, h, b):
            Qs = T.alloc_shared((rows, head_dim), dtype)
            Ks = T.alloc_shared((stages, KEYS, head_dim), dtype)
            acc = T.alloc_fragment((rows, KEYS), f32)
            peak = T.alloc_fragment((rows,), f32)
            old = T.alloc_fragment((rows,), f32)
            part = T.alloc_fragment((rows,), f32)
            total = T.alloc_fragment((rows,), f32)
            full = T.alloc_barrier([32] * stages)
            free = T.alloc_barrier([consumers] * stages)
            ready = T.alloc_barrier(32)
            tx = T.get_thread_binding()
            kv = T.alloc_var("int32")
            q0 = T.alloc_var("int32")
            token = T.alloc_var("int32")
            lo = T.alloc_var("int32")
            n = T.alloc_var("int32")
            q0 = (T.ceildiv(NQ, rows) - 1 - x) * rows
            lo = kv_start[b]
            kv = h // (H // G)
            token = query_start[b] + q0 - lo
            n = T.ceildiv(T.max(T.min(token + T.min(rows, NQ - q0), kv_len[b]), 0), KEYS)
            if token >= kv_len[b]:
                n = 0
            if tx >= consumers:
                T.set_max_nreg(32, 0)
                if tx < consumers + 32:
                    T.tma_copy(Q[b, q0 : q0 + rows, h, :], Qs, barrier=ready)
                    T.barrier_arrive(ready)
                    for k in T.serial(n):
                        T.barrier_wait(free[k % stages], ((k // stages) & 1) ^ 1)
                        T.tma_copy(
                            K[b, kv, lo + k * KEYS : lo + (k + 1) * KEYS, :],
                            Ks[k % stages, :, :],
                            barrier=full[k % stages],
                        )
                        T.barrier_arrive(full[k % stages])
            else:
                T.set_max_nreg(112, 1)
                T.fill(peak, LOWEST)
                T.fill(total, 0)
                T.barrier_wait(ready, 0)
                for k in T.serial(n):
                    T.barrier_wait(full[k % stages], (k // stages) & 1)
                    T.wgmma_gemm(Qs, Ks[k % stages, :, :], acc, transpose_B=True, clear_accum=True, policy=policy)
                    T.wait_wgmma(0)
                    T.barrier_arrive(free[k % stages])
                    if (k + 1) * KEYS > token + 1:
                        for i, j in T.Parallel(rows, KEYS):
                            acc[i, j] = T.if_then_else(k * KEYS + j <= token + i, acc[i, j], -T.infinity(f32))
                    T.copy(peak, old)
                    T.reduce_max(acc, peak, dim=1, clear=False)
                    for i, j in T.Parallel(rows, KEYS):
                        acc[i, j] = T.exp2(acc[i, j] * scale - peak[i] * scale)
                    T.reduce_sum(acc, part, dim=1)
                    for i in T.Parallel(rows):
                        total[i] = total[i] * T.exp2((old[i] - peak[i]) * scale) + part[i]
                for i in T.Parallel(rows):
                    if q0 + i < NQ:
                        lse[b, h, q0 + i] = T.if_then_else(
                            token + i < kv_len[b], (T.log2(total[i]) + peak[i] * scale) * math.log(2), -T.infinity(f32)
                        )

    return main


@kernel(tl__disable_safe_memory_legalize=True, tl__disable_buffer_init_check=True)
def dense_kernel(dtype: str, head_dim: int, stages: int = 2):
    """Attention of 128 queries of one head per CTA, from the diagonal backwards.

    QK of the next block and PV of the last one are issued together; the softmax runs while PV does (FlashAttention-3).
    """
    f32, rows = "float32", 128
    policy = T.GemmWarpPolicy.FullRow
    B, G, S, H, NQ = (T.dynamic(x) for x in ("B", "G", "S", "H", "NQ"))

    @T.macro
    def update(logits, peak, old, decay, part, total, scale):
        T.copy(peak, old)
        T.reduce_max(logits, peak, dim=1, clear=False)
        for i in T.Parallel(rows):
            decay[i] = T.exp2((old[i] - peak[i]) * scale)
        for i, j in T.Parallel(rows, KEYS):
            logits[i, j] = T.exp2(logits[i, j] * scale - peak[i] * scale)
        T.reduce_sum(logits, part, dim=1)
        for i in T.Parallel(rows):
            total[i] = total[i] * decay[i] + part[i]

    @T.macro
    def mask(logits, visible, key):
        for i, j in T.Parallel(rows, KEYS):
            logits[i, j] = T.if_then_else(key + j <= visible + i, logits[i, j], -T.infinity(f32))

    @T.prim_func
    def main(
        Q: T.Tensor((B, NQ, H, head_dim), dtype),
        K: T.Tensor((B, G, S, head_dim), dtype),
        V: T.Tensor((B, G, S, head_dim), dtype),
        query_start: T.Tensor((B,), "int32"),
        kv_start: T.Tensor((B,), "int32"),
        kv_len: T.Tensor((B,), "int32"),
        Out: T.Tensor((B, NQ, H, head_dim), dtype),
        lse: T.Tensor((B, H, NQ), f32),
        scale: T.float32,
    ):
        with T.Kernel(T.ceildiv(NQ, rows), H, B, threads=CONSUMERS + 128) as (x, h, b):
            Qs = T.alloc_shared((rows, head_dim), dtype)
            Ks = T.alloc_shared((stages, KEYS, head_dim), dtype)
            Vs = T.alloc_shared((stages, KEYS, head_dim), dtype)
            acc = T.alloc_fragment((rows, KEYS), f32)
            prob = T.alloc_fragment((rows, KEYS), dtype)
            out = T.alloc_fragment((rows, head_dim), f32)
            peak = T.alloc_fragment((rows,), f32)
            old = T.alloc_fragment((rows,), f32)
            decay = T.alloc_fragment((rows,), f32)
            part = T.alloc_fragment((rows,), f32)
            total = T.alloc_fragment((rows,), f32)
            kfull = T.alloc_barrier([32] * stages)
            vfull = T.alloc_barrier([32] * stages)
            kfree = T.alloc_barrier([CONSUMERS] * stages)
            vfree = T.alloc_barrier([CONSUMERS] * stages)
            ready = T.alloc_barrier(32)
            clean = T.alloc_barrier(CONSUMERS)
            tx = T.get_thread_binding()
            kv = T.alloc_var("int32")
            q0 = T.alloc_var("int32")
            token = T.alloc_var("int32")
            lo = T.alloc_var("int32")
            n = T.alloc_var("int32")
            q0 = (T.ceildiv(NQ, rows) - 1 - x) * rows
            lo = kv_start[b]
            kv = h // (H // G)
            token = query_start[b] + q0 - lo
            n = T.ceildiv(T.max(T.min(token + T.min(rows, NQ - q0), kv_len[b]), 0), KEYS)
            if token >= kv_len[b]:
                n = 0
            if tx >= CONSUMERS:
                T.set_max_nreg(24, 0)
                if tx < CONSUMERS + 32:
                    T.tma_copy(Q[b, q0 : q0 + rows, h, :], Qs, barrier=ready)
                    T.barrier_arrive(ready)
                    for k in T.serial(n):
                        T.barrier_wait(kfree[k % stages], ((k // stages) & 1) ^ 1)
                        T.tma_copy(
                            K[b, kv, lo + (n - 1 - k) * KEYS : lo + (n - k) * KEYS, :],
                            Ks[k % stages, :, :],
                            barrier=kfull[k % stages],
                        )
                        T.barrier_arrive(kfull[k % stages])
                        T.barrier_wait(vfree[k % stages], ((k // stages) & 1) ^ 1)
                        T.tma_copy(
                            V[b, kv, lo + (n - 1 - k) * KEYS : lo + (n - k) * KEYS, :],
                            Vs[k % stages, :, :],
                            barrier=vfull[k % stages],
                        )
                        T.barrier_arrive(vfull[k % stages])
            else:
                T.set_max_nreg(240, 1)
                T.fill(out, 0)
                T.fill(total, 0)
                T.fill(peak, LOWEST)
                T.barrier_wait(ready, 0)
                if n > 0:
                    T.barrier_wait(kfull[0], 0)
                    T.wgmma_gemm(Qs, Ks[0, :, :], acc, transpose_B=True, clear_accum=True, policy=policy)
                    T.wait_wgmma(0)
                    T.barrier_arrive(kfree[0])
                    # Slots behind the row may hold anything: a weight of 0 does not silence a NaN.
                    if n * KEYS > kv_len[b]:
                        T.barrier_wait(vfull[0], 0)
                        for i, j in T.Parallel(KEYS, head_dim):
                            if (n - 1) * KEYS + i >= kv_len[b]:
                                Vs[0, i, j] = 0
                        T.fence_proxy_async()
                        T.barrier_arrive(clean)
                        T.barrier_wait(clean, 0)
                    mask(acc, token, (n - 1) * KEYS)
                    update(acc, peak, old, decay, part, total, scale)
                    T.copy(acc, prob)
                    for k in T.serial(n - 1):
                        T.barrier_wait(kfull[(k + 1) % stages], ((k + 1) // stages) & 1)
                        T.wgmma_gemm(
                            Qs, Ks[(k + 1) % stages, :, :], acc, transpose_B=True, clear_accum=True, policy=policy
                        )
                        T.barrier_wait(vfull[k % stages], (k // stages) & 1)
                        T.wgmma_gemm(prob, Vs[k % stages, :, :], out, policy=policy)
                        T.wait_wgmma(1)
                        T.barrier_arrive(kfree[(k + 1) % stages])
                        if (n - 1 - k) * KEYS > token + 1:
                            mask(acc, token, (n - 2 - k) * KEYS)
                        update(acc, peak, old, decay, part, total, scale)
                        T.wait_wgmma(0)
                        T.barrier_arrive(vfree[k % stages])
                        for i, j in T.Parallel(rows, head_dim):
                            out[i, j] *= decay[i]
                        T.copy(acc, prob)
                    T.barrier_wait(vfull[(n - 1) % stages], ((n - 1) // stages) & 1)
                    T.wgmma_gemm(prob, Vs[(n - 1) % stages, :, :], out, policy=policy)
                    T.wait_wgmma(0)
                # Padding in front of the row sees nothing; everybody else keeps what they have, NaN too.
                for i, j in T.Parallel(rows, head_dim):
                    out[i, j] = T.if_then_else(token + i >= 0, out[i, j] / total[i], 0)
                T.copy(out, Qs)
                for i, j in T.Parallel(rows, head_dim):
                    if q0 + i < NQ:
                        Out[b, q0 + i, h, j] = T.if_then_else(token + i < kv_len[b], Qs[i, j], 0)
                for i in T.Parallel(rows):
                    if q0 + i < NQ:
                        lse[b, h, q0 + i] = T.if_then_else(
                            token + i < kv_len[b], (T.log2(total[i]) + peak[i] * scale) * math.log(2), -T.infinity(f32)
                        )

    return main


def prefill_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    query_start: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    block_table: Tensor | None = None,
    query_start_loc: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Dense causal attention of T queries per row; see `kascade_cli.kernels.reference.prefill_dense`.

    q [B, H, T, D] (memory [B, T, H, D]); k, v [B, G, S, D] bfloat16 or float16, v None for the log-sum-exp alone.
    Returns (out [B, H, T, D] as a view of [B, T, H, D], or None; log-sum-exp float32 [B, H, T]).
    Raises KascadeError for what the kernels do not take.
    """
    if is_ragged("prefill_dense", block_table, query_start_loc):
        raise Unsupported("prefill_dense: the kernels do not read pages")
    shape = check("prefill_dense", q, k, v, (query_start, kv_start, kv_len))
    require_hopper(q.device)
    lse = torch.empty(shape.batch, shape.heads, shape.queries, dtype=torch.float32, device=q.device)
    out = None
    if v is not None:
        sizes = (shape.batch, shape.queries, shape.heads, shape.head_dim)
        out = allocate("prefill_dense", sizes, q.dtype, q.device, "prefill in smaller chunks")
    if lse.numel():
        lengths = (query_start.contiguous(), kv_start.contiguous(), kv_len.contiguous())
        config = {"dtype": shape.dtype, "head_dim": shape.head_dim}
        if out is None:
            lse_kernel(**config)(queries_view(q), cache_view(k), *lengths, lse, scale * LOG2E)
        else:
            dense_kernel(**config)(queries_view(q), cache_view(k), cache_view(v), *lengths, out, lse, scale * LOG2E)
    return (None if out is None else out.transpose(1, 2)), lse
