"""What every backend agrees on: the ops by name, the units they exchange, what is built, and how one says no.

Signatures, shapes and semantics of the ops are those of `reference`, which is their specification. What a caller
may rely on beyond them:
- An op that raises `Unsupported` has written nothing: the reference can run the same arguments.
- `decode_*` read kv_start and kv_len (a decode query sees all of its row); `prefill_*` read query_start as well,
  before them. All are int32 [B] on the device: an op cannot tell one from another, the caller's order decides.
- `select_topk` of `tilelang` takes scores that are not negative (it cannot look at the data to refuse): callers that
  rank anything but probabilities use the reference.
- NaN is kept by `torch` (see there). `tilelang`, by its source: dense and sparse decode and sparse prefill keep it;
  `prefill_dense` gives zeros for a query whose sum is NaN, with a NaN log-sum-exp; `decode_score` gives NaN at
  the slots of NaN keys (all, for a NaN query) and 0 at the others; `prefill_score` NaN everywhere; `select_topk` ranks
  NaN first.
- `indices` hold slots of the row in their first `counts` entries; what stands behind them is not used.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from kascade_cli.errors import KascadeError

OPS = (
    "decode_dense",
    "decode_score",
    "select_topk",
    "decode_sparse",
    "prefill_dense",
    "prefill_score",
    "prefill_sparse",
    "prefill_sparse_lse",
)
# Logits leave an op in log2 units, log-sum-exps in natural ones.
LN2 = 0.6931471805599453
LOG2E = 1.4426950408889634
# What the TileLang kernels are built for, in bfloat16 and float16.
HEAD_DIMS = (64, 128)
MAX_GROUP = 16
TILES = (8, 16, 32, 64, 128)

# progress(total) is entered before the first of `total` steps; what it gives is called after each.
Progress = Callable[[int], AbstractContextManager[Callable[[], None]]]


class Unsupported(KascadeError):
    """This op cannot run these arguments; the message says why. With `auto` the reference takes over."""


def tile_count(queries: int, tile: int, aligned: bool = False) -> int:
    """Tiles that `queries` consecutive tokens can touch; one fewer when they start on a tile's edge."""
    return -(-queries // tile) + (0 if aligned else 1)


def first_tile(query_start: Tensor, kv_start: Tensor, tile: int) -> Tensor:
    """Tile index of each row's first query, int32 [B]."""
    return (query_start - kv_start).clamp_min(0) // tile
