"""The decode half of the TileLang backend: what is refused, the plans, and, on a GPU, the numerics."""

import pytest
import torch

pytest.importorskip("tilelang")

from kascade_cli.errors import KascadeError
from kascade_cli.kernels import get_backend
from kascade_cli.kernels.contract import Unsupported
from kascade_cli.kernels.testing import decode
from kascade_cli.kernels.tilelang import arguments, select_topk, specs
from kascade_cli.kernels.tilelang.compile import prebuild, require_hopper
from kascade_cli.kernels.tilelang.decode_dense import decode_dense
from kascade_cli.kernels.tilelang.decode_sparse import decode_sparse
from kascade_cli.kernels.tilelang.rows import row_view, spread

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.mark.parametrize("rows", [1, 8, 32, 66, 67, 128, 264, 265, 4096])
@pytest.mark.parametrize("vectors", [1, 300, 8192, 131072])
def test_selection_plans_are_compiled_variants(rows: int, vectors: int):
    chosen = select_topk.plan(rows, vectors, 132)
    assert chosen in select_topk.variants()
    assert chosen["cluster"] == 1 or (vectors > select_topk.STAGED and chosen["cluster"] * rows <= 132)


@pytest.mark.parametrize(
    ("rows", "slots", "cluster", "threads"),
    [
        (8, 65536, 8, 1024), (24, 65536, 4, 1024), (64, 65536, 2, 1024), (67, 65536, 1, 1024), (128, 8192, 1, 1024),
        (128, 2048, 1, 512), (256, 16384, 1, 512), (256, 2048, 1, 512), (8, 16384, 1, 1024), (512, 131072, 1, 1024),
    ],
)  # fmt: skip
def test_selection_plans_that_were_fastest(rows: int, slots: int, cluster: int, threads: int):
    # Measured on an H200: 256 rows of 2k took 40 us in pairs and take 7 so; 64 of 64k took 39 us alone and take 25.
    chosen = select_topk.plan(rows, slots // 4, 132)
    assert (chosen["cluster"], chosen["threads"]) == (cluster, threads)


def decode_inputs(**change: torch.Tensor) -> dict[str, torch.Tensor]:
    """Valid arguments of decode_sparse on the CPU: batch 2, 8 heads over 2, 64 slots of 64."""
    made = {
        "q": torch.zeros(2, 8, 64, dtype=torch.bfloat16),
        "k": torch.zeros(2, 2, 64, 64, dtype=torch.bfloat16),
        "v": torch.zeros(2, 2, 64, 64, dtype=torch.bfloat16),
        "indices": torch.zeros(2, 2, 16, dtype=torch.int32),
        "counts": torch.zeros(2, dtype=torch.int32),
        "head_map": torch.zeros(2, dtype=torch.int32),
    }
    return {**made, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 8, 64)}, "bfloat16 and float16"),
        ({"k": torch.zeros(2, 2, 64, 64, dtype=torch.float16)}, "use one dtype"),
        ({"v": torch.zeros(2, 2, 32, 64, dtype=torch.bfloat16)}, "must agree"),
        ({"q": torch.zeros(2, 8, 96, dtype=torch.bfloat16)}, "head size"),
        ({"q": torch.zeros(2, 7, 64, dtype=torch.bfloat16)}, "whole groups"),
        ({"q": torch.zeros(2, 34, 64, dtype=torch.bfloat16)}, "groups of 1 to 16"),
        ({"q": torch.zeros(3, 8, 64, dtype=torch.bfloat16)}, "batch 3"),
        ({"counts": torch.zeros(2, dtype=torch.int64)}, "must be int32"),
        ({"counts": torch.zeros(3, dtype=torch.int32)}, r"needs \[2\]"),
        ({"indices": torch.zeros(3, 2, 16, dtype=torch.int32)}, "indices has shape"),
        ({"head_map": torch.zeros(3, dtype=torch.int32)}, "head_map has shape"),
        ({"k": torch.zeros(2, 2, 64, 128, dtype=torch.bfloat16)[..., ::2]}, "strides"),
        ({"k": torch.zeros(2, 64, 2, 64, dtype=torch.bfloat16).transpose(1, 2)}, "strides"),
        ({"k": torch.zeros(2 * 2 * 64 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 2, 64, 64)}, "16-byte"),
        ({}, "Hopper GPU"),
    ],
)
def test_one_line_says_what_is_wrong(change: dict[str, torch.Tensor], message: str):
    with pytest.raises(KascadeError, match=message) as caught:
        decode_sparse(**decode_inputs(**change), scale=1.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 2, 63, 4), torch.float16), ((2, 2, 64, 3), torch.float16), ((2, 2, 64, 4), torch.float32),
     ((2, 8, 64), torch.float16)],
)  # fmt: skip
def test_logits_must_be_those_of_this_backend(shape: tuple[int, ...], dtype: torch.dtype):
    with pytest.raises(Unsupported, match=r"must be contiguous float16 \[2, 2, 64 or more, 4\]"):
        decode_sparse(**decode_inputs(), scale=1.0, logits=torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("page", "table", "message"),
    [
        (24, torch.zeros(2, 4, dtype=torch.int32), "powers of two"),
        (512, torch.zeros(2, 4, dtype=torch.int32), "powers of two"),
        (16, torch.zeros(3, 4, dtype=torch.int32), "block_table has shape"),
        (16, torch.zeros(2, 4, dtype=torch.int64), "block_table is int64"),
    ],
)
def test_paged_arguments(page: int, table: torch.Tensor, message: str):
    pages = torch.zeros(8, page, 2, 64, dtype=torch.bfloat16)
    lengths = torch.zeros(2, dtype=torch.int32)
    q = torch.zeros(2, 8, 64, dtype=torch.bfloat16)
    with pytest.raises(Unsupported, match=message):
        decode_dense(q, pages, pages, lengths, lengths, scale=1.0, block_table=table)


def test_a_slice_of_a_static_cache_is_seen_whole():
    cache = torch.arange(2 * 3 * 40 * 64, dtype=torch.float32).view(2, 3, 40, 64).half()
    view = arguments.cache_view(cache[:, :, :17], "k")
    assert view.shape == (2, 3, 40, 64)
    assert view.data_ptr() == cache.data_ptr()
    one = arguments.cache_view(cache[:1, :1, :17], "k")
    assert torch.equal(one[:, :, :17], cache[:1, :1, :17])
    with pytest.raises(Unsupported, match="contiguous"):
        arguments.cache_view(cache[:, :, 3:], "k")


@pytest.mark.parametrize(
    ("rows", "blocks"), [(1, 1), (1, 8192), (8, 2048), (32, 512), (128, 205), (512, 512), (5000, 9)]
)
def test_splits_fill_the_machine(rows: int, blocks: int):
    splits = arguments.split_count(rows, blocks, 132)
    assert 1 <= splits <= min(64, blocks)
    if rows >= 512:
        assert splits == 1
    if rows < 64 and blocks >= 512:
        assert rows * splits >= 120 or splits >= 60


@pytest.mark.parametrize("rows", [1, 3, 8, 32, 128, 132, 133, 512])
@pytest.mark.parametrize("blocks", [1, 2, 7, 512])
def test_even_splits_are_the_most_that_fit_two_to_an_sm(rows: int, blocks: int):
    fitting = [s for s in (1, 2, 4, 8, 16, 32, 64) if s == 1 or (rows * s <= 264 and s <= blocks)]
    assert arguments.even_split_count(rows, blocks, 132) == max(fitting)


@pytest.mark.parametrize(
    ("shape", "full"), [((), (3, 4, 5)), ((5,), (3, 4, 5)), ((3, 1, 1), (3, 4, 5)), ((3, 1, 5), (3, 4, 5)),
                        ((3, 4, 5), (3, 4, 5)), ((1, 4, 1), (3, 4, 5)), ((1, 1), (1, 7)), ((2, 1), (2, 7))]
)  # fmt: skip
def test_row_parameters_are_read_where_broadcasting_puts_them(shape: tuple[int, ...], full: tuple[int, ...]):
    value = torch.arange(max(1, torch.Size(shape).numel()), dtype=torch.int32).reshape(shape)
    flat, over, of = spread(value, torch.Size(full))
    row = torch.arange(torch.Size(full).numel())
    assert torch.equal(flat[row // over * of + row % of], value.expand(full).reshape(-1))


def test_score_rows_are_viewed_where_they_can_be():
    padded = torch.rand(2, 3, 128)
    rows = row_view(padded[..., :100])
    assert rows.shape == (6, 32, 4)
    assert rows.data_ptr() == padded.data_ptr()
    odd = torch.rand(2, 3, 33)
    rows = row_view(odd)
    assert rows.shape == (6, 9, 4)
    assert torch.equal(rows.view(6, 36)[:, :33], odd.view(6, 33))
    cut = torch.rand(4, 64)[:, 1:61]
    assert torch.equal(row_view(cut).view(4, -1)[:, :60], cut)


def test_hopper_is_required():
    with pytest.raises(KascadeError, match="Hopper GPU"):
        require_hopper(torch.device("cpu"))


def test_the_check_itself_passes_on_the_reference():
    """The rule, the poisoning and the cases hold for plain PyTorch."""
    ops, device = get_backend("torch", "cpu"), torch.device("cpu")
    rows = decode.check_decode(ops, device, decode.CASES[:2] + decode.CASES[10:11])
    rows += decode.check_select(ops, device, (1, 33))
    assert rows
    assert decode.summary(rows)


@needs_gpu
def test_numerics_on_the_gpu():
    ops, device = get_backend("tilelang", "cuda"), torch.device("cuda")
    found = specs.select_specs()
    for case in decode.CASES:
        found += specs.decode_specs(case.heads // case.kv_heads, case.dim, str(case.dtype)[6:], case.page)
    assert not prebuild(list({str(spec): spec for spec in found}.values()))
    rows = decode.check_decode(ops, device) + decode.check_select(ops, device)
    rows += decode.stress_decode(ops, device) + decode.check_graph(ops, device)
    assert decode.summary(rows)
