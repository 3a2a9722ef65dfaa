"""decode_sparse: one query per row over the selected keys only.

A producer warpgroup gathers K and V rows with cp.async, its indices read one block ahead of the free slot; a
consumer warpgroup runs an online softmax on WGMMA, with the group's heads padded to its 64 rows. A row's keys are
shared out over `splits` CTAs; the last of them to finish merges the parts, in a fixed order, so that the result
does not depend on timing. An anchor has its logits from scoring already: it gathers those instead of K.
"""

import tilelang.language as T
import torch
from torch import Tensor

from kascade_cli.kernels.contract import LOG2E, Unsupported
from kascade_cli.kernels.tilelang.arguments import Decode, check_decode, split_count
from kascade_cli.kernels.tilelang.compile import kernel, require_hopper
from kascade_cli.kernels.tilelang.counters import counters
from kascade_cli.kernels.tilelang.decode_macros import online_softmax
from kascade_cli.kernels.tilelang.pool import LOGIT_BYTES, LOGITS, pad

BLOCK = 64
STAGES = 3
RING = 108 << 10  # bytes in flight with known logits: two CTAs fit an SM
M = 64
VEC = 4  # values that a thread merges: 16 bytes
MERGED = 4  # parts that it has on their way at once


@kernel(tl__disable_safe_memory_legalize=True)
def sparse(group: int, head_dim: int, dtype: str, page: int, known: bool):
    """Builder. Compiled per group, head size, dtype, page (0: contiguous) and whether the logits are known."""
    f32, policy, low = "float32", T.GemmWarpPolicy.FullRow, -(2.0**30)
    B, G, S, K, G2 = T.dynamic("B"), T.dynamic("G"), T.dynamic("S"), T.dynamic("K"), T.dynamic("G2")
    MP, W, C, L = T.dynamic("MP"), T.dynamic("W"), T.dynamic("C"), T.dynamic("L")
    cache = (S, page, G, head_dim) if page else (B, G, S, head_dim)
    block = key_block(group, dtype, known)
    per_row = head_dim // 8  # threads that copy one row, 16 bytes each
    step = 128 // per_row  # rows copied at once
    turns = block // step
    at_once = 32 // per_row  # rows that a warp copies at once
    producer = (
        40 + 16 * bool(page) + 16 * (block > BLOCK)
    )  # registers per thread, of 256 for a producer's and a consumer's
    heads = pad(group, LOGITS[dtype])  # logits of one key, side by side
    size = LOGIT_BYTES[LOGITS[dtype]]
    chunk = min(heads, 16 // size)  # logits in one copy
    stages = min(6, RING // (block * (2 * head_dim + size * heads))) if known else STAGES

    update = online_softmax(M, block)

    def mine(t):
        """The place in a block of the row that this lane looks up; the others follow by shuffles."""
        return t % 32 % (block // 4) // at_once * step + t // 32 * at_once + t % at_once

    def place(Index, b, source, at, used):
        return T.max(Index[b, source, T.min(at, used - 1)], 0)

    @T.macro
    def gather(Cache, ring, stage, b, g, row, t):
        for i in T.unroll(turns):
            if page:
                T.ptx_cp_async(
                    T.access_ptr(ring[stage, i * step + t // per_row, t % per_row * 8], "w", 8),
                    T.access_ptr(Cache[row[i] // page, row[i] % page, g, t % per_row * 8], "r", 8),
                    8,
                )
            else:
                T.ptx_cp_async(
                    T.access_ptr(ring[stage, i * step + t // per_row, t % per_row * 8], "w", 8),
                    T.access_ptr(Cache[b, g, row[i], t % per_row * 8], "r", 8),
                    8,
                )

    @T.macro
    def add(Part, Lse, first, splits, p, i, j, lse, piece, whole, peak: T.Ref, mass: T.Ref, higher: T.Ref):
        # All loads first: one after the other they would take most of a short call's time.
        for u in T.unroll(MERGED):
            lse[u] = Lse[first + T.min(p + u, splits - 1), i]
            for e in T.vectorized(VEC):
                piece[u, e] = Part[first + T.min(p + u, splits - 1), i, j + e]
        higher = peak
        for u in T.unroll(MERGED):
            higher = T.max(higher, lse[u])
        mass *= T.exp2(peak - higher)
        for e in T.unroll(VEC):
            whole[e] *= T.exp2(peak - higher)
        for u in T.unroll(MERGED):
            if p + u < splits:
                mass += T.exp2(lse[u] - higher)
                for e in T.unroll(VEC):
                    whole[e] += piece[u, e] * T.exp2(lse[u] - higher)
        peak = higher

    @T.prim_func
    def decode_sparse_kernel(
        Q: T.Tensor((B, G, group, head_dim), dtype),
        Keys: T.Tensor(cache, dtype),
        Values: T.Tensor(cache, dtype),
        Logits: T.Tensor((B, G, L, heads), LOGITS[dtype]),
        Table: T.Tensor((B, MP), "int32"),
        Index: T.Tensor((B, G2, K), "int32"),
        Count: T.Tensor((B,), "int32"),
        HeadMap: T.Tensor((G,), "int32"),
        PartOut: T.Tensor((W, group, head_dim), f32),
        PartLse: T.Tensor((W, group), f32),
        Arrived: T.Tensor((C,), "int32"),
        Out: T.Tensor((B, G, group, head_dim), dtype),
        splits: T.int32,
        scale: T.float32,
    ):
        with T.Kernel(splits, G, B, threads=256) as (s, g, b):
            Qs = T.alloc_shared((M, head_dim), dtype)
            # What comes before V: rows of K, or of the logits where they are known.
            Kr = T.alloc_shared((stages, block, heads if known else head_dim), LOGITS[dtype] if known else dtype)
            Vr = T.alloc_shared((stages, block, head_dim), dtype)
            ticket = T.alloc_shared((1,), "int32")
            logit = T.alloc_fragment((M, block), f32)
            weight = T.alloc_fragment((M, block), dtype)
            acc = T.alloc_fragment((M, head_dim), f32)
            top = T.alloc_fragment((M,), f32)
            before = T.alloc_fragment((M,), f32)
            fade = T.alloc_fragment((M,), f32)
            part = T.alloc_fragment((M,), f32)
            total = T.alloc_fragment((M,), f32)
            row = T.alloc_local((turns,), "int32")
            n = T.alloc_var("int32")
            lo = T.alloc_var("int32")
            used = T.alloc_var("int32")
            source = T.alloc_var("int32")
            slot = T.alloc_var("int32")
            now = T.alloc_var("int32")
            here = T.alloc_var("int32")  # this block's row, as a slot of the cache
            raw = T.alloc_var("int32")  # the next block's, of the row's slots, and its page
            entry = T.alloc_var("int32")
            later = T.alloc_var("int32")  # the one's after that
            peak = T.alloc_var(f32)
            mass = T.alloc_var(f32)
            higher = T.alloc_var(f32)
            lse = T.alloc_local((MERGED,), f32)
            piece = T.alloc_local((MERGED, VEC), f32)
            whole = T.alloc_local((VEC,), f32)
            kfull = T.alloc_barrier([128] * stages)
            vfull = T.alloc_barrier([128] * stages)
            kfree = T.alloc_barrier([128] * stages)
            vfree = T.alloc_barrier([128] * stages)
            T.annotate_min_blocks_per_sm(2)
            T.pdl_sync()
            T.pdl_trigger()
            source = HeadMap[g]
            used = T.min(Count[b], K)
            lo = s * T.ceildiv(T.ceildiv(used, block), splits)
            n = T.max(T.min(T.ceildiv(T.ceildiv(used, block), splits), T.ceildiv(used, block) - lo), 0)
            tx = T.get_thread_binding()
            if tx >= 128:
                T.set_max_nreg(producer, 0)
                if n > 0:
                    # Each lane looks up one of its warp's rows, a block ahead (two, where a page has to be found too).
                    raw = place(Index, b, source, lo * block + mine(tx - 128), used)
                    if page:
                        entry = Table[b, raw // page]
                        later = place(Index, b, source, (lo + 1) * block + mine(tx - 128), used)
                    if known:
                        slot = place(Index, b, source, lo * block + (tx - 128) % block, used)
                for k in T.serial(n):
                    if page:
                        here = entry * page + raw % page
                        raw = later
                        entry = Table[b, raw // page]
                        later = place(Index, b, source, (lo + k + 2) * block + mine(tx - 128), used)
                    else:
                        here = raw
                        raw = place(Index, b, source, (lo + k + 1) * block + mine(tx - 128), used)
                    for i in T.unroll(turns):
                        row[i] = T.shfl_sync(here, i * at_once + (tx % 32) // per_row)
                    if known:
                        now = slot
                        slot = place(Index, b, source, (lo + k + 1) * block + (tx - 128) % block, used)
                        T.barrier_wait(vfree[k % stages], ((k // stages) & 1) ^ 1)
                        if tx - 128 < block:
                            for w in T.unroll(-(-heads // chunk)):
                                T.ptx_cp_async(
                                    T.access_ptr(Kr[k % stages, tx - 128, w * chunk], "w", chunk),
                                    T.access_ptr(Logits[b, g, now, w * chunk], "r", chunk),
                                    chunk,
                                )
                    else:
                        T.barrier_wait(kfree[k % stages], ((k // stages) & 1) ^ 1)
                        gather(Keys, Kr, k % stages, b, g, row, tx - 128)
                        T.cp_async_barrier_noinc(kfull[k % stages])
                        T.barrier_wait(vfree[k % stages], ((k // stages) & 1) ^ 1)
                    gather(Values, Vr, k % stages, b, g, row, tx - 128)
                    T.cp_async_barrier_noinc(vfull[k % stages])
            else:
                T.set_max_nreg(256 - producer, 1)
                if not known:
                    for i, j in T.Parallel(M, head_dim):
                        Qs[i, j] = T.if_then_else(i < group, Q[b, g, T.min(i, group - 1), j], 0)
                T.fill(acc, 0)
                T.fill(total, 0)
                T.fill(top, low)
                for k in T.serial(n):
                    if known:
                        T.barrier_wait(vfull[k % stages], (k // stages) & 1)
                        for i, j in T.Parallel(M, block):
                            logit[i, j] = T.if_then_else(
                                i < group and (lo + k) * block + j < used,
                                T.cast(Kr[k % stages, j, T.min(i, group - 1)], f32),
                                -T.infinity(f32),
                            )
                    else:
                        T.barrier_wait(kfull[k % stages], (k // stages) & 1)
                        T.fence_proxy_async()
                        T.wgmma_gemm(
                            Qs, Kr[k % stages, :, :], logit, transpose_B=True, clear_accum=True, policy=policy
                        )
                        T.wait_wgmma(0)
                        T.barrier_arrive(kfree[k % stages])
                        for i, j in T.Parallel(M, block):
                            logit[i, j] = T.if_then_else(
                                (lo + k) * block + j < used, logit[i, j] * scale, -T.infinity(f32)
                            )
                    update(logit, weight, top, before, fade, part, total, acc)
                    if not known:
                        T.barrier_wait(vfull[k % stages], (k // stages) & 1)
                    T.fence_proxy_async()
                    T.wgmma_gemm(weight, Vr[k % stages, :, :], acc, policy=policy)
                    T.wait_wgmma(0)
                    T.barrier_arrive(vfree[k % stages])
                for i, j in T.Parallel(M, head_dim):
                    acc[i, j] = acc[i, j] / T.max(total[i], 1e-30)
                if splits == 1:
                    for i, j in T.Parallel(M, head_dim):
                        if i < group:
                            Out[b, g, i, j] = acc[i, j]
                else:
                    for i, j in T.Parallel(M, head_dim):
                        if i < group:
                            PartOut[(b * G + g) * splits + s, i, j] = acc[i, j]
                    for i in T.Parallel(M):
                        if i < group:
                            PartLse[(b * G + g) * splits + s, i] = T.if_then_else(
                                total[i] > 0, T.log2(total[i]) + top[i], -T.infinity(f32)
                            )
            if splits > 1:
                T.sync_threads()
                if tx == 0:
                    ticket[0] = T.atomic_add(Arrived[b * G + g], 1, memory_order="acq_rel", return_prev=True)
                T.sync_threads()
                if ticket[0] == splits - 1:
                    for h in T.serial(-(-group * head_dim // (256 * VEC))):
                        if (h * 256 + tx) * VEC < group * head_dim:
                            peak = low
                            mass = 0.0
                            for e in T.unroll(VEC):
                                whole[e] = 0.0
                            for p in T.serial(T.ceildiv(splits, MERGED)):
                                add(
                                    PartOut, PartLse, (b * G + g) * splits, splits, p * MERGED,
                                    (h * 256 + tx) * VEC // head_dim, (h * 256 + tx) * VEC % head_dim,
                                    lse, piece, whole, peak, mass, higher,
                                )  # fmt: skip
                            for e in T.vectorized(VEC):
                                Out[b, g, (h * 256 + tx) * VEC // head_dim, (h * 256 + tx) * VEC % head_dim + e] = (
                                    whole[e] / T.max(mass, 1e-30)
                                )
                    if tx == 0:
                        Arrived[b * G + g] = 0

    return decode_sparse_kernel


def key_block(group: int, dtype: str, known: bool) -> int:
    """Keys per block: 128 with known logits (up to 8 % faster in small batches on an H200) that do not spill."""
    narrow = LOGIT_BYTES[LOGITS[dtype]] * pad(group, LOGITS[dtype]) <= 8
    return 2 * BLOCK if known and narrow else BLOCK


def decode_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    head_map: Tensor,
    *,
    scale: float,
    logits: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attention of one query per row over the selected keys only; see `reference.decode_sparse`.

    q [B, H, D]; k, v [B, G, S, D] or [P, page, G, D] with block_table int32 [B, MP]; indices int32 [B, G2, K] of
    slots, the first counts[b] of them valid; head_map int32 [G]; logits [B, G, S', R'] as `decode_score` leaves them:
    K is not read then. Returns [B, H, D]; zeros where the count is 0. Raises Unsupported for what the kernel does not
    take.
    """
    call = check_decode(q, k, v, block_table, indices=indices, counts=counts, head_map=head_map)
    if indices.dim() != 3 or indices.shape[0] != call.batch:
        raise Unsupported(f"indices has shape {list(indices.shape)} and needs [{call.batch}, G2, K]")
    if tuple(head_map.shape) != (call.kv_heads,):
        raise Unsupported(f"head_map has shape {list(head_map.shape)} and needs [{call.kv_heads}]")
    if logits is not None:
        _check_logits(logits, call)
    out = torch.empty_like(call.grouped)
    if not indices.shape[-1] or not call.rows:
        return out.zero_().flatten(1, 2)
    sms = require_hopper(q.device)
    splits = split_count(call.rows, -(-indices.shape[-1] // BLOCK), sms, thin=1.25)
    parts = call.rows * splits if splits > 1 else 1
    part_out = torch.empty((parts, call.group, call.head_dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((parts, call.group), dtype=torch.float32, device=q.device)
    arrived = counters(call.rows if splits > 1 else 1, q.device)
    sparse(**call.config(), known=logits is not None)(
        call.grouped,
        call.k,
        call.v,
        _no_logits(call, q.device) if logits is None else logits,
        call.table,
        indices,
        counts,
        head_map,
        part_out,
        part_lse,
        arrived,
        out,
        splits,
        scale * LOG2E,
    )
    return out.flatten(1, 2)


def _no_logits(call: Decode, device: torch.device) -> Tensor:
    shape = (call.batch, call.kv_heads, 1, pad(call.group, LOGITS[call.dtype]))
    return torch.empty(shape, dtype=getattr(torch, LOGITS[call.dtype]), device=device)


def _check_logits(logits: Tensor, call: Decode) -> None:
    heads, dtype = pad(call.group, LOGITS[call.dtype]), getattr(torch, LOGITS[call.dtype])
    fits = logits.dim() == 4 and logits.shape[:2] == call.grouped.shape[:2] and logits.shape[3] == heads
    if not fits or logits.shape[2] < call.slots or logits.dtype != dtype or not logits.is_contiguous():
        raise Unsupported(
            f"logits are {str(logits.dtype)[6:]} {list(logits.shape)} and must be contiguous {LOGITS[call.dtype]} "
            f"[{call.batch}, {call.kv_heads}, {call.slots} or more, {heads}]: what this backend's decode_score gives"
        )
