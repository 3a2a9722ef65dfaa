"""decode_score: post-softmax scores pooled over the group, from one pass over K.

S^T = K Q^T: the keys are WGMMA's 64-row side and the group its narrow one (8 or 16), so nothing is padded 16-fold.
Each thread keeps the running maximum and sum of its own rows; they meet once, at the end. Raw logits go out in 16
or 32 bits, and `pool` turns them into scores when the log-sum-exp of every split is known.
"""

import tilelang.language as T
from torch import Tensor

from kascade_cli.kernels.contract import LOG2E
from kascade_cli.kernels.tilelang.arguments import check_decode, even_split_count
from kascade_cli.kernels.tilelang.compile import ONE_WARP_WAITS, kernel, require_hopper
from kascade_cli.kernels.tilelang.decode_macros import block_loader
from kascade_cli.kernels.tilelang.pool import LOGITS, WIDTH, pad, pooled_scores, storable, workspace

BLOCK = 64


@kernel(tl__device_compile_flags=ONE_WARP_WAITS)
def score(
    group: int,
    head_dim: int,
    dtype: str,
    page: int,
    block: int = BLOCK,
    stages: int = 5,
    threads: int = 128,
):
    """Builder. Compiled per group, head size, dtype and page (0: contiguous); everything else is read at run time."""
    f32, policy, low = "float32", T.GemmWarpPolicy.FullRow, -(2.0**30)
    B, G, S, MP = T.dynamic("B"), T.dynamic("G"), T.dynamic("S"), T.dynamic("MP")
    N, splits = T.dynamic("N"), T.dynamic("splits")
    cache = (S, page, G, head_dim) if page else (B, G, S, head_dim)
    wide = 8 if group <= 8 else 16
    block = min(block, page) if page >= 64 else block  # a block within one page comes by TMA
    load = block_loader(page, block, head_dim)
    sub = WIDTH // block
    padded = pad(group, LOGITS[dtype])

    @T.prim_func
    def decode_score_kernel(
        Q: T.Tensor((B, G, group, head_dim), dtype),
        Keys: T.Tensor(cache, dtype),
        Table: T.Tensor((B, MP), "int32"),
        Start: T.Tensor((B,), "int32"),
        Length: T.Tensor((B,), "int32"),
        Logits: T.Tensor((B, G, N, WIDTH, padded), LOGITS[dtype]),
        Lse: T.Tensor((B, G, splits, group), f32),
        scale: T.float32,
    ):
        with T.Kernel(splits, G, B, threads=threads) as (s, g, b):
            Qs = T.alloc_shared((wide, head_dim), dtype)
            Ks = T.alloc_shared((block, head_dim), dtype)
            logit = T.alloc_fragment((block, wide), f32)
            top = T.alloc_fragment((block, wide), f32)
            total = T.alloc_fragment((block, wide), f32)
            higher = T.alloc_fragment((block, wide), f32)
            tops = T.alloc_shared((block, wide), f32)
            totals = T.alloc_shared((block, wide), f32)
            toprow = T.alloc_fragment((wide, block), f32)
            totalrow = T.alloc_fragment((wide, block), f32)
            peak = T.alloc_fragment((wide,), f32)
            mass = T.alloc_fragment((wide,), f32)
            n = T.alloc_var("int32")
            lo = T.alloc_var("int32")
            begin = T.alloc_var("int32")
            end = T.alloc_var("int32")
            T.pdl_sync()
            T.pdl_trigger()
            begin = Start[b]
            end = begin + Length[b]
            n = T.if_then_else(end > begin, T.ceildiv(end, block) - begin // block, 0)
            lo = s * T.ceildiv(n, splits)
            n = T.max(T.min(T.ceildiv(n, splits), n - lo), 0)
            lo = lo + begin // block
            for i, j in T.Parallel(wide, head_dim):
                Qs[i, j] = T.if_then_else(i < group, Q[b, g, T.min(i, group - 1), j], 0)
            T.fill(top, low)
            T.fill(total, 0)
            for k in T.Pipelined(n, num_stages=stages):
                load(Keys, Ks, Table, b, g, lo, k, begin, end)
                T.gemm(Ks, Qs, logit, transpose_B=True, clear_accum=True, policy=policy)
                for i, j in T.Parallel(block, wide):
                    logit[i, j] = T.if_then_else(
                        (lo + k) * block + i >= begin and (lo + k) * block + i < end, logit[i, j] * scale, low
                    )
                for i, j in T.Parallel(block, wide):
                    higher[i, j] = T.max(top[i, j], logit[i, j])
                    total[i, j] = total[i, j] * T.exp2(top[i, j] - higher[i, j]) + T.exp2(logit[i, j] - higher[i, j])
                    top[i, j] = higher[i, j]
                # A slot's heads side by side: no detour through shared memory.
                for i, j in T.Parallel(block, wide):
                    if j < padded:
                        Logits[b, g, (lo + k) // sub, (lo + k) % sub * block + i, j] = storable(logit[i, j])
            T.copy(top, tops)
            T.copy(total, totals)
            for j, i in T.Parallel(wide, block):
                toprow[j, i] = tops[i, j]
                totalrow[j, i] = totals[i, j]
            T.reduce_max(toprow, peak, dim=1)
            for j, i in T.Parallel(wide, block):
                totalrow[j, i] = totalrow[j, i] * T.exp2(toprow[j, i] - peak[j])
            T.reduce_sum(totalrow, mass, dim=1)
            for j in T.Parallel(wide):
                if j < group:
                    # No keys: the maximum is where it began. NaN keys leave it there too, and their sum is NaN.
                    Lse[b, g, s, j] = T.if_then_else(
                        mass[j] >= 0 and peak[j] <= low, -T.infinity(f32), peak[j] + T.log2(mass[j])
                    )

    return decode_score_kernel


def decode_score(
    q: Tensor,
    k: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    logits: bool = False,
    pooled: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Post-softmax attention of one query per row, summed over the heads of each group; see `reference.decode_score`.

    q [B, H, D]; k [B, G, S, D] or paged. Returns float32 [B, G, S], or [B, 1, S] summed over all heads if `pooled`,
    zero outside the row's keys; rows may be padded in memory. With `logits` also the logits [B, G, S', R'] that
    `decode_sparse` takes: log2 units, float16 for bfloat16 inputs (finer than the products that they are made of),
    else float32. Raises Unsupported for what the kernel does not take.
    """
    call = check_decode(q, k, None, block_table, kv_start=kv_start, kv_len=kv_len)
    splits = even_split_count(call.rows, -(-call.slots // BLOCK), require_hopper(q.device))
    raw, lse = workspace(call.batch, call.kv_heads, call.group, call.slots, splits, call.dtype, q.device, packed=True)
    score(**call.config())(call.grouped, call.k, call.table, kv_start, kv_len, raw, lse, scale * LOG2E)
    scores = pooled_scores(raw, lse, kv_start, kv_len, call.slots, packed=True, pooled=pooled)
    return (scores, raw.flatten(2, 3)) if logits else scores
