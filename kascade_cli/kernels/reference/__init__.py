"""The attention ops in plain PyTorch: the specification of every other backend, and the one that runs anywhere.

Shapes, used throughout
    B batch, H query heads, G KV heads, R = H // G heads of a group, T queries, S key slots, D head size,
    NT tiles, K the widest selection.
Sequences
    `kv_start`, `kv_len`, `query_start` are int32 tensors [B] on the device. Row b's keys are the slots
    [kv_start, kv_start + kv_len) of the cache; query i of row b sits at slot query_start + i and sees the row's slots
    up to its own. A query outside the row's slots is padding: it gives zeros and pools nothing. Slots that are no
    row's may hold anything, NaN too.
Tiles
    A token's index is slot - kv_start, and tile t holds the tokens [t * tile, (t + 1) * tile), so a left-padded row is
    tiled as if it ran alone. Local tile j of row b is tile `first_tile(...)[b] + j`; `tile_count(T, tile)` of them
    always suffice. A tile of which only some queries are present (chunked prefill) uses those.
Ragged
    A serving engine's batch, queries of all rows one after the other and keys in pages: see `kernels.ragged`.
Pooling is post-softmax (paper, section 3.2). Arithmetic is float32, or float64 for float64 inputs.
NaN
    Only what sees nothing becomes zero. A query that sees a NaN key, or is NaN, gives NaN output and log-sum-exp. It
    pools NaN at the keys at fault (their logit is NaN or +inf) and nothing at the others; NaN ranks above every score.
    So the keys at fault are chosen first, and attention over the selection is NaN where dense attention is. A NaN
    value makes the queries of its row (sparse: of its tile) NaN, those before it too.
"""

from kascade_cli.kernels.contract import first_tile, tile_count
from kascade_cli.kernels.reference.common import blame, wide
from kascade_cli.kernels.reference.decode import decode_dense, decode_score, decode_sparse, gather_pages
from kascade_cli.kernels.reference.prefill import prefill_dense, prefill_score, prefill_sparse, prefill_sparse_lse
from kascade_cli.kernels.reference.select import select_topk

__all__ = [
    "blame",
    "decode_dense",
    "decode_score",
    "decode_sparse",
    "first_tile",
    "gather_pages",
    "prefill_dense",
    "prefill_score",
    "prefill_sparse",
    "prefill_sparse_lse",
    "select_topk",
    "tile_count",
    "wide",
]
