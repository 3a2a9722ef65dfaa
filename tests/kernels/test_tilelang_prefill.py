"""The prefill half of the TileLang backend: what is refused and, on a GPU, the numerics."""

from typing import Any

import pytest
import torch

pytest.importorskip("tilelang")

from kascade_cli.errors import KascadeError
from kascade_cli.kernels import get_backend, reference
from kascade_cli.kernels.contract import Unsupported
from kascade_cli.kernels.testing import prefill
from kascade_cli.kernels.tilelang import prefill_common
from kascade_cli.kernels.tilelang.prefill_dense import prefill_dense
from kascade_cli.kernels.tilelang.prefill_score import prefill_score, score_plan
from kascade_cli.kernels.tilelang.prefill_sparse import prefill_sparse, sparse_heads
from kascade_cli.kernels.tilelang.prefill_sparse_lse import prefill_sparse_lse

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("tile", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("group", range(1, 17))
def test_plans_cover_every_head(group: int, tile: int):
    heads, pair, launches = score_plan(group, tile)
    assert heads * tile <= 128
    assert (heads if pair else 2 * heads) * launches >= group
    assert pair == (launches == 1 and heads == group)
    # No launch is empty, and the last one has a head in its first row block.
    assert (launches - 1) * 2 * heads < group
    heads = sparse_heads(group, tile)
    assert heads * tile in (64, 128)


def arguments(**change: Any) -> dict[str, Any]:
    """Valid arguments of prefill_sparse on the CPU: batch 2, 8 heads over 2, 70 queries, 100 slots."""
    made = {
        "q": torch.zeros(2, 70, 8, 64, dtype=BF16).transpose(1, 2),
        "k": torch.zeros(2, 2, 100, 64, dtype=BF16),
        "v": torch.zeros(2, 2, 100, 64, dtype=BF16),
        "indices": torch.zeros(2, 2, 4, 8, dtype=torch.int32),
        "counts": torch.zeros(2, 4, dtype=torch.int32),
        "head_map": torch.zeros(2, dtype=torch.int32),
        "query_start": torch.zeros(2, dtype=torch.int32),
        "kv_start": torch.zeros(2, dtype=torch.int32),
        "kv_len": torch.full((2,), 70, dtype=torch.int32),
        "scale": 0.125,
        "tile": 32,
    }
    return {**made, **change}


def wide(tensor: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(*tensor.shape[:-1], size, dtype=tensor.dtype)


BASE = arguments()
REFUSED = [
    ({"tile": 24}, Unsupported, "tile 24"),
    (
        {"q": BASE["q"].float(), "k": BASE["k"].float(), "v": BASE["v"].float()},
        Unsupported,
        "float32, float32, float32",
    ),
    ({"k": BASE["k"].half()}, Unsupported, "bfloat16, float16, bfloat16"),
    ({name: wide(BASE[name], 256) for name in "qkv"}, Unsupported, "head size 256"),
    ({"q": torch.zeros(2, 34, 70, 64, dtype=BF16)}, Unsupported, "17 query heads per KV head"),
    ({"q": torch.zeros(2, 7, 70, 64, dtype=BF16)}, KascadeError, "7 query heads cannot share 2 KV heads"),
    ({"q": BASE["q"][0]}, KascadeError, "q must be [batch, heads, length, head_dim], not [8, 70, 64]"),
    ({"v": BASE["v"][:, :, :50]}, KascadeError, "k and v must be [2, kv_heads, slots, 64]"),
    ({"kv_len": BASE["kv_len"].long()}, KascadeError, "kv_len must be int32 [2] on cpu, not int64 [2]"),
    ({"kv_start": BASE["kv_start"][:1]}, KascadeError, "kv_start must be int32 [2]"),
    ({"head_map": torch.zeros(8, dtype=torch.int32)}, KascadeError, "head_map must be int32 [2]"),
    ({"counts": torch.zeros(2, 3, dtype=torch.int32)}, KascadeError, "counts must be int32 [2, 4]"),
    ({"indices": BASE["indices"].long()}, KascadeError, "indices must be int32"),
    ({"indices": BASE["indices"][:, :, :2]}, KascadeError, "2 tiles of 32 do not cover 70 queries"),
    ({}, KascadeError, "runs on a Hopper GPU"),
]


@pytest.mark.parametrize(("change", "error", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_what_prefill_refuses(change: dict[str, Any], error: type[KascadeError], text: str):
    with pytest.raises(error) as caught:
        prefill_sparse(**arguments(**change))
    assert text in str(caught.value)
    assert str(caught.value).startswith("prefill_sparse") or "Hopper" in text
    assert "\n" not in str(caught.value)


def test_the_log_sum_exp_of_a_selection_checks_its_arguments():
    def call(**change: Any):
        given = arguments(**change)
        del given["v"]
        return prefill_sparse_lse(**given)

    with pytest.raises(Unsupported, match="prefill_sparse_lse: tile 24"):
        call(tile=24)
    with pytest.raises(KascadeError, match="prefill_sparse_lse: indices for 2 tiles of 32 do not cover 70 queries"):
        call(indices=BASE["indices"][:, :, :2])
    with pytest.raises(KascadeError, match=r"prefill_sparse_lse: head_map must be int32 \[2\]"):
        call(head_map=torch.zeros(8, dtype=torch.int32))
    with pytest.raises(KascadeError, match="runs on a Hopper GPU"):
        call()


def test_dense_and_score_check_their_arguments():
    given = {name: BASE[name] for name in ("q", "k", "query_start", "kv_start", "kv_len", "scale")}
    with pytest.raises(KascadeError, match="k and v must be"):
        prefill_dense(**given, v=BASE["v"][:1])
    with pytest.raises(KascadeError, match=r"lse must be float32 \[2, 8, 70\]"):
        prefill_score(**given, lse=torch.zeros(2, 70, 8), tile=32)
    with pytest.raises(KascadeError, match=r"no tiles \[5, 4\)"):
        prefill_score(**given, lse=None, tile=32, first=5)


def test_views_avoid_copies():
    q = torch.randn(2, 5, 4, 64, dtype=BF16)
    assert prefill_common.queries_view(q.transpose(1, 2)).data_ptr() == q.data_ptr()
    packed = torch.randn(2, 4, 5, 64, dtype=BF16)
    assert torch.equal(prefill_common.queries_view(packed), packed.transpose(1, 2))
    cache = torch.randn(2, 3, 100, 64, dtype=BF16)
    front = prefill_common.cache_view(cache[:, :, :30])
    assert front.shape == cache.shape
    assert front.data_ptr() == cache.data_ptr()
    late = prefill_common.cache_view(cache[:, :, 10:])  # its last row would end past the allocation
    assert torch.equal(late, cache[:, :, 10:])
    odd = torch.randn(2 * 3 * 100 * 64 + 1, dtype=BF16)[1:].view(2, 3, 100, 64)
    assert prefill_common.cache_view(odd).data_ptr() % 16 == 0


@pytest.mark.parametrize(
    "case",
    [
        prefill.ragged(BF16, 2, 64, 70),
        prefill.single(FP16, 1, 64, 33),
        prefill.late(BF16, 3, 64, 150, 40),
    ],
    ids=str,
)
def test_the_check_accepts_the_reference(case: prefill.PrefillCase):
    rows = prefill.check(reference, case, device="cpu")
    assert [row["op"] for row in rows] == list(prefill.NAMES)
    assert all(row["ok"] for row in rows), rows


def test_the_check_rejects_a_wrong_op():
    class Wrong:
        prefill_dense = staticmethod(reference.prefill_dense)
        prefill_sparse = staticmethod(reference.prefill_sparse)

        @staticmethod
        def prefill_sparse_lse(*args: Any, **kwargs: Any) -> torch.Tensor:
            return reference.prefill_sparse_lse(*args, **kwargs).roll(1, dims=1)  # each head gets its neighbour's

        @staticmethod
        def prefill_score(*args: Any, **kwargs: Any) -> torch.Tensor:
            scores = reference.prefill_score(*args, **kwargs)
            return scores.roll(1, dims=2)  # each tile gets its neighbour's scores

    rows = prefill.check(Wrong, prefill.single(BF16, 2, 64, 100), device="cpu")
    assert {row["op"] for row in rows if not row["ok"]} == {"prefill_score", "prefill_sparse_lse"}


CASES = [
    *(prefill.single(BF16, 4, 128, length) for length in (1, 31, 32, 33, 127, 129, 4097)),
    *(prefill.single(FP16, group, 64, 517) for group in (1, 3, 8, 16)),
    *(prefill.ragged(BF16, group, 128, 300) for group in (1, 4, 5)),
    prefill.late(BF16, 4, 128, 32768 + 17, 64),
    prefill.single(BF16, 2, 64, 300, tile=64),
]


@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numerics_within_the_rule(case: prefill.PrefillCase):
    rows = prefill.check(get_backend("tilelang", "cuda"), case)
    assert all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]


@needs_gpu
def test_no_races_over_seeds():
    found = prefill.stress(get_backend("tilelang", "cuda"), prefill.single(BF16, 4, 128, 1100), 8)
    assert not any(found["changed"].values()), found
