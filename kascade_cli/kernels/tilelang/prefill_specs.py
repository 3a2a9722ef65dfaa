"""Which prefill kernels a shape needs, for compiling them ahead of the first call (see `compile.prebuild`)."""

from kascade_cli.kernels.tilelang.compile import Spec
from kascade_cli.kernels.tilelang.prefill_dense import dense_kernel
from kascade_cli.kernels.tilelang.prefill_lse import lse_kernel
from kascade_cli.kernels.tilelang.prefill_score import score_kernel, score_plan
from kascade_cli.kernels.tilelang.prefill_sparse import sparse_heads, sparse_kernel
from kascade_cli.kernels.tilelang.prefill_sparse_lse import sparse_lse_kernel


def prefill_specs(group: int, head_dim: int, dtype: str, tile: int = 32, page: int = 0) -> list[Spec]:
    """The prefill kernels of a GQA group, head size, dtype ("bfloat16", "float16"), tile and page size (0: contiguous
    keys and padded rows)."""
    base = {"dtype": dtype, "head_dim": head_dim} | ({"page": page} if page else {})
    heads, pair, launches = score_plan(group, tile)
    score = {**base, "group": group, "heads": heads, "tile": tile, "pair": pair}
    sparse = {**base, "group": group, "heads": sparse_heads(group, tile), "tile": tile}
    return [
        lse_kernel.spec(**base),
        dense_kernel.spec(**base),
        *(score_kernel.spec(**score, add=add) for add in (False, True)[: min(launches, 2)]),
        sparse_kernel.spec(**sparse),
        sparse_lse_kernel.spec(**sparse),
    ]
