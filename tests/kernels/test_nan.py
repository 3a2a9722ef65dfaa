"""NaN stays NaN in the reference, from keys to choice to output; what sees nothing is zero; padding may hold NaN."""

import math

import pytest
import torch

from kascade_cli.kernels import reference as ops
from kascade_cli.kernels.reference import common
from tests.kernels.test_reference import make, naive, scale_of

NAN, INF = math.nan, math.inf
ROWS, SLOTS = [(0, 23), (6, 17), (3, 0), (2, 19)], 24
HEADS, GROUPS = 4, 2
BROKEN = 1  # the row that holds NaN


def decode_inputs(where: str, slot: int):
    """Row BROKEN has NaN in KV head 1's key or value at `slot`, or in query head 2; all padding is NaN."""
    q, k, v, start, length = make(len(ROWS), HEADS, GROUPS, 8, ROWS, SLOTS, seed=slot)
    q = q[:, :, 0]
    for row, (begin, count) in enumerate(ROWS):
        outside = [s for s in range(SLOTS) if not begin <= s < begin + count]
        k[row, :, outside] = v[row, :, outside] = NAN
    target = {"key": k[BROKEN, 1, slot], "value": v[BROKEN, 1, slot], "query": q[BROKEN, 2]}[where]
    target[3] = NAN
    return q, k, v, start, length


@pytest.mark.parametrize("slot", [6, 13, 22])
@pytest.mark.parametrize("where", ["key", "value", "query"])
def test_decode(where, slot):
    q, k, v, start, length = decode_inputs(where, slot)
    out, scores = ops.decode_dense(q, k, v, start, length, scale=scale_of(q), scores=True)
    assert torch.equal(out[2], torch.zeros_like(out[2]))  # a row of no keys
    broken = {"key": [2, 3], "value": [2, 3], "query": [2]}[where]
    assert out[BROKEN, broken].isnan().any(-1).all()
    for row, (begin, count) in enumerate(ROWS):
        want, probability = naive(q[row], k, v, row, SLOTS, begin, count)
        torch.testing.assert_close(out[row], want, equal_nan=True)
        for group in range(GROUPS):
            expected = probability[2 * group : 2 * group + 2].clone()
            if row == BROKEN and group == 1 and where != "value":
                at = [slot] if where == "key" else range(begin, begin + count)
                healthy = expected[1:] if where == "query" else expected[:0]
                expected = healthy.sum(0, keepdim=True)
                expected[:, list(at)] = NAN
            torch.testing.assert_close(scores[row, group], expected.sum(0), equal_nan=True)
    torch.testing.assert_close(ops.decode_score(q, k, start, length, scale=scale_of(q)), scores, equal_nan=True)


@pytest.mark.parametrize("count", [1, 5, 17])
@pytest.mark.parametrize("slot", [6, 13, 22])
@pytest.mark.parametrize("where", ["key", "query"])
def test_decode_over_chosen_keys(where, slot, count):
    q, k, v, start, length = decode_inputs(where, slot)
    scores, logits = ops.decode_score(q, k, start, length, scale=scale_of(q), logits=True)
    counts = torch.minimum(length, torch.tensor(count)).int()
    indices = ops.select_topk(scores, counts[:, None], start[:, None], length[:, None], max_count=20)
    assert ((indices >= 0).sum(-1) == counts[:, None]).all()
    broken = torch.zeros(len(ROWS), HEADS, dtype=torch.bool)
    broken[BROKEN, [2, 3] if where == "key" else [2]] = True
    for known in (None, logits):
        out = ops.decode_sparse(q, k, v, indices, counts, torch.arange(2), scale=scale_of(q), logits=known)
        assert torch.equal(out.isnan().all(-1), broken)
        assert torch.equal(out.isnan().any(-1), broken)
        assert torch.equal(out[2], torch.zeros_like(out[2]))


PADDED = [(0, 41), (5, 36), (9, 20)]  # rows of 41 slots: full, left-padded, padded at both ends


@pytest.mark.parametrize("elements", [1 << 20, 3000])
@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("slot", [5, 12, 13, 39, 40])
def test_prefill(slot, with_lse, elements, monkeypatch):
    monkeypatch.setattr(common, "BLOCK_ELEMENTS", elements)
    tile, queries = 8, 41
    q, k, v, start, length = make(3, HEADS, GROUPS, 8, PADDED, 41, queries, seed=slot)
    for row, (begin, count) in enumerate(PADDED):
        outside = [s for s in range(queries) if not begin <= s < begin + count]
        q[row, :, outside] = k[row, :, outside] = v[row, :, outside] = NAN
    k[BROKEN, 1, slot, 2] = NAN
    at = torch.zeros(3, dtype=torch.int32)
    lengths, scale = (at, start, length), scale_of(q)
    out, lse = ops.prefill_dense(q, k, v, *lengths, scale=scale)
    scores = ops.prefill_score(q, k, lse if with_lse else None, *lengths, scale=scale, tile=tile)
    tiles = ops.tile_count(queries, tile)
    before = (ops.first_tile(at, start, tile)[:, None] + torch.arange(tiles)) * tile
    counts = torch.minimum(before, torch.tensor(3)).int()
    counts = torch.where(before < length[:, None], counts, 0)
    spread = (len(PADDED), GROUPS, tiles)
    indices = ops.select_topk(
        scores, counts[:, None].expand(spread), start[:, None, None], before[:, None].expand(spread).int(), max_count=4
    )
    assert ((indices >= 0).sum(-1) == counts[:, None]).all()
    where = (indices, counts, torch.arange(2), *lengths)
    sparse = ops.prefill_sparse(q, k, v, *where, scale=scale, tile=tile)
    sparse_lse = ops.prefill_sparse_lse(q, k, *where, scale=scale, tile=tile)
    want_scores = torch.zeros_like(scores)
    for row, (begin, count) in enumerate(PADDED):
        for i in range(queries):
            if not begin <= i < begin + count:
                assert (out[row, :, i] == 0).all()
                assert (sparse[row, :, i] == 0).all()
                assert torch.isneginf(lse[row, :, i]).all()
                assert torch.isneginf(sparse_lse[row, :, i]).all()
                continue
            broken = torch.tensor([row == BROKEN and i >= slot and head >= 2 for head in range(HEADS)])
            for result in (out[row, :, i], sparse[row, :, i], lse[row, :, i, None], sparse_lse[row, :, i, None]):
                assert torch.equal(result.isnan().all(-1), broken)
                assert torch.equal(result.isnan().any(-1), broken)
            want, probability = naive(q[row, :, i], k, v, row, i, begin, count)
            torch.testing.assert_close(out[row, :, i], want, equal_nan=True)
            probability[broken] = 0  # it blames the key at fault and pools nothing else
            if broken.any():
                probability[broken, slot] = NAN
            j, edge = (i - begin) // tile, begin + (i - begin) // tile * tile
            want_scores[row, :, j, :edge] += probability.unflatten(0, (GROUPS, 2)).sum(1)[:, :edge]
    torch.testing.assert_close(scores, want_scores, equal_nan=True)


def test_prefill_keeps_a_nan_value():
    q, k, v, start, length = make(2, HEADS, GROUPS, 8, [(0, 20), (4, 16)], 20, 20)
    v[1, 1, 11] = NAN
    at = torch.zeros(2, dtype=torch.int32)
    out, _ = ops.prefill_dense(q, k, v, at, start, length, scale=1.0)
    assert out[1, 2:, 11:].isnan().all()
    assert (out[1, :, :4] == 0).all()
    assert not out[0].isnan().any()
    assert not out[1, :2].isnan().any()


def test_a_logit_that_overflows_is_blamed_like_nan():
    q, k, v, start, length = (x.float() for x in make(1, 2, 1, 4, [(0, 9)], 9))
    q, start, length = q[:, :, 0].abs(), start.int(), length.int()
    k[0, 0, 5] = 3e38
    scores = ops.decode_score(q * 100, k, start, length, scale=1.0)
    assert scores.isnan().nonzero().tolist() == [[0, 0, 5]]
    assert (scores.nan_to_num() == 0).all()


@pytest.mark.parametrize("count", [0, 1, 2, 5, 9, 30, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_takes_scores_of_any_sign_and_nan_first(count, dtype):
    generator = torch.Generator().manual_seed(count)
    scores = torch.randn(6, 64, generator=generator, dtype=dtype)
    scores[1, [60, 7, 33]] = NAN
    scores[1, [2, 50]] = INF
    scores[2] = -INF
    scores[2, 40] = -1.0
    scores[3, ::2] = -scores[3].abs()[::2].round()
    scores[4] = NAN
    scores[5] = (scores[5] * 2).round() - 10  # all negative, with ties
    start, length = torch.tensor([[0, 5, 8, 0, 3, 1]]).T[:, 0], torch.tensor([64, 50, 40, 63, 61, 20])
    scores[0, 0] = scores[3, 63] = NAN  # the second is not the row's
    got = ops.select_topk(scores, torch.tensor(count), start, length, max_count=64)
    for row in range(6):
        inside = range(int(start[row]), int(start[row] + length[row]))
        ranked = sorted(inside, key=lambda s, x=scores[row]: (not math.isnan(x[s]), -float(x[s].nan_to_num(0)), s))
        best = sorted(ranked[:count])
        assert got[row].tolist() == best + [-1] * (64 - len(best))


def test_selection_of_nothing():
    assert ops.select_topk(torch.zeros(2, 5), *[torch.tensor(0)] * 3, max_count=0).shape == (2, 0)
    assert ops.select_topk(torch.zeros(2, 0), *[torch.tensor(0)] * 3, max_count=3).tolist() == [[-1] * 3] * 2
