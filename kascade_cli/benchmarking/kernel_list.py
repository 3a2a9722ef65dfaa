"""Which kernels to compile ahead: those of a shape, and the corners of the support matrix."""

from kascade_cli.kernels.tilelang import prefill_dense, prefill_score, prefill_sparse, specs
from kascade_cli.kernels.tilelang.compile import Spec

# (query heads per KV head, head size, dtype, page size of the decode cache or 0). The first is the paper's shape.
CORNERS = ((4, 128, "bfloat16", 0), (1, 128, "float16", 256), (7, 128, "float16", 64), (16, 64, "bfloat16", 16))


def prefill_specs(group: int, head_dim: int, dtype: str, tile: int = 32) -> list[Spec]:
    """The prefill kernels of a GQA group, head size, dtype ("bfloat16", "float16") and tile."""
    config = {"dtype": dtype, "head_dim": head_dim}
    heads, pair, launches = prefill_score.score_plan(group, tile)
    score = {**config, "group": group, "heads": heads, "tile": tile, "pair": pair}
    sparse = {**config, "group": group, "heads": prefill_sparse.sparse_heads(group, tile), "tile": tile}
    return [
        prefill_dense.dense_kernel.spec(**config),
        prefill_dense.lse_kernel.spec(**config),
        *(prefill_score.score_kernel.spec(**score, add=add) for add in (False, True)[: min(launches, 2)]),
        prefill_sparse.sparse_kernel.spec(**sparse),
    ]


def unique(found: list[Spec]) -> list[Spec]:
    """Each spec once, in order."""
    return list({str(spec): spec for spec in found}.values())


def corner_specs() -> list[Spec]:
    """Every kernel of the support matrix's corners."""
    found = specs.select_specs()
    for group, head_dim, dtype, page in CORNERS:
        found += specs.decode_specs(group, head_dim, dtype, page) + prefill_specs(group, head_dim, dtype)
    return unique(found)
