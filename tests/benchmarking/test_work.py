"""Operations and bytes against counts made by brute force and by hand."""

import numpy as np
import pytest

from kascade_cli.benchmarking.work import Workload, work_of
from kascade_cli.schema import Budget


def make_case(phase="prefill", batch=2, context=100, heads=8, groups=2, size=16, element=2, **budget):
    return Workload(
        phase, batch, context, heads, groups, size, element, Budget(**{"min_keys": 8, "tile": 32} | budget)
    )


def masks(case):
    """bool [T, S]: causal pairs, and those of them before the query's tile."""
    query, key = np.mgrid[: case.context, : case.context]
    causal = key <= query
    return causal, causal & (key < query // case.budget.tile * case.budget.tile)


@pytest.mark.parametrize("context", [1, 31, 32, 33, 100, 257])
def test_pairs_are_those_of_the_masks(context):
    case = make_case(context=context, ratio=0.3, min_keys=5)
    causal, before = masks(case)
    assert case.dense_pairs() == causal.sum()
    assert case.before_pairs() == before.sum()
    assert case.diagonal() == (causal & ~before).sum()
    chosen = [min(n, max(5, int(np.ceil(0.3 * n - 1e-6)))) for n in before.sum(1)]
    assert case.sparse_pairs() == sum(chosen) + (causal & ~before).sum()


def test_dense_prefill_of_llama_at_128k_is_141_tflop():
    case = Workload("prefill", 1, 131072, 32, 8, 128, 2, Budget())
    assert work_of("prefill_dense", case).flops == pytest.approx(140.7e12, rel=1e-3)


def test_dense_decode_of_llama_at_64_x_32k_moves_8_59_gb():
    case = Workload("decode", 64, 32768, 32, 8, 128, 2, Budget())
    work = work_of("decode_dense", case)
    assert work.bytes == 64 * 32768 * 4096
    assert work.rates(2.0) == {"gb_s": pytest.approx(8.59e9 / 2e-3 / 1e9, rel=1e-3), "tflop_s": None}


def test_sparse_decode_reads_the_budget_and_its_indices():
    case = make_case("decode", context=1000, ratio=0.1, min_keys=8)
    # 100 keys of 2 x 2 heads: K and V rows of 16 x 2 bytes, and an int32 index each
    assert work_of("decode_sparse", case).bytes == 2 * 2 * 100 * (2 * 32 + 4)
    assert work_of("decode_sparse+logits", case).bytes == 2 * 2 * 100 * (32 + 4)


def test_decode_score_reads_keys_once_and_writes_scores():
    case = make_case("decode", context=1000)
    assert work_of("decode_score", case).bytes == 2 * 2 * 1000 * (32 + 4)


def test_top_k_of_a_block_of_tiles_counts_only_that_block():
    case = make_case(context=128, ratio=0.5, min_keys=1)
    rows = [(64, 32), (96, 48)]
    assert work_of("select_topk", case, tiles=(2, 4)).bytes == 4 * 2 * 2 * sum(a + b for a, b in rows)


def test_sparse_prefill_counts_both_products():
    case = make_case(batch=1, context=64, heads=4, groups=1, ratio=0.5, min_keys=1)
    pairs = 32 * 33 // 2 * 2 + 32 * 16
    assert work_of("prefill_sparse", case).flops == 2 * 2 * 4 * 16 * pairs


def test_unknown_op():
    with pytest.raises(ValueError, match="no op"):
        work_of("attention", make_case())
