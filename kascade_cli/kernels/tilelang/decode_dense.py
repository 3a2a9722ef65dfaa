"""decode_dense: split-KV attention of one query per row; with `scores`, the pooled scores of layer 0's anchor as well.

K and V arrive by TMA in a warp-specialised pipeline; the group's heads are padded to WGMMA's 64 rows. Splits leave
normalised parts and log-sum-exps in log2 units; `merge` combines them, `pool` turns raw logits into scores.
"""

import tilelang.language as T
import torch
from torch import Tensor

from kascade_cli.kernels.contract import LOG2E
from kascade_cli.kernels.tilelang.arguments import check_decode, even_split_count
from kascade_cli.kernels.tilelang.compile import ONE_WARP_WAITS, kernel, require_hopper
from kascade_cli.kernels.tilelang.decode_macros import block_loader, online_softmax
from kascade_cli.kernels.tilelang.pool import LOGITS, WIDTH, pooled_scores, storable, workspace

BLOCK = 64
M = 64


@kernel(tl__device_compile_flags=ONE_WARP_WAITS)
def dense(group: int, head_dim: int, dtype: str, page: int, write: bool, block: int = BLOCK, stages: int = 3):
    """Builder. Compiled per group, head size, dtype, page (0: contiguous) and whether logits are written."""
    f32, policy = "float32", T.GemmWarpPolicy.FullRow
    B, G, S, MP = T.dynamic("B"), T.dynamic("G"), T.dynamic("S"), T.dynamic("MP")
    N, splits = T.dynamic("N"), T.dynamic("splits")
    cache = (S, page, G, head_dim) if page else (B, G, S, head_dim)
    as_it_lies = not page or page % block == 0  # the loader copies slots outside of the row too
    load, update = block_loader(page, block, head_dim), online_softmax(M, block)
    sub = WIDTH // block

    @T.prim_func
    def decode_dense_kernel(
        Q: T.Tensor((B, G, group, head_dim), dtype),
        Keys: T.Tensor(cache, dtype),
        Values: T.Tensor(cache, dtype),
        Table: T.Tensor((B, MP), "int32"),
        Start: T.Tensor((B,), "int32"),
        Length: T.Tensor((B,), "int32"),
        Logits: T.Tensor((B, G, group, N, WIDTH), LOGITS[dtype]),
        PartOut: T.Tensor((B, G, splits, group, head_dim), f32),
        Lse: T.Tensor((B, G, splits, group), f32),
        scale: T.float32,
    ):
        with T.Kernel(splits, G, B, threads=128) as (s, g, b):
            Qs = T.alloc_shared((M, head_dim), dtype)
            Ks = T.alloc_shared((block, head_dim), dtype)
            Vs = T.alloc_shared((block, head_dim), dtype)
            logit = T.alloc_fragment((M, block), f32)
            weight = T.alloc_fragment((M, block), dtype)
            acc = T.alloc_fragment((M, head_dim), f32)
            top = T.alloc_fragment((M,), f32)
            before = T.alloc_fragment((M,), f32)
            fade = T.alloc_fragment((M,), f32)
            part = T.alloc_fragment((M,), f32)
            total = T.alloc_fragment((M,), f32)
            n = T.alloc_var("int32")
            lo = T.alloc_var("int32")
            begin = T.alloc_var("int32")
            end = T.alloc_var("int32")
            T.annotate_min_blocks_per_sm(2)
            T.annotate_producer_reg_dealloc(40)
            T.annotate_consumer_reg_alloc(208)
            T.pdl_sync()
            T.pdl_trigger()
            begin = Start[b]
            end = begin + Length[b]
            n = T.if_then_else(end > begin, T.ceildiv(end, block) - begin // block, 0)
            lo = s * T.ceildiv(n, splits)
            n = T.max(T.min(T.ceildiv(n, splits), n - lo), 0)
            lo = lo + begin // block
            for i, j in T.Parallel(M, head_dim):
                Qs[i, j] = T.if_then_else(i < group, Q[b, g, T.min(i, group - 1), j], 0)
            T.fill(acc, 0)
            T.fill(total, 0)
            T.fill(top, -(2.0**30))
            for k in T.Pipelined(n, num_stages=stages):
                load(Keys, Ks, Table, b, g, lo, k, begin, end)
                T.gemm(Qs, Ks, logit, transpose_B=True, clear_accum=True, policy=policy)
                for i, j in T.Parallel(M, block):
                    logit[i, j] = T.if_then_else(
                        (lo + k) * block + j >= begin and (lo + k) * block + j < end,
                        logit[i, j] * scale,
                        -T.infinity(f32),
                    )
                if write:
                    for i, j in T.Parallel(M, block):
                        if i < group:
                            Logits[b, g, i, (lo + k) // sub, (lo + k) % sub * block + j] = storable(logit[i, j])
                update(logit, weight, top, before, fade, part, total, acc)
                load(Values, Vs, Table, b, g, lo, k, begin, end)
                # Slots that are no row's may hold anything: a weight of 0 does not silence a NaN.
                if as_it_lies and ((lo + k) * block < begin or (lo + k + 1) * block > end):
                    for i, j in T.Parallel(block, head_dim):
                        Vs[i, j] = T.if_then_else(
                            (lo + k) * block + i >= begin and (lo + k) * block + i < end, Vs[i, j], 0
                        )
                T.gemm(weight, Vs, acc, policy=policy)
            for i, j in T.Parallel(M, head_dim):
                if i < group:
                    PartOut[b, g, s, i, j] = acc[i, j] / T.max(total[i], 1e-30)
            for i in T.Parallel(M):
                if i < group:
                    Lse[b, g, s, i] = T.if_then_else(total[i] == 0, -T.infinity(f32), T.log2(total[i]) + top[i])

    return decode_dense_kernel


@kernel()
def merge(group: int, head_dim: int, dtype: str):
    """Builder: the splits' normalised parts, weighted by their log-sum-exps, in split order."""
    f32 = "float32"
    B, G, splits = T.dynamic("B"), T.dynamic("G"), T.dynamic("splits")

    @T.prim_func
    def merge_kernel(
        PartOut: T.Tensor((B, G, splits, group, head_dim), f32),
        Lse: T.Tensor((B, G, splits, group), f32),
        Out: T.Tensor((B, G, group, head_dim), dtype),
    ):
        with T.Kernel(group, G, B, threads=head_dim) as (h, g, b):
            peak = T.alloc_var(f32)
            mass = T.alloc_var(f32)
            value = T.alloc_var(f32)
            d = T.get_thread_binding()
            T.pdl_sync()
            T.pdl_trigger()
            peak = -(2.0**30)
            mass = 0.0
            value = 0.0
            for s in T.serial(splits):
                peak = T.max(peak, Lse[b, g, s, h])
            for s in T.serial(splits):
                mass += T.exp2(Lse[b, g, s, h] - peak)
                value += PartOut[b, g, s, h, d] * T.exp2(Lse[b, g, s, h] - peak)
            Out[b, g, h, d] = value / T.max(mass, 1e-30)

    return merge_kernel


def decode_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    scores: bool = False,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Dense attention of one query per row; see `reference.decode_dense`.

    q [B, H, D]; k, v [B, G, S, D] or [P, page, G, D] with block_table int32 [B, MP]; kv_start, kv_len int32 [B].
    Returns (out [B, H, D], scores float32 [B, G, S] or None). Raises Unsupported for what the kernel does not take.
    """
    call = check_decode(q, k, v, block_table, kv_start=kv_start, kv_len=kv_len)
    splits = even_split_count(call.rows, -(-call.slots // BLOCK), require_hopper(q.device))
    logits, lse = workspace(
        call.batch, call.kv_heads, call.group, call.slots if scores else 1, splits, call.dtype, q.device, packed=False
    )
    parts = torch.empty(
        (call.batch, call.kv_heads, splits, call.group, call.head_dim), dtype=torch.float32, device=q.device
    )
    out = torch.empty_like(call.grouped)
    dense(**call.config(), write=scores)(
        call.grouped, call.k, call.v, call.table, kv_start, kv_len, logits, parts, lse, scale * LOG2E
    )
    merge(group=call.group, head_dim=call.head_dim, dtype=call.dtype)(parts, lse, out)
    pooled = pooled_scores(logits, lse, kv_start, kv_len, call.slots, packed=False) if scores else None
    return out.flatten(1, 2), pooled
