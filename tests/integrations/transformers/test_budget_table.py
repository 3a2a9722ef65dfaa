"""A budget by context length, in attached models, against the naive oracle: whole, in chunks, padded."""

import pytest
import torch
from transformers import DynamicCache

from kascade_cli import attach
from kascade_cli.models import describe
from kascade_cli.schema import Budget

from .naive import Naive, some_profile
from .test_attach import ids_of, run

TABLE = {16: 0.5, 64: 0.25, 128: 0.05}  # k falls where a length begins: 32 keys at 127, 7 at 128
STRATEGIES = [
    "kascade", "kascade-pooled", "kascade-reused-norm", "kascade-refresh", "oracle", "streaming-llm",
    "quest", "omnikv", "lessismore",
]  # fmt: skip


@pytest.fixture(scope="module")
def llama(make_tiny_model):
    model = make_tiny_model("llama")
    budget = Budget(ratios=TABLE, min_keys=4)
    return model, some_profile(describe(model)).model_copy(update={"budget": budget})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_follows_the_table(llama, strategy):
    model, profile = llama
    ids = ids_of(150)
    segments = [(0, 125), *[(i, i + 1) for i in range(125, 132)], (132, 150)]
    naive = Naive(model, profile, strategy, segments, TABLE, 4)
    want = naive.logits(ids)
    with attach(model, profile, strategy=strategy) as attachment:
        got = run(model, ids, segments)
        report = attachment.report()
    torch.testing.assert_close(got, want)
    assert report["keys_read"] == pytest.approx(naive.read)
    assert report["budget"] == {"ratio": 0.5, "ratios": TABLE, "min_keys": 4, "tile": 32}
    # None of its ratios alone does the same.
    assert strategy != "kascade" or all(
        Naive(model, profile, strategy, segments, r, 4).logits(ids).ne(want).any() for r in TABLE.values()
    )


def test_chunks_at_tiles_give_what_one_pass_gives(llama):
    model, profile = llama
    ids = ids_of(160, seed=5)
    with attach(model, profile):
        whole = run(model, ids, [(0, 160)])
        torch.testing.assert_close(run(model, ids, [(0, 32), (32, 96), (96, 128), (128, 160)]), whole)


def test_padded_rows_have_each_their_own_ratio(llama):
    model, profile = llama
    rows = [ids_of(length, seed=length) for length in (140, 127, 20, 65)]
    padded = torch.tensor([[0] * (140 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (140 - len(row)) + [1] * len(row) for row in rows])
    extra = torch.tensor([ids_of(1, seed=100 + i) for i in range(len(rows))])
    with attach(model, profile), torch.no_grad():
        cache = DynamicCache(config=model.config)
        position = (mask.cumsum(1) - 1).clamp_min(0)
        outs = [model(padded, attention_mask=mask, position_ids=position, past_key_values=cache).logits]
        mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
        position = mask.sum(1, keepdim=True) - 1
        outs.append(model(extra, attention_mask=mask, position_ids=position, past_key_values=cache).logits)
        got = torch.cat(outs, 1)
        for i, row in enumerate(rows):
            alone = run(model, row + extra[i].tolist(), [(0, len(row)), (len(row), len(row) + 1)])
            torch.testing.assert_close(got[i, 140 - len(row) :], alone)


def test_a_ratio_of_ones_own_drops_the_table(llama):
    model, profile = llama
    ids = ids_of(150)
    want = Naive(model, profile, "kascade", [(0, 150)], 0.1, 4).logits(ids)
    for options in ({"ratio": 0.1}, {"strategy": "kascade:ratio=0.1"}):
        with attach(model, profile, **options) as attachment:
            torch.testing.assert_close(run(model, ids, [(0, 150)]), want)
            assert attachment.report()["budget"] == {"ratio": 0.1, "min_keys": 4, "tile": 32}
    with attach(model, profile, min_keys=7, tile=16) as attachment:  # these keep it
        run(model, ids, [(0, 150)])
        assert attachment.report()["budget"] == {"ratio": 0.5, "ratios": TABLE, "min_keys": 7, "tile": 16}
