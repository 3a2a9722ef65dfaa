"""Which kernels a shape needs, for compiling them ahead of the first call (see `compile.prebuild`)."""

from kascade_cli.kernels.tilelang import decode_dense, decode_score, decode_sparse, pool, select_topk
from kascade_cli.kernels.tilelang.compile import Spec


def decode_specs(group: int, head_dim: int, dtype: str, page: int = 0) -> list[Spec]:
    """The decode kernels of a GQA group, head size, dtype ("bfloat16", "float16") and page size (0: contiguous)."""
    config = {"group": group, "head_dim": head_dim, "dtype": dtype, "page": page}
    return [
        decode_dense.dense.spec(**config, write=True),
        decode_dense.dense.spec(**config, write=False),
        decode_dense.merge.spec(group=group, head_dim=head_dim, dtype=dtype),
        decode_score.score.spec(**config),
        decode_sparse.sparse.spec(**config, known=False),
        decode_sparse.sparse.spec(**config, known=True),
        pool.pool.spec(group=group, logits=pool.LOGITS[dtype], packed=False, pooled=False),
        *(
            pool.pool.spec(group=group, logits=pool.LOGITS[dtype], packed=True, pooled=pooled)
            for pooled in (False, True)
        ),
    ]


def select_specs() -> list[Spec]:
    """Every variant of the selection kernel."""
    return [select_topk.topk.spec(**config) for config in select_topk.variants()]
