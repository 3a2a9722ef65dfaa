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
def pool(group: int, logits: str, packed: bool):
    """Builder: Scores[b, g, j] = sum over the group's heads of exp2(Logits - lse), zero outside the row's keys.

    Logits (log2 units, of dtype `logits`) are only valid inside the row's keys. Lse is per split, in log2 units.
    """
    f32 = "float32"
    padded = pad(group, logits) if packed else group
    step = min(8 if logits == "float16" else 4, padded * EACH)  # 16 bytes
    B, G, N, splits = T.dynamic("B"), T.dynamic("G"), T.dynamic("N"), T.dynamic("splits")

    @T.prim_func
    def pool_kernel(
        Logits: T.Tensor((B, G, N, WIDTH, padded) if packed else (B, G, group, N, WIDTH), logits),
        Lse: T.Tensor((B, G, splits, group), f32),
        Start: T.Tensor((B,), "int32"),
        Length: T.Tensor((B,), "int32"),
        Scores: T.Tensor((B, G, N, WIDTH), f32),
    ):
        with T.Kernel(N, G, B, threads=WIDTH // EACH) as (n, g, b):
            total = T.alloc_shared((group,), f32)
            raw = T.alloc_local((padded * EACH,), logits)
            pooled = T.alloc_local((EACH,), f32)
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
                pooled[e] = 0.0
            if lo < WIDTH and hi > 0:
                # The logits are on their way while the log-sum-exps are put together.
                if packed:
                    for w in T.unroll(padded * EACH // step):
                        for e in T.vectorized(step):
                            raw[w * step + e] = Logits[
                                b, g, n, tx * EACH + (w * step + e) // padded, (w * step + e) % padded
                            ]
                else:
                    for h in T.unroll(group):
                        for e in T.vectorized(EACH):
                            raw[h * EACH + e] = Logits[b, g, h, n, tx * EACH + e]
                if tx < group:
                    peak = -(2.0**30)
                    mass = 0.0
                    for s in T.serial(splits):
                        peak = T.max(peak, Lse[b, g, s, tx])
                    for s in T.serial(splits):
                        mass += T.exp2(Lse[b, g, s, tx] - peak)
                    # Over NaN or inf logits the sum is NaN: norm inf leaves NaN at those slots and 0 at the others.
                    total[tx] = T.if_then_else(mass >= 0, peak + T.log2(mass), T.infinity(f32))
                T.sync_threads()
                for h in T.unroll(group):
                    for e in T.unroll(EACH):
                        if packed:
                            pooled[e] += T.exp2(T.cast(raw[e * padded + h], f32) - total[h])
                        else:
                            pooled[e] += T.exp2(T.cast(raw[h * EACH + e], f32) - total[h])
                for e in T.unroll(EACH):
                    pooled[e] = T.if_then_else(tx * EACH + e >= lo and tx * EACH + e < hi, pooled[e], 0.0)
            for e in T.vectorized(EACH):
                Scores[b, g, n, tx * EACH + e] = pooled[e]

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
    logits: Tensor, lse: Tensor, kv_start: Tensor, kv_len: Tensor, slots: int, *, packed: bool
) -> Tensor:
    """Scores float32 [B, G, slots]: the first slots of an allocation whose rows are multiples of WIDTH."""
    batch, kv_heads, _, group = lse.shape
    blocks = -(-slots // WIDTH)
    scores = torch.empty((batch, kv_heads, blocks, WIDTH), dtype=torch.float32, device=logits.device)
    pool(group=group, logits=str(logits.dtype)[6:], packed=packed)(logits, lse, kv_start, kv_len, scores)
    return scores.view(batch, kv_heads, blocks * WIDTH)[..., :slots]
