"""The checked reference takes what the kernels' own cases do, and nothing that breaks the contract."""

import pytest
import torch

from kascade_cli.kernels import backend, get_backend, reference
from kascade_cli.kernels.testing import decode, prefill, ragged
from kascade_cli.kernels.testing.mirror import register_mirror

CPU = torch.device("cpu")
LENGTHS = ("query_start", "kv_start", "kv_len")


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """Registers the mirror; the ops that it ran."""
    monkeypatch.setattr(backend, "_registered", {})
    ran: list[str] = []
    register_mirror(seen=ran)
    return ran


@pytest.mark.parametrize("case", [decode.CASES[0], decode.CASES[5], decode.CASES[14]], ids=str)
def test_decode_cases_hold(seen, case):
    rows = decode.check_decode(get_backend("mirror", CPU), CPU, (case,))
    assert decode.summary(rows)
    assert set(seen) == {"decode_dense", "decode_score", "select_topk", "decode_sparse"}


@pytest.mark.parametrize(
    "case", [prefill.ragged(torch.bfloat16, 2, 64, 70), prefill.late(torch.float16, 3, 64, 150, 40)], ids=str
)
def test_prefill_cases_hold(seen, case):
    rows = prefill.check(get_backend("mirror", CPU), case, device="cpu")
    assert all(row["ok"] for row in rows), rows
    assert set(seen) == {"prefill_dense", "prefill_score", "prefill_sparse", "prefill_sparse_lse"}


def test_ragged_cases_hold(seen):
    case = ragged.RaggedCase(torch.bfloat16, 2, 64, 32, ((40, 70), (0, 9), (33, 33)), padding=4)
    rows = ragged.check(get_backend("mirror", CPU), case, device="cpu")
    assert all(row["ok"] for row in rows), rows
    assert set(seen) == {"prefill_dense", "prefill_score", "prefill_sparse", "prefill_sparse_lse"}


def ragged_call(**change):
    """Valid arguments of prefill_sparse_lse, in tiles of 8: 5 queries of 21 keys and 3 of 3, pages of 16."""
    torch.manual_seed(0)
    counts = torch.zeros(10, dtype=torch.int32)
    counts[:2] = 2  # row 0 has the first, its tile 2: keys before slot 16
    given = {"q": torch.randn(8, 4, 8), "k": torch.randn(3, 16, 2, 8), "counts": counts, "head_map": ints(1, 0)}
    given |= {"query_start": ints(16, 0), "kv_start": ints(0, 0), "kv_len": ints(21, 3), "scale": 1.0, "tile": 8}
    given |= {"block_table": ints([2, 0], [1, 9]), "query_start_loc": ints(0, 5, 8)}
    return {**given, "indices": torch.tensor([0, 15], dtype=torch.int32).repeat(2, 10, 1), **change}


def test_ragged_selections_and_lengths(seen):
    call = get_backend("mirror", CPU).prefill_sparse_lse
    first = torch.zeros(10, dtype=torch.int32)
    first[0] = 2
    good = ragged_call(counts=first)
    assert torch.equal(call(**good), reference.prefill_sparse_lse(**good))
    with pytest.raises(AssertionError, match="tiles that are nobody's have counts"):
        call(**ragged_call())
    late = good["indices"].clone()
    late[1, 0, 1] = 16
    with pytest.raises(AssertionError, match="not keys of its row before its tile"):
        call(**ragged_call(counts=first, indices=late))
    with pytest.raises(AssertionError, match=r"rows of \[5, 3\] queries are not the last of their keys"):
        call(**ragged_call(counts=first, query_start=ints(17, 0)))


def ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def decode_call(**change):
    """Valid arguments of decode_dense: rows of 30 and 20 keys, the second behind 10 slots of padding."""
    torch.manual_seed(0)
    given = {"q": torch.randn(2, 4, 8), "k": torch.randn(2, 2, 30, 8), "v": torch.randn(2, 2, 30, 8)}
    return {**given, "kv_start": ints(0, 10), "kv_len": ints(30, 20), "scale": 1.0, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_start": ints(29, 29)}, r"rows from \[29, 29\] of \[30, 20\] keys in 30 slots"),  # that is query_start
        ({"kv_len": ints(30, 30)}, "in 30 slots"),
        ({"kv_start": torch.tensor([0, 10])}, "kv_start is torch.int64"),
        ({"kv_start": ints(0, 0, 10, 10)[::2]}, "kv_start is not contiguous"),
        ({"kv_len": ints(30)}, r"kv_len is torch.int32 \[1\], not int32 \[2\]"),
    ],
)
def test_decode_lengths(seen, change, message):
    ops = get_backend("mirror", CPU)
    given = decode_call()
    assert torch.equal(ops.decode_dense(**given)[0], reference.decode_dense(**given)[0])
    with pytest.raises(AssertionError, match=message):
        ops.decode_dense(**decode_call(**change))
    assert seen == ["decode_dense"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": ints(*[[[0, 3, 3]] * 2] * 2)}, "names a key twice"),
        ({"indices": ints(*[[[0, 3, -1]] * 2] * 2)}, "not keys of its row"),
        ({"indices": ints(*[[[0, 3, 30]] * 2] * 2)}, "not keys of its row"),
        ({"counts": ints(4, 3)}, "counts past 3 entries"),
        ({"head_map": ints(0, 2)}, r"head_map \[0, 2\] of 2 heads"),
    ],
)
def test_decode_selections(seen, change, message):
    given = decode_call(indices=ints(*[[[0, 3, 29]] * 2] * 2), counts=ints(3, 3), head_map=ints(1, 0))
    del given["kv_start"], given["kv_len"]
    get_backend("mirror", CPU).decode_sparse(**given)
    with pytest.raises(AssertionError, match=message):
        get_backend("mirror", CPU).decode_sparse(**{**given, **change})


def prefill_call(**change):
    """Valid arguments of the prefill ops: the last 20 of 30 slots, in tiles of 8; row 1 begins at slot 5."""
    torch.manual_seed(0)
    given = {"q": torch.randn(2, 4, 20, 8), "k": torch.randn(2, 2, 30, 8), "query_start": ints(10, 10)}
    return {**given, "kv_start": ints(0, 5), "kv_len": ints(30, 25), "scale": 1.0, **change}


def test_prefill_scores_want_the_log_sum_exp_of_their_queries(seen):
    ops, given = get_backend("mirror", CPU), prefill_call()
    lse = ops.prefill_dense(**given, v=None)[1]
    ops.prefill_score(**given, lse=lse, tile=8)
    ops.prefill_score(**given, lse=None, tile=8)
    ops.prefill_score(**given, lse=lse - 2, tile=8)  # of fewer keys
    wrong = {
        "above that of all keys": lse + 1,
        "other padding": reference.prefill_dense(**prefill_call(kv_len=ints(30, 10)), v=None)[1],
        "lse is": lse[:, :, 1:],
    }
    for message, given["lse"] in wrong.items():
        with pytest.raises(AssertionError, match=message):
            ops.prefill_score(**given, tile=8)


@pytest.mark.parametrize(
    ("row", "tile", "slot", "good"),
    [(0, 0, 7, True), (0, 0, 8, False), (1, 0, 4, False), (1, 3, 28, True), (1, 3, 29, False)],
)
def test_prefill_selections_lie_before_their_tile(seen, row, tile, slot, good):
    indices = torch.tensor([0, 5], dtype=torch.int32)[:, None, None, None].repeat(1, 2, 4, 1)
    indices[row, 0, tile, 0] = slot
    counts = ints([1, 1, 1, 1], [0, 1, 1, 1])
    counts[row, tile] = 1
    given = prefill_call(indices=indices, counts=counts, head_map=ints(1, 0), tile=8)
    call = get_backend("mirror", CPU).prefill_sparse_lse
    if good:
        assert torch.equal(call(**given), reference.prefill_sparse_lse(**given))
    else:
        with pytest.raises(AssertionError, match="not keys of its row before its tile"):
            call(**given)


def test_negative_scores_are_for_the_reference(seen):
    scores = torch.tensor([[-1.0, 2.0, 3.0]])
    choose = get_backend("mirror", CPU).select_topk
    assert choose(scores, ints(1), ints(1), ints(2), max_count=1).tolist() == [[2]]
    with pytest.raises(AssertionError, match="no negative scores"):
        choose(scores, ints(1), ints(0), ints(3), max_count=1)
