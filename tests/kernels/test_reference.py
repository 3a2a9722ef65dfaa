"""The reference ops against loops over single queries in float64, over odd sizes, ragged rows and offsets."""

import math

import pytest
import torch

from kascade_cli.kernels import reference as ops
from kascade_cli.kernels.reference import common

# batch, query heads, KV heads, head dim, [(kv_start, kv_len)], key slots
SHAPES = [
    pytest.param(2, 4, 2, 16, [(0, 33), (5, 28)], 33, id="B2-H4-G2-D16-S33"),
    pytest.param(1, 3, 3, 8, [(0, 1)], 1, id="B1-H3-G3-D8-S1"),
    pytest.param(3, 5, 1, 24, [(0, 129), (128, 1), (31, 98)], 131, id="B3-H5-G1-D24-S131"),
    pytest.param(1, 8, 2, 64, [(7, 200)], 256, id="B1-H8-G2-D64-S256"),
]


def make(batch, heads, groups, size, rows, slots, queries=1, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, size, generator=generator, dtype=dtype)
    k, v = (torch.randn(batch, groups, slots, size, generator=generator, dtype=dtype) for _ in range(2))
    start, length = (torch.tensor(column, dtype=torch.int32) for column in zip(*rows, strict=True))
    return q, k, v, start, length


def naive(q, k, v, row, slot, start, length, keys=None):
    """One query [H, D] at `slot` of batch row `row`: (out [H, D], probabilities [H, S]); `keys` per KV head."""
    heads, groups = q.shape[0], k.shape[1]
    out = torch.zeros(heads, v.shape[-1], dtype=torch.float64)
    probability = torch.zeros(heads, k.shape[2], dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // groups)
        visible = [s for s in range(start, start + length) if s <= slot]
        if keys is not None:
            visible = [s for s in visible if s in keys[group]]
        if not visible:
            continue
        logits = [float(q[head].double() @ k[row, group, s].double()) / math.sqrt(q.shape[-1]) for s in visible]
        peak = max(logits)
        weights = [math.exp(x - peak) for x in logits]
        for s, weight in zip(visible, weights, strict=True):
            probability[head, s] = weight / sum(weights)
            out[head] += weight / sum(weights) * v[row, group, s].double()
    return out, probability


def scale_of(q):
    return 1 / math.sqrt(q.shape[-1])


@pytest.mark.parametrize(("batch", "heads", "groups", "size", "rows", "slots"), SHAPES)
def test_decode(batch, heads, groups, size, rows, slots):
    q, k, v, start, length = make(batch, heads, groups, size, rows, slots)
    q = q[:, :, 0]
    out, scores = ops.decode_dense(q, k, v, start, length, scale=scale_of(q), scores=True)
    for b, (first, count) in enumerate(rows):
        want, probability = naive(q[b], k, v, b, slots, first, count)
        torch.testing.assert_close(out[b], want)
        torch.testing.assert_close(scores[b], probability.unflatten(0, (groups, -1)).sum(1))
    torch.testing.assert_close(ops.decode_score(q, k, start, length, scale=scale_of(q)), scores)
    joined = ops.decode_score(q, k, start, length, scale=scale_of(q), pooled=True)
    for b, (first, count) in enumerate(rows):
        probability = naive(q[b], k, v, b, slots, first, count)[1]
        torch.testing.assert_close(joined[b], probability.sum(0, keepdim=True))


@pytest.mark.parametrize(("batch", "heads", "groups", "size", "rows", "slots"), SHAPES)
def test_decode_sparse_follows_the_head_map(batch, heads, groups, size, rows, slots):
    q, k, v, start, length = make(batch, heads, groups, size, rows, slots, seed=1)
    q = q[:, :, 0]
    counts = torch.tensor([min(count, 3 + b) for b, (_, count) in enumerate(rows)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(2)
    indices = torch.full((batch, groups + 1, 9), -1, dtype=torch.int32)
    for b, (first, count) in enumerate(rows):
        for g in range(groups + 1):
            chosen = torch.randperm(count, generator=generator)[: counts[b]] + first
            indices[b, g, : counts[b]] = chosen.int()
    head_map = torch.tensor([(g + 1) % (groups + 1) for g in range(groups)], dtype=torch.int32)
    out = ops.decode_sparse(q, k, v, indices, counts, head_map, scale=scale_of(q))
    for b, (first, count) in enumerate(rows):
        keys = [set(indices[b, head_map[g], : counts[b]].tolist()) for g in range(groups)]
        torch.testing.assert_close(out[b], naive(q[b], k, v, b, slots, first, count, keys)[0])


def test_decode_sparse_with_the_logits_of_scoring_does_not_read_keys():
    q, k, v, start, length = make(2, 6, 2, 24, [(2, 31), (0, 17)], 37, seed=5)
    q, scale = q[:, :, 0], scale_of(q)
    scores, logits = ops.decode_score(q, k, start, length, scale=scale, logits=True)
    torch.testing.assert_close(scores, ops.decode_score(q, k, start, length, scale=scale))
    for b, head, slot in ((0, 0, 2), (0, 5, 32), (1, 3, 16)):
        expected = (q[b, head] * k[b, head // 3, slot]).sum() * scale / math.log(2)
        torch.testing.assert_close(logits[b, head // 3, slot, head % 3], expected)
    counts = torch.tensor([9, 4], dtype=torch.int32)
    indices = ops.select_topk(scores, counts[:, None], start[:, None], length[:, None], max_count=9)
    head_map = torch.tensor([1, 0], dtype=torch.int32)
    want = ops.decode_sparse(q, k, v, indices, counts, head_map, scale=scale)
    padded = torch.cat([logits, torch.full_like(logits[..., :1], math.nan)], -1)  # heads past the group's are ignored
    k = torch.full_like(k, math.nan)
    out = ops.decode_sparse(q, k, v, indices, counts, head_map, scale=scale, logits=padded)
    torch.testing.assert_close(out, want)


def test_decode_sparse_of_nothing_is_zero():
    q, k, v, *_ = make(1, 4, 2, 8, [(0, 5)], 5)
    indices = torch.full((1, 2, 4), -1, dtype=torch.int32)
    out = ops.decode_sparse(q[:, :, 0], k, v, indices, torch.tensor([0]), torch.tensor([0, 1]), scale=1.0)
    assert torch.equal(out, torch.zeros_like(out))


def test_paged_decode_equals_contiguous():
    q, k, v, start, length = make(2, 4, 2, 16, [(0, 40), (3, 30)], 48, seed=3)
    q, page = q[:, :, 0], 16
    order = torch.tensor([[4, 0, 2], [5, 1, 3]], dtype=torch.int32)
    paged_k, paged_v = (torch.zeros(6, page, 2, 16, dtype=k.dtype) for _ in range(2))
    for b in range(2):
        for slot in range(48):
            paged_k[order[b, slot // page], slot % page] = k[b, :, slot]
            paged_v[order[b, slot // page], slot % page] = v[b, :, slot]
    indices = torch.tensor([[[0, 39, 17], [5, 6, 7]], [[3, 32, 20], [10, 30, 31]]], dtype=torch.int32)
    counts, identity = torch.tensor([3, 2]), torch.tensor([1, 0])
    for pages in (None, order):
        keys, values = (k, v) if pages is None else (paged_k, paged_v)
        dense = ops.decode_dense(q, keys, values, start, length, scale=0.3, scores=True, block_table=pages)
        sparse = ops.decode_sparse(q, keys, values, indices, counts, identity, scale=0.3, block_table=pages)
        if pages is None:
            want = (*dense, sparse)
    for got, expected in zip((*dense, sparse), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("count", [0, 1, 5, 37, 64, 100])
@pytest.mark.parametrize("kind", ["random", "equal", "one", "spike", "denormal", "ties"])
def test_select_topk(count, kind):
    generator = torch.Generator().manual_seed(count)
    scores = torch.rand(3, 2, 70, generator=generator)
    if kind == "equal":
        scores[:] = 0.25
    elif kind == "one":
        scores[:] = 0.0
        scores[..., 41] = 1.0
    elif kind == "spike":
        scores[..., 33] = 3e38
    elif kind == "denormal":
        scores *= 1e-41
    elif kind == "ties":
        scores = (scores * 4).round() / 4
    start, length = torch.tensor([[0], [3], [10]]), torch.tensor([[70], [64], [20]])
    counts = torch.full((3, 2), count, dtype=torch.int32)
    got = ops.select_topk(scores, counts, start, length, max_count=100)
    assert got.shape == (3, 2, 100)
    assert got.dtype == torch.int32
    for b in range(3):
        for g in range(2):
            first, size = int(start[b]), int(length[b])
            inside = range(first, first + size)
            # Highest score first, then lowest slot: Python's sort is stable.
            best = sorted(inside, key=lambda s, row=scores[b, g]: -float(row[s]))[:count]
            row = got[b, g].tolist()
            assert row[: len(best)] == sorted(best)
            assert row[len(best) :] == [-1] * (100 - len(best))


PREFILL = [
    # rows (kv_start, kv_len), slots, queries, query_start per row, tile
    pytest.param([(0, 100)], 100, 100, [0], 32, id="T100"),
    pytest.param([(0, 1)], 1, 1, [0], 32, id="T1"),
    pytest.param([(0, 33), (9, 24)], 33, 33, [0, 0], 32, id="left-padded"),
    pytest.param([(0, 70), (13, 57)], 80, 30, [40, 40], 32, id="chunk-of-padded-batch"),
    pytest.param([(0, 40), (0, 22)], 40, 40, [0, 0], 8, id="right-padded-tile8"),
    pytest.param([(0, 64)], 96, 32, [32], 16, id="static-cache-aligned-chunk"),
]


@pytest.mark.parametrize(("rows", "slots", "queries", "starts", "tile"), PREFILL)
@pytest.mark.parametrize("with_lse", [True, False])
def test_prefill(rows, slots, queries, starts, tile, with_lse, monkeypatch):
    monkeypatch.setattr(common, "BLOCK_ELEMENTS", 6_000)  # several blocks even at this size
    heads, groups = 4, 2
    q, k, v, start, length = make(len(rows), heads, groups, 16, rows, slots, queries, seed=4)
    at = torch.tensor(starts, dtype=torch.int32)
    scale = scale_of(q)
    out, lse = ops.prefill_dense(q, k, v, at, start, length, scale=scale)
    assert ops.prefill_dense(q, k, None, at, start, length, scale=scale)[0] is None
    scores = ops.prefill_score(q, k, lse if with_lse else None, at, start, length, scale=scale, tile=tile)
    tiles = ops.tile_count(queries, tile)
    assert scores.shape == (len(rows), groups, tiles, slots)
    want_scores = torch.zeros_like(scores)
    first = ops.first_tile(at, start, tile)
    counts = torch.zeros(len(rows), tiles, dtype=torch.int32)
    indices = torch.full((len(rows), groups, tiles, 6), -1, dtype=torch.int32)
    head_map = torch.tensor([1, 0])
    generator = torch.Generator().manual_seed(5)
    for b, (begin, count) in enumerate(rows):
        for j in range(tiles):
            before = min((int(first[b]) + j) * tile, count)
            counts[b, j] = min(before, 5)
            for g in range(groups):
                indices[b, g, j, : counts[b, j]] = (
                    torch.randperm(before, generator=generator)[: counts[b, j]] + begin
                ).int()
    where = (indices, counts, head_map, at, start, length)
    sparse = ops.prefill_sparse(q, k, v, *where, scale=scale, tile=tile)
    sparse_lse = ops.prefill_sparse_lse(q, k, *where, scale=scale, tile=tile)
    assert sparse_lse.shape == lse.shape
    for b, (begin, count) in enumerate(rows):
        for i in range(queries):
            slot = starts[b] + i
            if not begin <= slot < begin + count:
                assert torch.equal(out[b, :, i], torch.zeros_like(out[b, :, i]))
                assert torch.equal(sparse[b, :, i], torch.zeros_like(out[b, :, i]))
                assert torch.isneginf(lse[b, :, i]).all()
                assert torch.isneginf(sparse_lse[b, :, i]).all()
                continue
            want, probability = naive(q[b, :, i], k, v, b, slot, begin, count)
            torch.testing.assert_close(out[b, :, i], want)
            j = (slot - begin) // tile - int(first[b])
            edge = begin + (slot - begin) // tile * tile
            pooled = probability.unflatten(0, (groups, -1)).sum(1)
            pooled[:, edge:] = 0
            want_scores[b, :, j] += pooled
            keys = [
                set(indices[b, head_map[g], j, : counts[b, j]].tolist()) | set(range(edge, slot + 1))
                for g in range(groups)
            ]
            torch.testing.assert_close(sparse[b, :, i], naive(q[b, :, i], k, v, b, slot, begin, count, keys)[0])
            for head in range(heads):
                seen = sorted(s for s in keys[head // (heads // groups)] if s <= slot)
                logits = [float(q[b, head, i] @ k[b, head // (heads // groups), s]) * scale for s in seen]
                assert float(sparse_lse[b, head, i]) == pytest.approx(math.log(sum(map(math.exp, logits))))
    torch.testing.assert_close(scores, want_scores)
    for skipped, size in ((tiles - 1, 1), (1, None), (tiles // 2, None), (1, tiles - 2)):
        if size is None or size > 0:
            given = {"scale": scale, "tile": tile, "first": skipped, "tiles": size}
            part = ops.prefill_score(q, k, lse if with_lse else None, at, start, length, **given)
            torch.testing.assert_close(part, want_scores[:, :, skipped:][:, :, :size])


def test_scores_under_a_norm_that_is_far_too_low_are_infinite_and_selected():
    q, k, _, start, length = make(1, 4, 2, 16, [(0, 70)], 70, 70, seed=7, dtype=torch.float32)
    k[0, 0, 13] *= 40  # a key that the norm below does not contain
    at = torch.zeros(1, dtype=torch.int32)
    indices, counts = torch.zeros(1, 2, 3, 1, dtype=torch.int32), torch.tensor([[0, 1, 1]], dtype=torch.int32)
    where = (indices, counts, torch.arange(2), at, start, length)
    lse = ops.prefill_sparse_lse(q, k, *where, scale=1.0, tile=32)
    exact = ops.prefill_dense(q, k, None, at, start, length, scale=1.0)[1]
    assert (lse <= exact + 1e-5).all()
    scores = ops.prefill_score(q, k, lse, at, start, length, scale=1.0, tile=32, tiles=3)
    assert not scores.isnan().any()
    assert scores.isinf().nonzero().tolist() == [[0, 0, 1, 13], [0, 0, 2, 13]]
    chosen = ops.select_topk(scores[:, 0, 1:], torch.tensor(1), torch.tensor(0), torch.tensor(32), max_count=1)
    assert chosen.flatten().tolist() == [13, 13]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_its_inputs(dtype):
    q, k, v, start, length = make(1, 4, 2, 64, [(0, 300)], 300, 300, seed=6, dtype=torch.float32)
    low = [x.to(dtype) for x in (q, k, v)]
    at = torch.zeros(1, dtype=torch.int32)
    got, _ = ops.prefill_dense(*low, at, start, length, scale=scale_of(q))
    want, _ = ops.prefill_dense(*[x.double() for x in low], at, start, length, scale=scale_of(q))
    assert got.dtype == dtype
    # One rounding of the result: the arithmetic inside is float32.
    assert (got.double() - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max() + 1e-6
