"""Batch's arithmetic against loops over rows, tiles and queries."""

import math
from fractions import Fraction

import pytest
import torch

from kascade_cli.errors import KascadeError
from kascade_cli.schema import Budget
from kascade_cli.sparse import Batch, Lengths

# Of each row: first slot, keys, first query's slot. Queries before the row's start and behind its end are padding.
ROWS = [
    [(0, 96, 0), (31, 65, 0), (95, 1, 0), (0, 0, 0), (10, 50, 0)],  # a prefill; left- and right-padded, empty
    [(0, 97, 64), (5, 92, 64), (70, 27, 64), (0, 70, 64), (33, 40, 64)],  # a chunk behind a cache
    [(0, 33, 0)],
    [(3, 40, 42)],
]
BUDGETS = [Budget(ratio=0.1, min_keys=1, tile=32), Budget(ratio=0.3, min_keys=7, tile=8), Budget(ratio=1.0, tile=1)]


def make(rows, queries, budget, phase="prefill", **more):
    starts, lengths, firsts = zip(*rows, strict=True)
    lengths_ = Lengths(*(torch.tensor(x, dtype=torch.int32) for x in (firsts, starts, lengths)))
    slots = max(s + n for s, n, _ in rows)
    return Batch(lengths_, phase, queries, slots, budget, **more)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("rows", "queries"), [(ROWS[0], 96), (ROWS[1], 33), (ROWS[2], 33), (ROWS[3], 1)])
def test_counts_and_keys_read_of_prefill(rows, queries, budget):
    batch, tile = make(rows, queries, budget), budget.tile
    read = visible = 0
    for b, (start, length, first) in enumerate(rows):
        local = max(0, first - start) // tile
        for j in range(batch.tiles):
            before = (local + j) * tile if (local + j) * tile < length else 0
            assert batch.before[b, j] == before
            assert batch.counts[b, j] == budget.count(before)
            assert batch.counts[b, j] <= batch.width
        for i in range(queries):
            token = first + i - start
            real = 0 <= token < length
            assert batch.positions[1][b, i] == real
            if real:
                assert local <= token // tile < local + batch.tiles
                assert batch.positions[0][b, i] == token
                visible += token + 1
                read += budget.count(token // tile * tile) + token % tile + 1
    assert batch.visible == visible
    assert batch.read(batch.counts) == read
    assert batch.counts.dtype == batch.before.dtype == torch.int32


@pytest.mark.parametrize("budget", BUDGETS)
def test_counts_of_decode(budget):
    rows = [(0, 97, 96), (5, 92, 96), (96, 1, 96), (10, 0, 96), (0, 64, 96)]
    batch = make(rows, 1, budget, phase="decode")
    counts = [budget.count(length) for _, length, _ in rows]
    assert batch.counts.tolist() == counts
    assert max(counts) <= batch.width == budget.count(97)
    assert batch.read(batch.counts) == sum(counts)
    assert batch.visible == sum(length for _, length, _ in rows)


@pytest.mark.parametrize("tile", [1, 7, 32])
@pytest.mark.parametrize("queries", [1, 31, 32, 33, 64, 65])
def test_without_padding_there_is_no_tile_or_width_to_spare(queries, tile):
    budget = Budget(ratio=0.2, min_keys=3, tile=tile)
    for slots in (queries, queries + 32, queries + 45):
        batch = make([(0, slots, slots - queries)], queries, budget, plain=True)
        touched = {token // tile for token in range(slots - queries, slots)}
        assert len(touched) <= batch.tiles <= len(touched) + 1
        if (slots - queries) % tile == 0:
            assert batch.tiles == len(touched)
            assert batch.counts.max() == budget.count(max(touched) * tile)
        assert batch.width == max(1, budget.count(max(touched) * tile))


def test_count_is_the_budgets_for_every_length_and_ratio():
    for ratio in (0.1, 0.3, 1 / 3, 0.07, 1.0):
        for least in (1, 128):
            budget = Budget(ratio=ratio, min_keys=least)
            batch = make([(0, 1, 0)], 1, budget)
            lengths = [*range(300), 1000, 4096, 10**5, 2**20 + 1]
            assert batch.count(torch.tensor(lengths)).tolist() == [budget.count(n) for n in lengths]


def test_a_batch_is_moved_to_a_device_once():
    batch = make(ROWS[0], 96, BUDGETS[0], pages=None)
    assert batch.on(torch.device("cpu")) is batch
    moved = batch.on(torch.device("meta"))
    assert moved.lengths.kv_len.device.type == "meta"
    assert batch.on(torch.device("meta")) is moved
    assert batch.lengths.kv_len.device.type == "cpu"


def test_prefill_of_a_paged_cache_is_refused():
    with pytest.raises(KascadeError, match="paged"):
        make(ROWS[2], 33, BUDGETS[0], pages=torch.zeros(1, 3, dtype=torch.int32))


TABLES = [
    {1024: 0.3, 4096: 0.15, 16384: 0.1},
    {1: 1.0, 2: 0.5, 64: 1 / 3, 128: 0.07},
    {32: 0.1, 64: 0.9},  # rising, too
    {2**n: 1 / (n + 1) for n in range(31)},
]


def entry(table, visible):
    """The ratio that a table gives, from its words: the largest length that is not above, else the smallest."""
    return table[max((length for length in table if length <= visible), default=min(table))]


@pytest.mark.parametrize("least", [1, 128])
@pytest.mark.parametrize("table", TABLES, ids=lambda table: str(len(table)))
def test_a_table_gives_every_length_its_ratio_on_the_device_too(table, least):
    budget = Budget(ratios=table, min_keys=least)
    around = {length + near for length in table for near in (-1, 0, 1) if length + near < 2**31}
    lengths = sorted({*range(9000), *range(16300, 16500), *around})
    assert [budget.ratio_at(n) for n in lengths] == [entry(table, n) for n in lengths]
    # Every product that lies within 1e-6 of a whole number is that number: 0.1 * 30 is 3, not 3.0000000000000004.
    exact = [min(n, max(least, math.ceil(Fraction(entry(table, n)) * n - Fraction(1, 10**6)))) for n in lengths]
    assert [budget.count(n) for n in lengths] == exact
    batch = make([(0, 1, 0)], 1, budget)
    for dtype in (torch.int32, torch.int64):
        counts = batch.count(torch.tensor(lengths, dtype=dtype))
        assert (counts.dtype, counts.tolist()) == (torch.int32, exact)
    rows = [[3, 40], [5000, 0]]
    assert batch.count(torch.tensor(rows)).tolist() == [[budget.count(n) for n in row] for row in rows]


@pytest.mark.parametrize("table", TABLES[:3], ids=lambda table: str(len(table)))
def test_the_width_of_a_table_is_the_widest_count_and_no_wider(table):
    budget = Budget(ratios=table, min_keys=2, tile=8)
    running = 0
    for slots in range(1, 5000):
        running = max(running, budget.count(slots))
        assert budget.most(slots) == running
        if slots % 97 == 0 or slots & (slots - 1) == 0:
            assert make([(0, slots, slots - 1)], 1, budget, phase="decode").width == running
            aligned = max(budget.count(before) for before in range(0, slots, 8))
            assert make([(0, slots, 0)], slots, budget, plain=True).width == max(1, aligned)


@pytest.mark.parametrize("table", [{1: 0.9, 32: 0.5, 64: 0.2}, {64: 0.1}])
def test_ragged_rows_and_chunks_follow_a_table(table):
    budget = Budget(ratios=table, min_keys=3, tile=8)
    rows = [(0, 97, 96), (5, 92, 96), (96, 1, 96), (10, 0, 96), (33, 64, 96), (34, 63, 96)]
    batch = make(rows, 1, budget, phase="decode")
    assert batch.counts.tolist() == [budget.count(length) for _, length, _ in rows]
    assert batch.counts.max() <= batch.width
    whole = make([(0, 96, 0), (3, 93, 0)], 96, budget)
    expected = [[budget.count(max(0, 8 * j) if 8 * j < n else 0) for j in range(whole.tiles)] for n in (96, 93)]
    assert whole.counts.tolist() == expected
    found = [{}, {}]
    for begin, end in ((0, 20), (20, 64), (64, 65), (65, 96)):
        chunk = make([(0, end, begin), (3, end - 3, begin)], end - begin, budget)
        for b, start in enumerate((0, 3)):
            first = max(0, begin - start) // 8
            for j in range(chunk.tiles):
                if (first + j) * 8 < end - start:
                    found[b].setdefault(first + j, set()).add(int(chunk.counts[b, j]))
    for b, counts in enumerate(found):
        assert counts == {tile: {expected[b][tile]} for tile in counts}
        assert len(counts) == -(-(96, 93)[b] // 8)


def test_a_table_is_put_on_a_device_once(monkeypatch):
    """Else every decode step would copy from the host, which no CUDA graph holds."""
    budget = Budget(ratios={64: 0.5, 128: 0.25})
    make(ROWS[0], 1, budget, phase="decode").counts  # noqa: B018
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("made a tensor from host data"))
    rows = Lengths(*(torch.zeros(3, dtype=torch.int32) for _ in range(3)))
    assert Batch(rows, "decode", 1, 97, Budget(ratios={64: 0.5, 128: 0.25})).counts.tolist() == [0, 0, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_table_on_a_gpu_takes_no_synchronisation_and_follows_replays():
    budget, gpu = Budget(ratios=TABLES[0], min_keys=16), torch.device("cuda")
    lengths = Lengths(*(torch.zeros(4, dtype=torch.int32, device=gpu) for _ in range(3)))
    every = torch.arange(200_000, dtype=torch.int32, device=gpu)
    batch = Batch(lengths, "decode", 1, 200_000, budget)
    assert batch.count(every).tolist() == [budget.count(n) for n in range(200_000)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = Batch(lengths, "decode", 1, 200_000, Budget(ratios=TABLES[0], min_keys=16))
        assert again.counts.shape == (4,)
        assert Batch(lengths, "prefill", 70, 200_000, budget).counts.shape[0] == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts = Batch(lengths, "decode", 1, 200_000, budget).counts
    for seen in ([1, 1023, 1024, 1025], [4095, 4096, 16383, 16384], [0, 17, 150_000, 199_999]):
        lengths.kv_len.copy_(torch.tensor(seen, dtype=torch.int32))
        graph.replay()
        assert counts.tolist() == [budget.count(n) for n in seen]
