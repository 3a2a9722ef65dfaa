"""Second half of the scoring ops: logits and per-split log-sum-exps -> pooled post-softmax scores."""

from typing import Any

import tilelang.language as T
import torch
from torch import Tensor

from kascade_cli.kernels.tilelang.compile import kernel

EACH = 4  # slots per thread
WIDTH = 1024  # slots per CTA; logits and scores are allocated in multiples of it
FLOAT16_MAX = 65504.0
# Logits are kept to 11 bits for bfloat16 models, finer than their inputs; float16 models need more than that.
LOGITS = {"bfloat16": "float16", "float16": "float32"}
LOGIT_BYTES = {"float16": 2, "float32": 4}


@kernel()
def pool(group: int, logits: str, packed: bool, pooled: bool = False):
    """Builder: Scores[b, g, j] = sum over the group's heads of exp2(Logits - lse), zero outside the row's keys.

    Logits (log2 units, of dtype `logits`) are only valid inside the row's keys. Lse is per split, in log2 units. With
    `pooled` the sum is over the heads of all groups, and g is 0.
    """
    f32 = "float32"
    padded = pad(group, logits) if packed else group
    step = min(8 if logits == "float16" else 4, padded * EACH)  # 16 bytes
    B, G, N, splits = T.dynamic("B"), T.dynamic("G"), T.dynamic("N"), T.dynamic("splits")
    heads = G if pooled else 1  # KV heads of one CTA, and of how many the log-sum-exps are in shared memory at once
    shared = WIDTH // EACH // group if pooled else 1

    @T.macro
    def load(Logits, raw, b, g, n, tx):
        if packed:
            for w in T.unroll(padded * EACH // step):
                for e in T.vectorized(step):
                    raw[w * step + e] = Logits[b, g, n, tx * EACH + (w * step + e) // padded, (w * step + e) % padded]
        else:
            for h in T.unroll(group):
                for e in T.vectorized(EACH):
                    raw[h * EACH + e] = Logits[b, g, h, n, tx * EACH + e]

    @T.prim_func
    def pool_kernel(
        Logits: T.Tensor((B, G, N, WIDTH, padded) if packed else (B, G, group, N, WIDTH), logits),
        Lse: T.Tensor((B, G, splits, group), f32),
        Start: T.Tensor((B,), "int32"),
        Length: T.Tensor((B,), "int32"),
        Scores: T.Tensor((B, 1 if pooled else G, N, WIDTH), f32),
    ):
        with T.Kernel(N, 1 if pooled else G, B, threads=WIDTH // EACH) as (n, first, b):
            total = T.alloc_shared((shared * group,), f32)
            raw = T.alloc_local((padded * EACH,), logits)
            summed = T.alloc_local((EACH,), f32)
            lo = T.alloc_var("int32")
            hi = T.alloc_var("int32")
            peak = T.alloc_var(f32)
            mass = T.alloc_var(f32)
            tx = T.get_thread_binding()
            T.pdl_sync()
            T.pdl_trigger()
            lo = Start[b] - n * WIDTH
            hi = lo + Length[b]
            for e in T.unroll(EACH):
                summed[e] = 0.0
            if lo < WIDTH and hi > 0:
                # The logits are on their way while the log-sum-exps are put together.
                load(Logits, raw, b, first, n, tx)
                for block in T.serial(T.ceildiv(heads, shared)):
                    if tx < T.min(shared, heads - block * shared) * group:
                        peak = -(2.0**30)
                        mass = 0.0
                        for s in T.serial(splits):
                            peak = T.max(peak, Lse[b, first + block * shared + tx // group, s, tx % group])
                        for s in T.serial(splits):
                            mass += T.exp2(Lse[b, first + block * shared + tx // group, s, tx % group] - peak)
                        # Over NaN or inf logits the sum is NaN: norm inf leaves NaN at those slots, 0 at the others.
                        total[tx] = T.if_then_else(mass >= 0, peak + T.log2(mass), T.infinity(f32))
                    T.sync_threads()
                    for u in T.serial(T.min(shared, heads - block * shared)):
                        for h in T.unroll(group):
                            for e in T.unroll(EACH):
                                if packed:
                                    summed[e] += T.exp2(T.cast(raw[e * padded + h], f32) - total[u * group + h])
                                else:
                                    summed[e] += T.exp2(T.cast(raw[h * EACH + e], f32) - total[u * group + h])
                        if block * shared + u + 1 < heads:
                            load(Logits, raw, b, first + block * shared + u + 1, n, tx)
                    if pooled:
                        T.sync_threads()  # before the log-sum-exps of the next groups
                for e in T.unroll(EACH):
                    summed[e] = T.if_then_else(tx * EACH + e >= lo and tx * EACH + e < hi, summed[e], 0.0)
            for e in T.vectorized(EACH):
                Scores[b, first, n, tx * EACH + e] = summed[e]

    return pool_kernel


def storable(logit: Any) -> Any:
    """A float32 logit within float16's range, but for NaN and +-inf, which must be found again.

    The clamp drops them and the tiny multiple brings them back, in one FMA: at most 4, it rounds away. A comparison
    would cost the stores their vectors.
    """
    return T.min(T.max(logit, -FLOAT16_MAX), FLOAT16_MAX) + logit * 2.0**-126


def pad(group: int, logits: str) -> int:
    """Heads of a slot in packed logits of that dtype: a power of two; four bytes or more, for cp.async."""
    return max(1 << (group - 1).bit_length(), 2 if logits == "float16" else 1)


def workspace(
    batch: int, kv_heads: int, group: int, slots: int, splits: int, dtype: str, device: torch.device, *, packed: bool
) -> tuple[Tensor, Tensor]:
    """(logits, split log-sum-exps float32 [B, G, splits, R]) for a scoring kernel.

    Logits are [B, G, N, WIDTH, heads] if `packed` (all heads of a slot side by side), else [B, G, R, N, WIDTH].
    """
    blocks = -(-slots // WIDTH)
    shape = (blocks, WIDTH, pad(group, LOGITS[dtype])) if packed else (group, blocks, WIDTH)
    logits = torch.empty((batch, kv_heads, *shape), dtype=getattr(torch, LOGITS[dtype]), device=device)
    return logits, torch.empty((batch, kv_heads, splits, group), dtype=torch.float32, device=device)


def pooled_scores(
    logits: Tensor, lse: Tensor, kv_start: Tensor, kv_len: Tensor, slots: int, *, packed: bool, pooled: bool = False
) -> Tensor:
    """Scores float32 [B, G, slots], or [B, 1, slots] if `pooled`, of rows as long as multiples of WIDTH."""
    batch, kv_heads, _, group = lse.shape
    blocks, sets = -(-slots // WIDTH), 1 if pooled else kv_heads
    scores = torch.empty((batch, sets, blocks, WIDTH), dtype=torch.float32, device=logits.device)
    build = pool(group=group, logits=str(logits.dtype)[6:], packed=packed, pooled=pooled)
    build(logits, lse, kv_start, kv_len, scores)
    return scores.view(batch, sets, blocks * WIDTH)[..., :slots]
