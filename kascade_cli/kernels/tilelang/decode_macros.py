"""What the decode kernels have in common, as TileLang macros."""

from typing import Any

import tilelang.language as T


def block_loader(page: int, block: int, head_dim: int) -> Any:
    """A macro load(Cache, into, Table, b, g, lo, k, begin, end): block lo + k of row b, head g.

    By TMA, except where a block spans several pages (`page` slots, a power of two; 0: contiguous); slots outside of
    [begin, end) repeat the nearest one inside there, since their pages may not exist.
    """

    @T.macro
    def load(Cache, into, Table, b, g, lo: T.Ref, k, begin: T.Ref, end: T.Ref):
        if not page:
            T.copy(Cache[b, g, (lo + k) * block : (lo + k + 1) * block, :], into)
        elif page % block == 0:
            T.copy(
                Cache[
                    Table[b, (lo + k) * block // page], (lo + k) * block % page : (lo + k) * block % page + block, g, :
                ],
                into,
            )
        else:
            for i, j in T.Parallel(block, head_dim):
                into[i, j] = Cache[
                    Table[b, T.max(T.min((lo + k) * block + i, end - 1), begin) // page],
                    T.max(T.min((lo + k) * block + i, end - 1), begin) % page,
                    g,
                    j,
                ]

    return load


def online_softmax(rows: int, keys: int) -> Any:
    """A macro update(logit, weight, top, before, fade, part, total, acc) for one block of `keys` logits in log2 units.

    logit [rows, keys] becomes its exponentials over the running maximum `top`, also as `weight` for the product with
    V; `total` is the running sum, and what `acc` [rows, head_dim] holds fades by what the maximum grew.
    """

    @T.macro
    def update(logit, weight, top, before, fade, part, total, acc):
        T.copy(top, before)
        T.reduce_max(logit, top, dim=1, clear=False)
        for i in T.Parallel(rows):
            fade[i] = T.exp2(before[i] - top[i])
        for i, j in T.Parallel(rows, keys):
            logit[i, j] = T.exp2(logit[i, j] - top[i])
        T.reduce_sum(logit, part, dim=1)
        for i in T.Parallel(rows):
            total[i] = total[i] * fade[i] + part[i]
        for i, j in T.Parallel(rows, acc.shape[1]):
            acc[i, j] *= fade[i]
        T.copy(logit, weight)

    return update
