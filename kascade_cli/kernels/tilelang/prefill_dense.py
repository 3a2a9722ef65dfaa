"""prefill_dense on Hopper: dense causal attention with its log-sum-exp, or the log-sum-exp alone (`prefill_lse`)."""

import math

import tilelang.language as T
import torch
from torch import Tensor

from kascade_cli.kernels.contract import LOG2E
from kascade_cli.kernels.tilelang.compile import kernel, require_hopper
from kascade_cli.kernels.tilelang.prefill_common import allocate, check, views
from kascade_cli.kernels.tilelang.prefill_lse import KEYS, LOWEST, lse_kernel
from kascade_cli.kernels.tilelang.prefill_paged import block_finder, page_loader

CONSUMERS = 256  # two warpgroups, 64 rows each


@kernel(tl__disable_safe_memory_legalize=True, tl__disable_buffer_init_check=True)
def dense_kernel(dtype: str, head_dim: int, page: int = 0, stages: int = 2):
    """Attention of 128 queries of one head per CTA, from the diagonal backwards; pages as in `lse_kernel`.

    QK of the next block and PV of the last one are issued together; the softmax runs while PV does (FlashAttention-3).
    """
    f32, rows = "float32", 128
    policy = T.GemmWarpPolicy.FullRow
    B, G, S, H, NQ, L, R, MP = (T.dynamic(x) for x in ("B", "G", "S", "H", "NQ", "L", "R", "MP"))
    batch, cache = (1, (S, page, G, head_dim)) if page else (B, (B, G, S, head_dim))
    HQ = T.dynamic("HQ") if page else H  # ragged queries may be the front of longer rows
    place = block_finder(rows, KEYS, page) if page else None
    look, load = page_loader(page, KEYS, head_dim)

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
        Q: T.Tensor((batch, NQ, HQ, head_dim), dtype),
        K: T.Tensor(cache, dtype),
        V: T.Tensor(cache, dtype),
        table: T.Tensor((R, MP), "int32"),
        loc: T.Tensor((L,), "int32"),
        query_start: T.Tensor((B,), "int32"),
        kv_start: T.Tensor((B,), "int32"),
        kv_len: T.Tensor((B,), "int32"),
        Out: T.Tensor((batch, NQ, H, head_dim), dtype),
        lse: T.Tensor((batch, H, NQ), f32),
        scale: T.float32,
    ):
        blocks = NQ // rows + B + 1 if page else T.ceildiv(NQ, rows)
        with T.Kernel(blocks, H, batch, threads=CONSUMERS + 128) as (x, h, b):
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
            if page:
                entry = T.alloc_var("int32")
                at = T.alloc_var("int32")
                row = T.alloc_var("int32")
                end = T.alloc_var("int32")
                length = T.alloc_var("int32")
                last = T.alloc_var("int32")
            tx = T.get_thread_binding()
            kv = T.alloc_var("int32")
            q0 = T.alloc_var("int32")
            token = T.alloc_var("int32")
            lo = T.alloc_var("int32")
            n = T.alloc_var("int32")
            if page:
                kv = h // (H // G)
                place(
                    loc, query_start, kv_len, B, NQ, NQ // rows + B - x, tx % 32,
                    row, q0, end, token, length, last, n,
                )  # fmt: skip
            else:
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
                        if page:
                            look(table, entry, row, n - 1 - k, last, tx % 32)
                        T.barrier_wait(kfree[k % stages], ((k // stages) & 1) ^ 1)
                        if page:
                            load(K, Ks, k % stages, entry, at, kv, n - 1 - k, kfull)
                        else:
                            T.tma_copy(
                                K[b, kv, lo + (n - 1 - k) * KEYS : lo + (n - k) * KEYS, :],
                                Ks[k % stages, :, :],
                                barrier=kfull[k % stages],
                            )
                        T.barrier_arrive(kfull[k % stages])
                        T.barrier_wait(vfree[k % stages], ((k // stages) & 1) ^ 1)
                        if page:
                            load(V, Vs, k % stages, entry, at, kv, n - 1 - k, vfull)
                        else:
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
                    if n * KEYS > (length if page else kv_len[b]):
                        T.barrier_wait(vfull[0], 0)
                        for i, j in T.Parallel(KEYS, head_dim):
                            if (n - 1) * KEYS + i >= (length if page else kv_len[b]):
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
                    if q0 + i < (end if page else NQ):
                        Out[b, q0 + i, h, j] = T.if_then_else(token + i < (length if page else kv_len[b]), Qs[i, j], 0)
                for i in T.Parallel(rows):
                    if q0 + i < (end if page else NQ):
                        lse[b, h, q0 + i] = T.if_then_else(
                            token + i < (length if page else kv_len[b]),
                            (T.log2(total[i]) + peak[i] * scale) * math.log(2),
                            -T.infinity(f32),
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
    With pages they are [N, H, D] and [H, N]. Raises KascadeError for what the kernels do not take.
    """
    lengths, pages = (query_start, kv_start, kv_len), (block_table, query_start_loc)
    shape = check("prefill_dense", q, k, v, lengths, None, *pages)
    require_hopper(q.device)
    lse = torch.empty(shape.batch, shape.heads, shape.queries, dtype=torch.float32, device=q.device)
    out = None
    if v is not None:
        sizes = (shape.batch, shape.queries, shape.heads, shape.head_dim)
        out = allocate("prefill_dense", sizes, q.dtype, q.device, "prefill in smaller chunks")
    if not shape.rows:  # padding alone
        lse.fill_(float("-inf"))
        out = None if out is None else out.zero_()
    elif lse.numel():
        made = views(q, k, v, lengths, *pages)
        if out is None:
            lse_kernel(**shape.config())(made.q, made.k, *made.where, lse, scale * LOG2E)
        else:
            dense_kernel(**shape.config())(made.q, made.k, made.v, *made.where, out, lse, scale * LOG2E)
    if shape.page:
        return (None if out is None else out[0]), lse[0]
    return (None if out is None else out.transpose(1, 2)), lse
