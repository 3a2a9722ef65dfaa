"""select_topk: exact radix selection, without a sort and without the host.

Scores are probabilities, so their bits order them. A histogram of the top 11 bits finds the bin of the count-th
highest value; one more pass over the row sets that bin's values aside, and the last 20 bits are settled among
those. A last pass writes the slots, ascending. Few rows are shared out over clusters of up to 8 CTAs, whose
histograms meet in global memory. All sums are of integers: the same input gives the same bits.
"""

import functools

import tilelang.language as T
import torch
from torch import Tensor

from kascade_cli.kernels.contract import Unsupported
from kascade_cli.kernels.tilelang.compile import kernel, require_hopper
from kascade_cli.kernels.tilelang.rows import VEC, row_view, spread

BINS = 2048
STAGED = 4096  # vectors of a row that a CTA keeps in shared memory: 64 KB
ROOM = 8  # values that a thread can set aside; with more it goes through its share again
AHEAD = 2  # vectors that a thread has in flight in the first pass


# Barriers are all written out: TileLang's own placement puts two in every turn of the histogram loops. Then no two
# arrays may share memory either: nothing would keep their uses apart.
@kernel(
    tl__enable_fast_math=False,
    tl__disable_thread_storage_sync=True,
    tl__disable_shared_memory_reuse=True,
    tl__disable_safe_memory_legalize=True,
)
def topk(cluster: int, staged: int, threads: int):
    """Builder. `cluster` CTAs of `threads` share a row; each keeps its first `staged` vectors in shared memory."""
    R, N, K, P = T.dynamic("R"), T.dynamic("N"), T.dynamic("K"), T.dynamic("P")
    A, L, C = T.dynamic("A"), T.dynamic("L"), T.dynamic("C")
    warps, per = threads // 32, BINS // threads

    @T.macro
    def convert(value, bits, slot, first, last):
        """Scores to ordered integers, NaN of any sign highest; -1, below every score, for slots not of the row."""
        for e in T.unroll(VEC):
            bits[e] = T.if_then_else(
                slot + e >= first and slot + e < last, T.reinterpret(value[e], "int32") & 0x7FFFFFFF, -1
            )

    @T.macro
    def fetch(Scores, kept, value, bits, row, base, i, first, last):
        if i < staged:
            for e in T.vectorized(VEC):
                bits[e] = kept[i, e]
        else:
            for e in T.vectorized(VEC):
                value[e] = Scores[row, base + i, e]
            convert(value, bits, (base + i) * VEC, first, last)

    @T.prim_func
    def select_topk_kernel(
        Scores: T.Tensor((R, N, VEC), "float32"),
        Start: T.Tensor((A,), "int32"),
        Length: T.Tensor((L,), "int32"),
        Count: T.Tensor((C,), "int32"),
        Hist: T.Tensor((P, 3, cluster, BINS), "int32"),
        Kept: T.Tensor((P, cluster, 2), "int32"),
        Out: T.Tensor((R, K), "int32"),
        start_over: T.int32,
        start_of: T.int32,
        length_over: T.int32,
        length_of: T.int32,
        count_over: T.int32,
        count_of: T.int32,
        width: T.int32,
    ):
        with T.Kernel(cluster, R, threads=threads, cluster_dims=(cluster, 1, 1)) as (c, r):
            bins = T.alloc_shared((BINS,), "int32")
            sums = T.alloc_shared((warps,), "int32")
            found = T.alloc_shared((3,), "int32")
            over = T.alloc_shared((warps,), "int32")
            ties = T.alloc_shared((warps,), "int32")
            aside = T.alloc_shared((ROOM, threads), "int32")
            kept = T.alloc_shared((staged, VEC), "int32")
            value = T.alloc_local((VEC,), "float32")
            many = T.alloc_local((AHEAD, VEC), "float32")
            bits = T.alloc_local((VEC,), "int32")
            held = T.alloc_local((per,), "int32")
            first = T.alloc_var("int32")  # the row's slots are [first, last)
            last = T.alloc_var("int32")
            want = T.alloc_var("int32")
            need = T.alloc_var("int32")  # how many of the threshold's bin are still wanted
            inside = T.alloc_var("int32")  # how many values that bin holds
            prefix = T.alloc_var("int32")  # the threshold's bits so far
            base = T.alloc_var("int32")  # this CTA's vectors are [base, base + share)
            share = T.alloc_var("int32")
            turns = T.alloc_var("int32")
            mine = T.alloc_var("int32")
            rest = T.alloc_var("int32")
            high = T.alloc_var("int32")
            sure = T.alloc_var("int32")  # this thread's values above the threshold's first bin
            low = T.alloc_var("int32")
            put = T.alloc_var("int32")  # this thread's values in that bin
            at = T.alloc_var("int32")
            tie = T.alloc_var("int32")
            rank = T.alloc_var("int32")
            lane = T.alloc_var("int32")
            warp = T.alloc_var("int32")
            origin = T.alloc_var("int32")
            T.pdl_sync()
            T.pdl_trigger()
            tx = T.get_thread_binding()
            lane = tx % 32
            warp = tx // 32
            first = T.max(Start[T.truncdiv(r, start_over) * start_of + T.truncmod(r, start_of)], 0)
            last = Length[T.truncdiv(r, length_over) * length_of + T.truncmod(r, length_of)]
            last = T.min(first + T.max(last, 0), width)
            want = T.min(Count[T.truncdiv(r, count_over) * count_of + T.truncmod(r, count_of)], K)
            want = T.max(T.min(want, last - first), 0)
            if want >= last - first:
                for i in T.serial(T.ceildiv(want, threads * cluster)):
                    if (i * cluster + c) * threads + tx < want:
                        Out[r, (i * cluster + c) * threads + tx] = first + (i * cluster + c) * threads + tx
            if want > 0 and want < last - first:
                share = T.ceildiv(T.ceildiv(last, VEC) - first // VEC, cluster)
                base = first // VEC + c * share
                share = T.max(T.min(share, T.ceildiv(last, VEC) - base), 0)
                # Each warp owns a contiguous stretch of `turns` groups of 128 slots, in every pass.
                turns = T.ceildiv(share, threads)
                origin = warp * turns * 32 + lane
                need = want
                inside = last - first
                prefix = 0
                sure = 0
                put = 0
                for p in T.unroll(3):
                    for i in T.unroll(per):
                        bins[i * threads + tx] = 0
                    T.sync_threads()
                    # Digit 0 is counted by subtraction: rows full of zeros would queue for one address.
                    if p == 0:
                        for i in T.serial(T.ceildiv(turns, AHEAD)):
                            for w in T.unroll(AHEAD):
                                if i * AHEAD + w < turns and origin + (i * AHEAD + w) * 32 < share:
                                    for e in T.vectorized(VEC):
                                        many[w, e] = Scores[r, base + origin + (i * AHEAD + w) * 32, e]
                            for w in T.unroll(AHEAD):
                                if i * AHEAD + w < turns and origin + (i * AHEAD + w) * 32 < share:
                                    for e in T.unroll(VEC):
                                        value[e] = many[w, e]
                                    convert(value, bits, (base + origin + (i * AHEAD + w) * 32) * VEC, first, last)
                                    if origin + (i * AHEAD + w) * 32 < staged:
                                        for e in T.vectorized(VEC):
                                            kept[origin + (i * AHEAD + w) * 32, e] = bits[e]
                                    for e in T.unroll(VEC):
                                        if bits[e] >= 1 << 20:
                                            T.atomic_add(bins[bits[e] >> 20], 1)
                    if p == 1:
                        for i in T.serial(turns):
                            if origin + i * 32 < share:
                                fetch(Scores, kept, value, bits, r, base, origin + i * 32, first, last)
                                for e in T.unroll(VEC):
                                    if (bits[e] >> 20) > (prefix >> 20):
                                        sure += 1
                                    if (bits[e] >> 20) == (prefix >> 20):
                                        if ((bits[e] >> 9) & 2047) != 0:
                                            T.atomic_add(bins[(bits[e] >> 9) & 2047], 1)
                                        if put < ROOM:
                                            aside[put, tx] = bits[e]
                                        put += 1
                    if p == 2:
                        if put <= ROOM:
                            for i in T.serial(put):
                                if (aside[i, tx] >> 9) == (prefix >> 9) and (aside[i, tx] & 511) != 0:
                                    T.atomic_add(bins[aside[i, tx] & 511], 1)
                        else:
                            for i in T.serial(turns):
                                if origin + i * 32 < share:
                                    fetch(Scores, kept, value, bits, r, base, origin + i * 32, first, last)
                                    for e in T.unroll(VEC):
                                        if (bits[e] >> 9) == (prefix >> 9) and (bits[e] & 511) != 0:
                                            T.atomic_add(bins[bits[e] & 511], 1)
                    T.sync_threads()
                    for i in T.unroll(per):
                        held[i] = bins[per * tx + i]
                    if cluster > 1:
                        for i in T.vectorized(per):
                            Hist[r, p, c, per * tx + i] = held[i]
                        T.cluster_sync()
                        for i in T.unroll(per):
                            held[i] = 0
                        for o in T.unroll(cluster):
                            for i in T.unroll(per):
                                held[i] += Hist[r, p, o, per * tx + i]
                    # A suffix scan: `mine` becomes how many values lie in bins above this thread's.
                    high = 0
                    for i in T.unroll(per):
                        high += held[i]
                    mine = high
                    for d in T.unroll(5):
                        rest = T.shfl_down(mine, 1 << d)
                        if lane + (1 << d) < 32:
                            mine += rest
                    if lane == 0:
                        sums[warp] = mine
                    T.sync_threads()
                    rest = T.if_then_else(lane > warp and lane < warps, sums[T.min(lane, warps - 1)], 0)
                    mine = mine - high + T.warp_reduce_sum(rest)
                    if tx == 0:
                        held[0] = inside - mine - (high - held[0])
                    for i in T.unroll(per):
                        if mine < need and mine + held[per - 1 - i] >= need:
                            found[0] = per * tx + per - 1 - i
                            found[1] = need - mine
                            found[2] = held[per - 1 - i]
                        mine += held[per - 1 - i]
                    T.sync_threads()
                    need = found[1]
                    inside = found[2]
                    if p == 0:
                        prefix = found[0] << 20
                    if p == 1:
                        prefix = prefix | (found[0] << 9)
                    if p == 2:
                        prefix = prefix | found[0]
                high = sure
                low = 0
                if put <= ROOM:
                    for i in T.serial(put):
                        if aside[i, tx] > prefix:
                            high += 1
                        if aside[i, tx] == prefix:
                            low += 1
                else:
                    high = 0
                    for i in T.serial(turns):
                        if origin + i * 32 < share:
                            fetch(Scores, kept, value, bits, r, base, origin + i * 32, first, last)
                            for e in T.unroll(VEC):
                                if bits[e] > prefix:
                                    high += 1
                                if bits[e] == prefix:
                                    low += 1
                high = T.warp_reduce_sum(high)
                low = T.warp_reduce_sum(low)
                if lane == 0:
                    over[warp] = high
                    ties[warp] = low
                T.sync_threads()
                at = 0
                tie = 0
                if cluster > 1:
                    high = T.warp_reduce_sum(T.if_then_else(lane < warps, over[T.min(lane, warps - 1)], 0))
                    low = T.warp_reduce_sum(T.if_then_else(lane < warps, ties[T.min(lane, warps - 1)], 0))
                    if tx == 0:
                        Kept[r, c, 0] = high
                        Kept[r, c, 1] = low
                    T.cluster_sync()
                    for o in T.serial(c):
                        at += Kept[r, o, 0]
                        tie += Kept[r, o, 1]
                for o in T.serial(warp):
                    at += over[o]
                    tie += ties[o]
                # Before this warp come `at` values above the threshold and `tie` equal to it; of all ties the first
                # `need` are taken, so the next entry goes to at + min(tie, need).
                for i in T.serial(turns):
                    if warp * turns * 32 + i * 32 < share:
                        for e in T.unroll(VEC):
                            bits[e] = -1
                        if origin + i * 32 < share:
                            fetch(Scores, kept, value, bits, r, base, origin + i * 32, first, last)
                        rest = 0
                        for e in T.unroll(VEC):
                            if bits[e] > prefix:
                                rest += 1
                            if bits[e] == prefix:
                                rest += 1 << 16
                        mine = rest
                        for d in T.unroll(5):
                            high = T.shfl_up(mine, 1 << d)
                            if lane >= (1 << d):
                                mine += high
                        high = T.shfl_sync(mine, 31)
                        mine -= rest
                        rank = tie + (mine >> 16)
                        mine = at + (mine & 65535)
                        at += high & 65535
                        tie += high >> 16
                        if rest != 0:
                            for e in T.unroll(VEC):
                                if bits[e] > prefix:
                                    Out[r, mine + T.min(rank, need)] = (base + origin + i * 32) * VEC + e
                                    mine += 1
                                if bits[e] == prefix:
                                    if rank < need:
                                        Out[r, mine + rank] = (base + origin + i * 32) * VEC + e
                                    rank += 1
            for i in T.serial(T.ceildiv(K - want, threads * cluster)):
                if want + (i * cluster + c) * threads + tx < K:
                    Out[r, want + (i * cluster + c) * threads + tx] = -1

    return select_topk_kernel


def select_topk(scores: Tensor, count: Tensor, start: Tensor, length: Tensor, *, max_count: int) -> Tensor:
    """The `count` highest-scoring slots among [start, start + length), ascending; see `reference.select_topk`.

    scores float32 [..., S], not negative, NaN first, rows of one stride (they may be padded in memory); count, start,
    length int32, broadcastable to [...]. Returns int32 [..., max_count]; entries past the row's count are -1.
    Raises Unsupported for what the kernel does not take.
    """
    if scores.dtype != torch.float32 or not scores.dim():
        raise Unsupported(f"scores must be float32 [..., S], not {scores.dtype} {list(scores.shape)}")
    shape = scores.shape[:-1]
    for name, value in (("count", count), ("start", start), ("length", length)):
        if value.dtype != torch.int32 or value.device != scores.device:
            raise Unsupported(f"{name} must be int32 on {scores.device}, not {value.dtype} on {value.device}")
        if value.dim() > len(shape) or any(
            have not in (1, want) for have, want in zip(reversed(value.shape), reversed(shape), strict=False)
        ):
            raise Unsupported(f"{name} has shape {list(value.shape)}, which does not broadcast to {list(shape)}")
    if max_count < 0:
        raise Unsupported(f"max_count is {max_count} and must not be negative")
    out = torch.empty((*shape, max_count), dtype=torch.int32, device=scores.device)
    if not out.numel():
        return out
    if not scores.shape[-1]:
        return out.fill_(-1)
    sms = require_hopper(scores.device)
    rows = row_view(scores)
    chosen = plan(len(rows), rows.shape[1], sms)
    cluster, peers = chosen["cluster"], len(rows) if chosen["cluster"] > 1 else 1
    hist = torch.empty((peers, 3, cluster, BINS), dtype=torch.int32, device=scores.device)
    kept = torch.empty((peers, cluster, 2), dtype=torch.int32, device=scores.device)
    starts, lengths, counts = (spread(value, shape) for value in (start, length, count))
    topk(**chosen)(
        rows,
        starts[0],
        lengths[0],
        counts[0],
        hist,
        kept,
        out.view(len(rows), max_count),
        *starts[1:],
        *lengths[1:],
        *counts[1:],
        scores.shape[-1],
    )
    return out


@functools.cache
def plan(rows: int, vectors: int, sms: int) -> dict[str, int]:
    """Cluster size, vectors kept in shared memory and threads of a CTA, from shapes only. Fitted to an H200.

    A row that one CTA can keep is one CTA's; longer ones, if few, are shared by clusters as wide as can be placed at
    once. CTAs are small where two to an SM pay: with more rows than SMs, until re-reading rows decides.
    """
    cluster = 2 if vectors > STAGED and 2 * rows <= sms else 1
    while 1 < cluster < 8 and 2 * cluster * rows <= 3 * sms // 4:
        cluster *= 2
    small = cluster == 1 and vectors < (3 * STAGED if rows > sms else STAGED // 4)
    return {"cluster": cluster, "staged": _staged(cluster), "threads": 512 if small else 1024}


def _staged(cluster: int) -> int:
    """Pairs fill an SM with one CTA anyway, so they keep twice as much."""
    return 2 * STAGED if cluster == 2 else STAGED


def variants() -> list[dict[str, int]]:
    """Every configuration that `plan` can choose."""
    shapes = [(1, 512), (1, 1024), (2, 1024), (4, 1024), (8, 1024)]
    return [{"cluster": cluster, "staged": _staged(cluster), "threads": threads} for cluster, threads in shapes]
