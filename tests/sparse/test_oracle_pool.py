"""`oracle:pool=logits` (the ablation of the paper's figure 5) against loops over heads, queries and keys."""

import pytest
import torch

from kascade_cli.errors import UsageError
from kascade_cli.kernels import get_backend
from kascade_cli.schema import Budget
from kascade_cli.sparse import Batch, Layer, Lengths, make_strategy

HEADS, GROUPS, SIZE = 6, 2, 8
# Of each row: first slot, keys, first query's slot; behind a cache, left-padded, right-padded.
PREFILL = [([(0, 77, 0)], 77), ([(0, 77, 30), (12, 65, 30), (5, 60, 30)], 47), ([(0, 77, 0), (40, 37, 0)], 77)]
DECODE = [([(0, 61, 60), (20, 41, 60)], 1)]


def tensors(slots, queries, rows):
    random = torch.Generator().manual_seed(slots + queries)
    shapes = ((HEADS, queries), (GROUPS, slots), (GROUPS, slots))
    return [torch.randn(rows, heads, n, SIZE, generator=random, dtype=torch.float64) for heads, n in shapes]


def brute(query, key, value, row, phase, budget, pool):
    """Attention [H, T, D] of one row by the formulas of the method, one tile, head and query at a time."""
    start, length, first = row
    out = torch.zeros_like(query)
    tokens = [i for i in range(query.shape[1]) if 0 <= first + i - start < length]
    tiles = {}
    for i in tokens:
        tiles.setdefault((first + i - start) // budget.tile if phase == "prefill" else i, []).append(i)
    group = HEADS // GROUPS
    for number, members in tiles.items():
        before = number * budget.tile if phase == "prefill" else length
        for g in range(GROUPS):
            score = torch.zeros(before, dtype=torch.float64)
            for h in range(g * group, (g + 1) * group):
                for i in members:
                    logits = key[g, start : first + i + 1] @ query[h, i] * SIZE**-0.5
                    score += (logits if pool == "logits" else logits.softmax(-1))[:before]
            chosen = sorted(range(before), key=lambda j: (-float(score[j]), j))[: budget.count(before)]
            for h in range(g * group, (g + 1) * group):
                for i in members:
                    own = range(before, first + i - start + 1) if phase == "prefill" else ()
                    at = torch.tensor([start + j for j in [*chosen, *own]])
                    weights = (key[g, at] @ query[h, i] * SIZE**-0.5).softmax(-1)
                    out[h, i] = weights @ value[g, at]
    return out


@pytest.mark.parametrize("tile", [4, 7, 32, 128])
@pytest.mark.parametrize(
    ("phase", "rows", "queries"), [*(("prefill", *case) for case in PREFILL), *(("decode", *case) for case in DECODE)]
)
def test_the_same_as_loops(phase, rows, queries, tile, monkeypatch):
    monkeypatch.setattr("kascade_cli.sparse.strategies.oracle._BLOCK_ELEMENTS", 700)  # several blocks of tiles
    budget = Budget(ratio=0.2, min_keys=3, tile=tile)
    slots = 77 if phase == "prefill" else 61
    query, key, value = tensors(slots, queries, len(rows))
    for b, (start, length, _) in enumerate(rows):  # what is padding must not count, whatever it holds
        for cache in (key, value):
            cache[b, :, :start] = cache[b, :, start + length :] = torch.nan
    starts, lengths, firsts = (torch.tensor(x, dtype=torch.int32) for x in zip(*rows, strict=True))
    batch = Batch(Lengths(firsts, starts, lengths), phase, queries, slots, budget)
    found = {}
    for pool in ("logits", "probabilities"):
        strategy = make_strategy("oracle", [0, 1], None, pool=pool)
        state = strategy.start(batch)
        layer = Layer(1, query, key, value, SIZE**-0.5, state, get_backend("torch", "cpu"))
        found[pool] = strategy.run(layer)
        for b, row in enumerate(rows):
            want = brute(query[b], key[b], value[b], row, phase, budget, pool)
            torch.testing.assert_close(found[pool][b], want)
    if tile < 128:  # one tile of them all chooses nothing
        assert not torch.allclose(found["logits"], found["probabilities"])


def test_a_flat_query_drowns_a_peaked_one_before_the_softmax_and_not_after_it():
    """Two queries of one head: one sees a single key, the other has large logits everywhere, largest at another."""
    key = torch.zeros(1, 1, 10, 3, dtype=torch.float64)
    key[0, 0, 2, 0] = 1.0  # what the peaked query looks for
    key[0, 0, :8, 1] = 1.0
    key[0, 0, 5:8, 2] = 1.0
    query = torch.tensor([[9.0, 0.0, 0.0], [0.0, 500.0, 12.0]], dtype=torch.float64)[None, None]
    batch = Batch(
        Lengths(*(torch.tensor([n], dtype=torch.int32) for n in (8, 0, 10))), "prefill", 2, 10,
        Budget(ratio=0.01, min_keys=2, tile=2),
    )  # fmt: skip
    kept = {}
    for pool in ("logits", "probabilities"):
        strategy = make_strategy("oracle", [0, 1], None, pool=pool)
        layer = Layer(1, query, key, key, 1.0, strategy.start(batch), get_backend("torch", "cpu"))
        kept[pool] = strategy.run(layer)[0, 0, 0, 0]
    assert kept["probabilities"] > 0.9
    assert kept["logits"] < 0.1


def test_other_pools_are_refused():
    with pytest.raises(UsageError, match=r"oracle: pool mean must be probabilities or logits"):
        make_strategy("oracle", [0], None, pool="mean")
