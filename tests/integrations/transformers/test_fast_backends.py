"""The branch for backends that fuse, without a GPU: one of another name whose ops are the reference.

Every strategy, alone, left-padded, in chunks and in a static cache, with the scores of prefill in one block of tiles
and in several: the loops of naive.py, on both backends.
"""

import functools

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kascade_cli import attach
from kascade_cli.kernels import reference
from kascade_cli.kernels.backend import register_backend
from kascade_cli.models import describe

from .naive import NAIVE, Naive, some_profile
from .test_attach import ids_of, run
from .test_published import CHOOSE

ROWS, STEPS = (97, 33, 1, 64), 3
BLOCKS = {"one block": None, "a tile a block": 0, "two tiles a block": 2}
CHUNKS = [(0, 41), (41, 96), (96, 97), (97, 110), (110, 111), (111, 112)]


@pytest.fixture(scope="module", autouse=True)
def mirror():
    register_backend("mirror", reference)


@pytest.fixture(scope="module")
def llama(make_tiny_model):
    model = make_tiny_model("llama")
    return model, some_profile(describe(model), anchors=[0, 1, 3], ratio=0.15, min_keys=3)


@pytest.fixture(scope="module")
def truth(llama):
    """(strategy, ids, segments) -> logits of the loops, each computed once for both backends."""
    model, profile = llama

    @functools.cache
    def logits(strategy, ids, segments):
        return Naive(model, profile, strategy, segments, 0.15, 3, **CHOOSE.get(strategy, {})).logits(list(ids))

    return logits


def blocks(monkeypatch, rows, slots, tiles):
    """Room for the scores of `tiles` tiles (0: less than one)."""
    if tiles is not None:
        monkeypatch.setattr("kascade_cli.sparse.layer._score_bytes", lambda device: 4 * rows * 2 * slots * tiles)


def padded(model, rows, steps):
    """Logits [B, T + steps, V] of left-padded rows, prefilled and decoded through a cache."""
    longest = max(map(len, rows))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    cache, outs = DynamicCache(config=model.config), []
    for step in range(len(steps[0]) + 1):
        position = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with torch.no_grad():
            outs.append(model(ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits)
        if step < len(steps[0]):
            ids = torch.tensor([row[step : step + 1] for row in steps])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("backend", ["torch", "mirror"])
@pytest.mark.parametrize("strategy", NAIVE)
def test_left_padded_rows(llama, truth, strategy, backend, block, monkeypatch):
    model, profile = llama
    rows = [ids_of(length, seed=length) for length in ROWS]
    steps = [ids_of(STEPS, seed=200 + i) for i in range(len(rows))]
    blocks(monkeypatch, len(rows), max(ROWS), BLOCKS[block])
    with attach(model, profile, strategy=strategy, backend=backend):
        got = padded(model, rows, steps)
    for i, row in enumerate(rows):
        segments = ((0, len(row)), *((len(row) + s, len(row) + s + 1) for s in range(STEPS)))
        torch.testing.assert_close(got[i, max(ROWS) - len(row) :], truth(strategy, tuple(row + steps[i]), segments))


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("backend", ["torch", "mirror"])
@pytest.mark.parametrize("strategy", NAIVE)
def test_chunks_in_caches(llama, truth, strategy, backend, cache, monkeypatch):
    model, profile = llama
    ids = ids_of(112, seed=12)
    blocks(monkeypatch, 1, 112, 2)
    options = {"max_cache_len": 131} if cache is StaticCache else {}
    with attach(model, profile, strategy=strategy, backend=backend) as attachment:
        got = run(model, ids, CHUNKS, cache(config=model.config, **options))
        assert attachment.report()["backend"] == backend
    torch.testing.assert_close(got, truth(strategy, tuple(ids), tuple(CHUNKS)))


@pytest.mark.parametrize("strategy", NAIVE)
def test_alone(llama, truth, strategy, monkeypatch):
    model, profile = llama
    ids, segments = ids_of(134, seed=13), ((0, 131), *((i, i + 1) for i in range(131, 134)))
    outs, reports = [], []
    for tiles in (None, 1, 3):
        blocks(monkeypatch, 1, 131, tiles)
        with attach(model, profile, strategy=strategy, backend="mirror") as attachment:
            outs.append(run(model, ids, segments))
            reports.append(attachment.report())
    for got, report in zip(outs, reports, strict=True):
        torch.testing.assert_close(got, truth(strategy, tuple(ids), segments))
        assert report["keys_read"] == reports[0]["keys_read"]


def test_each_strategy_calls_the_backend(llama):
    """Or the comparison above is one of PyTorch with itself."""
    calls = []

    def counted(name):
        def op(*args, **kwargs):
            calls.append(name)
            if kwargs.get("pooled"):
                calls.append("all heads in one")
            return getattr(reference, name)(*args, **kwargs)

        return op

    from kascade_cli.kernels.contract import OPS

    register_backend("counted", {name: counted(name) for name in OPS})
    model, profile = llama
    used = {}
    for strategy in NAIVE:
        calls.clear()
        with attach(model, profile, strategy=strategy, backend="counted"):
            padded(model, [ids_of(60), ids_of(50)], [ids_of(1), ids_of(1)])
        used[strategy] = set(calls)
    assert [strategy for strategy in NAIVE if "all heads in one" in used[strategy]] == ["kascade-pooled"]
    used["kascade-pooled"].remove("all heads in one")
    assert set().union(*used.values()) == set(OPS)
    assert used["dense"] == {"prefill_dense", "decode_dense"}
    assert used["kascade"] == set(OPS) - {"prefill_sparse_lse"}
    assert "prefill_sparse_lse" in used["kascade-reused-norm"]
    for strategy in ("quest", "omnikv", "lessismore", "streaming-llm"):
        assert "decode_sparse" in used[strategy]
