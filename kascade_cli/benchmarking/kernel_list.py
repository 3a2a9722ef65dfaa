"""Which kernels to compile to judge them all: the corners of the support matrix."""

from kascade_cli.kernels.tilelang.compile import Spec
from kascade_cli.kernels.tilelang.prefill_specs import prefill_specs
from kascade_cli.kernels.tilelang.specs import decode_specs, select_specs

# (query heads per KV head, head size, dtype, page size of the cache or 0). The first is the paper's shape.
CORNERS = ((4, 128, "bfloat16", 0), (1, 128, "float16", 256), (7, 128, "float16", 64), (16, 64, "bfloat16", 16))


def unique(found: list[Spec]) -> list[Spec]:
    """Each spec once, in order."""
    return list({str(spec): spec for spec in found}.values())


def corner_specs() -> list[Spec]:
    """Every kernel of the support matrix's corners."""
    found = select_specs()
    for group, head_dim, dtype, page in CORNERS:
        found += decode_specs(group, head_dim, dtype, page) + prefill_specs(group, head_dim, dtype)
        found += prefill_specs(group, head_dim, dtype, page=page)
    return unique(found)
