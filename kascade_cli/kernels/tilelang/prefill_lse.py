"""The log-sum-exp half of prefill_dense on Hopper: half of the work of attention."""

import math

import tilelang.language as T

from kascade_cli.kernels.tilelang.compile import kernel
from kascade_cli.kernels.tilelang.prefill_paged import block_finder, page_loader

KEYS = 128  # keys per block
LOWEST = -(2.0**30)  # running maximum of a row that has seen nothing: finite, so that exp2(-inf - LOWEST) is 0


@kernel(tl__disable_safe_memory_legalize=True, tl__disable_buffer_init_check=True)
def lse_kernel(dtype: str, head_dim: int, page: int = 0, stages: int = 4):
    """Log-sum-exp of 256 queries of one head per CTA; keys in pages of `page` slots under ragged rows, or contiguous.

    Four consumer warpgroups with one accumulator each: while some of them wait for the tensor cores, the others take
    exponentials. (Two warpgroups with two accumulators each did not overlap: WGMMA is issued in order.)
    """
    f32, rows, consumers = "float32", 256, 512
    policy = T.GemmWarpPolicy.FullRow
    B, G, S, H, NQ, L, R, MP = (T.dynamic(x) for x in ("B", "G", "S", "H", "NQ", "L", "R", "MP"))
    batch, cache = (1, (S, page, G, head_dim)) if page else (B, (B, G, S, head_dim))
    HQ = T.dynamic("HQ") if page else H  # ragged queries may be the front of longer rows
    place = block_finder(rows, KEYS, page) if page else None
    look, load = page_loader(page, KEYS, head_dim)

    @T.prim_func
    def main(
        Q: T.Tensor((batch, NQ, HQ, head_dim), dtype),
        K: T.Tensor(cache, dtype),
        table: T.Tensor((R, MP), "int32"),
        loc: T.Tensor((L,), "int32"),
        query_start: T.Tensor((B,), "int32"),
        kv_start: T.Tensor((B,), "int32"),
        kv_len: T.Tensor((B,), "int32"),
        lse: T.Tensor((batch, H, NQ), f32),
        scale: T.float32,
    ):
        blocks = NQ // rows + B + 1 if page else T.ceildiv(NQ, rows)
        with T.Kernel(blocks, H, batch, threads=consumers + 128) as (x, h, b):
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
            if tx >= consumers:
                T.set_max_nreg(32, 0)
                if tx < consumers + 32:
                    T.tma_copy(Q[b, q0 : q0 + rows, h, :], Qs, barrier=ready)
                    T.barrier_arrive(ready)
                    for k in T.serial(n):
                        if page:
                            look(table, entry, row, k, last, tx % 32)
                        T.barrier_wait(free[k % stages], ((k // stages) & 1) ^ 1)
                        if page:
                            load(K, Ks, k % stages, entry, at, kv, k, full)
                        else:
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
                    if q0 + i < (end if page else NQ):
                        lse[b, h, q0 + i] = T.if_then_else(
                            token + i < (length if page else kv_len[b]),
                            (T.log2(total[i]) + peak[i] * scale) * math.log(2),
                            -T.infinity(f32),
                        )

    return main
