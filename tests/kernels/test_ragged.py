"""Ragged prefill over pages: the reference against loops over single queries in float64, and what it refuses."""

import math
from typing import Any

import pytest
import torch

from kascade_cli.errors import KascadeError
from kascade_cli.kernels import get_backend, reference
from kascade_cli.kernels.contract import Unsupported
from kascade_cli.kernels.ragged import ragged_tiles, tile_base, tile_room
from kascade_cli.kernels.testing import prefill, ragged

F64, BF16 = torch.float64, torch.bfloat16
# One row; rows whose chunks begin inside a tile, an empty one among them; chunks within one tile; another tile.
CASES = [
    ragged.RaggedCase(F64, 2, 16, 16, ((45, 45),), tile=8, floor=5),
    ragged.RaggedCase(F64, 3, 8, 32, ((1, 70), (33, 41), (0, 0), (0, 9), (7, 7)), padding=5, tile=8, floor=5),
    ragged.RaggedCase(F64, 1, 8, 16, ((2, 63), (2, 65), (1, 1), (3, 64)), kv_heads=3, tile=32, floor=3),
    ragged.RaggedCase(F64, 2, 8, 64, ((17, 130), (40, 40)), padding=70, tile=16, floor=5),
]


def naive(case: ragged.RaggedCase, at: ragged.Inputs, counts: list[int], indices: torch.Tensor) -> dict[str, Any]:
    """Every query alone, from the pages themselves: nothing here knows blocks, padding or the packed tiles' bases.

    counts, indices [G, NT, K]: the selection by tile number; numbers are taken in the order of `ragged_tiles`.
    """
    table, location = at.pages["block_table"], at.pages["query_start_loc"].tolist()
    tokens, heads = at.q.shape[:2]
    out, lse = torch.zeros(tokens, heads, case.head_dim, dtype=F64), torch.full((heads, tokens), -math.inf, dtype=F64)
    sparse, sparse_lse = out.clone(), lse.clone()
    scores: dict[tuple[int, int, int, int], float] = {}  # (row, tile, KV head, slot)
    numbers = {}
    row_of, before = ragged_tiles(at.pages["query_start_loc"], at.args[0], at.args[2], case.tile, tokens)
    for number, (row, edge) in enumerate(zip(row_of.tolist(), before.tolist(), strict=True)):
        if row < len(case.rows):
            numbers[row, edge // case.tile] = number
    for row, (queries, keys) in enumerate(case.rows):
        for i in range(queries):
            token, position = location[row] + i, keys - queries + i
            tile = position // case.tile
            where = [(int(table[row, s // case.page]), s % case.page) for s in range(position + 1)]
            for head in range(heads):
                group = head // case.group
                logits = torch.stack([at.q[token, head] @ at.k[p, o, group] * at.scale for p, o in where])
                values = torch.stack([at.v[p, o, group] for p, o in where])
                weight = logits.softmax(0)
                out[token, head], lse[head, token] = weight @ values, logits.logsumexp(0)
                for slot in range(tile * case.tile):
                    key = (row, tile, group, slot)
                    scores[key] = scores.get(key, 0.0) + float(weight[slot])
                number = numbers[row, tile]
                chosen = indices[at.head_map[group], number, : counts[number]].tolist()
                seen = chosen + list(range(tile * case.tile, position + 1))
                sparse[token, head] = logits[seen].softmax(0) @ values[seen]
                sparse_lse[head, token] = logits[seen].logsumexp(0)
    return {"out": out, "lse": lse, "sparse": sparse, "sparse_lse": sparse_lse, "scores": scores, "numbers": numbers}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_single_queries(case: ragged.RaggedCase):
    at = ragged.make_inputs(case, 1, "cpu")
    picked = {row: prefill.exact(case.alone(row), made)[1:] for row, made in at.alone.items()}
    indices, counts = ragged.pack(case, at, picked)
    want = naive(case, at, counts.tolist(), indices)
    got = ragged.run_ops(reference, case, at, indices, counts)
    torch.testing.assert_close(got["prefill_dense"], want["out"])
    torch.testing.assert_close(got["prefill_sparse"], want["sparse"])
    for op in ("log-sum-exp", "lse only"):
        torch.testing.assert_close(got[op], want["lse"].to(got[op].dtype))
    torch.testing.assert_close(got["prefill_sparse_lse"], want["sparse_lse"])
    assert len(got["prefill_score"][0]) == tile_room(case.tokens, len(case.rows), case.tile)
    for (row, tile, group, slot), value in want["scores"].items():
        assert float(got["prefill_score"][group, want["numbers"][row, tile], slot]) == pytest.approx(value, rel=1e-5)


def test_a_batch_is_its_rows_in_any_pages_and_order():
    case = ragged.RaggedCase(BF16, 2, 64, 32, ((70, 70), (40, 111), (1, 33), (90, 300)), padding=3)
    rows = ragged.check(reference, case, device="cpu")
    assert [row["op"] for row in rows] == [f"ragged {name}" for name in prefill.NAMES]
    assert all(row["ok"] for row in rows), rows


@pytest.mark.parametrize("tile", [8, 32, 128])
def test_every_query_has_a_tile_and_no_two_rows_share_one(tile: int):
    """Brute force over rows: numbers stay within the room, in order, whatever the lengths."""
    generator = torch.Generator().manual_seed(tile)
    for rows in (1, 2, 3, 7):
        for _ in range(60):
            queries = torch.randint(0, 5 * tile // 2, (rows,), generator=generator).tolist()
            starts = torch.randint(0, 3 * tile, (rows,), generator=generator).tolist()
            location = [0]
            for n in queries:
                location.append(location[-1] + n)
            tokens = location[-1] + int(torch.randint(0, 2 * tile, (1,), generator=generator))
            ints = [torch.tensor(x, dtype=torch.int32) for x in (location, starts)]
            ends = ints[1] + torch.tensor(queries, dtype=torch.int32)
            row, before = ragged_tiles(*ints, ends, tile, tokens)
            base = tile_base(ints[0], tile).tolist()
            assert not any(b % 2 for b in base)
            assert len(row) % 2 == 0
            expected = {}
            for b, (n, start) in enumerate(zip(queries, starts, strict=True)):
                touched = sorted({(start + i) // tile for i in range(n)})
                assert base[b] + len(touched) <= base[b + 1]
                expected |= {base[b] + i: (b, t * tile) for i, t in enumerate(touched)}
            # The padding behind the rows has room for its own tiles.
            assert base[-1] + -(-(tokens - location[-1]) // tile) <= len(row)
            for number, found in enumerate(zip(row.tolist(), before.tolist(), strict=True)):
                assert found == expected.get(number, (rows, 0))


def arguments(**change: Any) -> dict[str, Any]:
    """Valid arguments of prefill_sparse on the CPU: rows of 5 and 3 queries over 40 and 3 keys, pages of 16."""

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    room = tile_room(8, 2, 32)
    made = {
        "q": torch.zeros(8, 4, 64, dtype=BF16),
        "k": torch.zeros(6, 16, 2, 64, dtype=BF16),
        "v": torch.zeros(6, 16, 2, 64, dtype=BF16),
        "indices": torch.zeros(2, room, 4, dtype=torch.int32),
        "counts": torch.zeros(room, dtype=torch.int32),
        "head_map": ints(0, 1),
        "query_start": ints(35, 0),
        "kv_start": ints(0, 0),
        "kv_len": ints(40, 3),
        "scale": 0.125,
        "tile": 32,
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "query_start_loc": ints(0, 5, 8),
    }
    return {**made, **change}


BASE = arguments()
REFUSED = [
    ({"query_start_loc": None}, "block_table and query_start_loc go together"),
    ({"block_table": None}, "block_table and query_start_loc go together"),
    ({"q": BASE["q"][None]}, "ragged q, k, v are [N, H, D] and twice [P, page, G, D]"),
    ({"v": BASE["v"][1:]}, "ragged q, k, v are"),
    ({"q": torch.zeros(8, 3, 64, dtype=BF16)}, "q [8, 3, 64] does not fit pages [6, 16, 2, 64]"),
    ({"block_table": BASE["block_table"][:, :0]}, "there must be at least one page"),
    ({"block_table": BASE["block_table"].long()}, "block_table must be int32 [2, 3], not int64 [2, 3]"),
    ({"query_start_loc": BASE["query_start_loc"][1:]}, "query_start_loc must be int32 [3], not int32 [2]"),
    ({"kv_len": BASE["kv_len"][:1]}, "kv_len must be int32 [2]"),
    ({"counts": BASE["counts"][1:]}, "ragged indices and counts are [G2, 10, K] and [10]"),
    ({"indices": BASE["indices"][None]}, "ragged indices and counts are"),
]
# What only the reference sees: it waits for the device.
BY_VALUE = [
    ({"kv_start": torch.tensor([0, 1], dtype=torch.int32)}, "kv_start is [0, 1]: rows of a paged cache begin at"),
    ({"query_start_loc": torch.tensor([0, 5, 9], dtype=torch.int32)}, "[0, 5, 9] must rise from 0 to at most 8"),
    ({"query_start_loc": torch.tensor([0, 5, 4], dtype=torch.int32)}, "[0, 5, 4] must rise from 0"),
    ({"kv_len": torch.tensor([49, 3], dtype=torch.int32)}, "rows of [49, 3] keys do not fit 3 pages of 16"),
]


@pytest.mark.parametrize(("change", "text"), REFUSED + BY_VALUE, ids=[text for _, text in REFUSED + BY_VALUE])
def test_what_is_refused(change: dict[str, Any], text: str):
    with pytest.raises(KascadeError) as caught:
        reference.prefill_sparse(**arguments(**change))
    assert text in str(caught.value)
    assert str(caught.value).startswith("prefill_sparse: ")
    assert "\n" not in str(caught.value)


@pytest.fixture
def kernels() -> Any:
    pytest.importorskip("tilelang")
    from kascade_cli.kernels.tilelang import prefill_dense, prefill_score, prefill_sparse, prefill_sparse_lse

    modules = (prefill_dense, prefill_score, prefill_sparse, prefill_sparse_lse)
    return {
        module.__name__.rsplit(".", 1)[1]: getattr(module, module.__name__.rsplit(".", 1)[1]) for module in modules
    }


PAGES_OF_48 = {name: torch.zeros(2, 48, 2, 64, dtype=BF16) for name in "kv"}
NOT_BUILT = [
    (PAGES_OF_48, Unsupported, "page size 48 is not built; the kernels take 16, 32, 64, 128, 256"),
    (
        {name: torch.zeros(6, 16, 4, 64, dtype=BF16)[:, :, ::2] for name in "kv"},
        Unsupported,
        "paged k must be contiguous [P, page, G, D] from a 16-byte boundary on",
    ),
    ({name: BASE[name].float() for name in "qkv"}, Unsupported, "the kernels take all bfloat16 or all float16"),
    ({"head_map": BASE["head_map"][:1]}, KascadeError, "head_map must be int32 [2]"),
    ({"counts": BASE["counts"].long()}, KascadeError, "counts must be int32 [1, 10] on cpu, not int64 [1, 10]"),
    ({}, KascadeError, "runs on a Hopper GPU"),
]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [(change, KascadeError, text) for change, text in REFUSED] + NOT_BUILT,
    ids=[text for _, text in REFUSED] + [text for *_, text in NOT_BUILT],
)
def test_what_the_kernels_refuse(kernels: Any, change: dict[str, Any], error: type[KascadeError], text: str):
    with pytest.raises(error) as caught:
        kernels["prefill_sparse"](**arguments(**change))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_paged_kernel_checks_its_arguments(kernels: Any):
    base = {name: value for name, value in BASE.items() if name not in ("indices", "counts", "head_map", "tile")}
    tiles = {name: BASE[name] for name in ("indices", "counts", "head_map", "tile")}
    keys = {name: value for name, value in base.items() if name != "v"}
    calls = {
        "prefill_dense": base,
        "prefill_sparse_lse": keys | tiles,
        "prefill_score": keys | {"lse": None, "tile": 32},
    }
    for op, given in calls.items():
        with pytest.raises(KascadeError, match="runs on a Hopper GPU"):
            kernels[op](**given)
        with pytest.raises(KascadeError, match=f"{op}: block_table and query_start_loc go together"):
            kernels[op](**{**given, "query_start_loc": None})
        with pytest.raises(Unsupported, match=f"{op}: page size 48"):
            kernels[op](**{**given, **{name: x for name, x in PAGES_OF_48.items() if name in given}})
    with pytest.raises(KascadeError, match=r"lse must be float32 \[4, 8\]"):
        kernels["prefill_score"](**{**calls["prefill_score"], "lse": torch.zeros(1, 4, 8)})
    with pytest.raises(KascadeError, match=r"no tiles \[12, 10\)"):
        kernels["prefill_score"](**calls["prefill_score"], first=12)


def test_queries_in_front_of_keys_are_not_copied(kernels: Any):
    from kascade_cli.kernels.tilelang.prefill_common import tokens_view

    projected = torch.randn(7, (8 + 2 + 2) * 64, dtype=BF16)
    q = projected[:, : 8 * 64].view(7, 8, 64)
    seen = tokens_view(q)
    assert seen.shape == (1, 7, 12, 64)
    assert seen.is_contiguous()
    assert seen.data_ptr() == q.data_ptr()
    assert torch.equal(seen[0, :, :8], q)
    behind = projected[:, 2 * 64 : 10 * 64].view(7, 8, 64)  # its last row would end past the allocation
    for copied in (behind, q[:, ::2], q.transpose(0, 1)):
        assert torch.equal(tokens_view(copied)[0], copied)
    assert tokens_view(q[:0]).shape[1] == 0
    assert torch.equal(tokens_view(q[2:5])[0, :, :8], q[2:5])


def test_any_block_of_tiles_can_be_scored():
    case = CASES[1]
    at = ragged.make_inputs(case, 3, "cpu")
    given = {"scale": at.scale, "tile": case.tile, **at.pages}
    whole = reference.prefill_score(at.q, at.k, None, *at.args, **given)
    for first in range(whole.shape[1]):
        part = reference.prefill_score(at.q, at.k, None, *at.args, **given, first=first, tiles=3)
        want = whole[:, first : first + 3]
        torch.testing.assert_close(part[:, : want.shape[1]], want)


def test_nothing_at_all():
    empty = {"q": BASE["q"][:0], "query_start_loc": torch.zeros(3, dtype=torch.int32)}
    room = tile_room(0, 2, 32)
    chosen = {"indices": BASE["indices"][:, :room], "counts": BASE["counts"][:room]}
    assert reference.prefill_sparse(**arguments(**empty, **chosen)).shape == (0, 4, 64)


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@needs_gpu
@pytest.mark.parametrize("case", ragged.CASES, ids=str)
def test_numerics_within_the_rule(case: ragged.RaggedCase):
    rows = ragged.check(get_backend("tilelang", "cuda"), case)
    assert all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]
