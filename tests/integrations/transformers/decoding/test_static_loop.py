"""Steps on a static cache against transformers' own loop on a growing one: tokens, logits and counts, in float64."""

import pytest
import torch
from transformers import DynamicCache

from kascade_cli import attach
from kascade_cli.integrations.transformers.decoding import Runner, Slots, bucket, decode, decode_behind
from kascade_cli.integrations.transformers.decoding import decoder as decoding
from kascade_cli.models import describe, logits_at
from kascade_cli.sparse import known_strategies
from tests.conftest import tiny_model

from ..naive import some_profile

COUNTS = ("keys_read", "keys_visible", "forward_passes", "phases")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """The static loop on a CPU too, without capturing."""
    monkeypatch.setattr(decoding, "EVERYWHERE", True)


@pytest.fixture(scope="module")
def models(make_tiny_model):
    made = {kind: make_tiny_model(kind, seed=4) for kind in ("llama", "qwen2", "qwen3", "phi3")}
    for model in made.values():
        model.generation_config.eos_token_id = None
    return made


def padded(lengths, seed=0):
    """Left-padded ids and mask of rows of these lengths."""
    ids = torch.randint(3, 64, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return ids * mask, mask


def eager(model, ids, mask, steps):
    """Greedy on a DynamicCache: tokens [B, steps] and the logits that chose them [B, steps, V]."""
    cache, position, tokens, logits = DynamicCache(config=model.config), mask.cumsum(-1) - 1, [], []
    chunk, at = ids, position.clamp_min(0)
    for _ in range(steps):
        out = model(chunk, past_key_values=cache, attention_mask=mask, position_ids=at, use_cache=True).logits[:, -1]
        logits.append(out)
        tokens.append(out.argmax(-1))
        chunk, mask = tokens[-1][:, None], torch.cat([mask, mask[:, :1] * 0 + 1], 1)
        at = mask.sum(-1, keepdim=True) - 1
    return torch.stack(tokens, 1), torch.stack(logits, 1)


def prefilled(model, ids, mask):
    """The cache of a prompt, the token after it, and how many tokens each row holds."""
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits, _ = logits_at(
        model, ids, 1, past_key_values=cache, attention_mask=mask, position_ids=positions, use_cache=True
    )
    return cache, logits[:, -1].argmax(-1), mask.sum(-1)


def static(model, attachment, ids, mask, steps, slots):
    """The same on Slots: tokens [B, steps], and the logits of all but the first."""
    cache, token, lengths = prefilled(model, ids, mask)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    runner = Runner(model, Slots(layers, len(ids), slots), attachment, capture=False)
    runner.load(layers, token, lengths)
    logits = []

    def choose(scores, _):
        logits.append(scores.clone())
        return scores.argmax(-1)

    return decode(runner, steps, choose=choose), torch.stack(logits, 1)


@pytest.mark.parametrize("strategy", known_strategies())
@pytest.mark.parametrize("lengths", [(67,), (64, 31, 1, 97)], ids=["alone", "padded"])
def test_every_strategy(models, strategy, lengths):
    model = models["llama"]
    profile = some_profile(describe(model))
    ids, mask = padded(lengths)
    with torch.no_grad(), attach(model, profile, strategy=strategy) as run:
        tokens, logits = eager(model, ids, mask, 19)
        want = run.report()
        run.reset()
        got, found = static(model, run, ids, mask, 19, max(lengths) + 19)
        report = run.report()
    assert got.tolist() == tokens.tolist()
    torch.testing.assert_close(found, logits[:, 1:])
    assert {name: report[name] for name in COUNTS} == {name: want[name] for name in COUNTS}
    assert report.get("refresh") == want.get("refresh")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("strategy", ["dense", "kascade", "kascade-refresh"])
def test_families_and_slots_to_spare(models, kind, strategy):
    """A cache that is much wider than what it holds, as a bucket is."""
    model = models[kind]
    profile = some_profile(describe(model), ratio=0.1)
    ids, mask = padded((50, 33), seed=5)
    with torch.no_grad(), attach(model, profile, strategy=strategy) as run:
        tokens, logits = eager(model, ids, mask, 11)
        got, found = static(model, run, ids, mask, 11, 256)
    assert got.tolist() == tokens.tolist()
    torch.testing.assert_close(found, logits[:, 1:])


def test_a_budget_by_context_length_changes_on_the_way(models):
    """The ratio of a longer context takes over in the middle of decoding, as the device counts."""
    from kascade_cli.schema import Budget

    model = models["llama"]
    profile = some_profile(describe(model))
    budget = Budget(ratio=0.5, min_keys=4, tile=32, ratios={32: 0.5, 64: 0.1})
    profile = profile.model_copy(update={"budget": budget})
    ids, mask = padded((58, 50), seed=6)
    with torch.no_grad(), attach(model, profile) as run:
        tokens, _ = eager(model, ids, mask, 14)
        want = run.report()["phases"]["decode"]
        run.reset()
        got, _ = static(model, run, ids, mask, 14, 128)
        assert run.report()["phases"]["decode"] == want
    assert got.tolist() == tokens.tolist()
    by_hand = sum(length + 3 * budget.count(length) for first in (59, 51) for length in range(first, first + 13))
    assert want["keys_read"] == by_hand


@pytest.mark.parametrize("steps", [1, 2, 8, 9, 10, 40])
def test_it_ends_with_the_last_row_and_counts_no_step_more(models, steps):
    """Rows end at different steps; the loop looks every eighth, and what ran beyond leaves no trace."""
    model = models["llama"]
    ids, mask = padded((40, 23, 55), seed=7)
    with torch.no_grad(), attach(model, some_profile(describe(model)), strategy="kascade-refresh") as run:
        tokens, _ = eager(model, ids, mask, steps)
        # Tokens that end the rows somewhere on the way, or not at all.
        stops = {
            int(tokens[0, min(3, steps - 1)]),
            int(tokens[1, min(6, steps - 1)]),
            int(tokens[2, min(11, steps - 1)]),
        }
        ends = [next((i + 1 for i, t in enumerate(row) if t in stops), None) for row in tokens.tolist()]
        wanted = steps if None in ends else max(ends)
        run.reset()
        eager(model, ids, mask, wanted)
        want = run.report()
        run.reset()
        seen = []
        cache, token, lengths = prefilled(model, ids, mask)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        runner = Runner(model, Slots(layers, 3, 100), run, capture=False)
        runner.load(layers, token, lengths)
        got = decode(runner, steps, stops=stops, seen=seen.append)
        report = run.report()
    assert got.tolist() == tokens[:, :wanted].tolist()
    assert torch.cat(seen, 1).tolist() == got.tolist()
    assert {name: report[name] for name in COUNTS} == {name: want[name] for name in COUNTS}
    assert report["refresh"] == want["refresh"]


def test_a_runner_is_kept_for_prompts_of_about_one_length(models):
    model = models["llama"]
    with torch.no_grad(), attach(model, some_profile(describe(model)), strategy="kascade-refresh") as run:
        runners = []
        for lengths in ((60, 44), (61, 8), (60, 44, 9), (400, 3)):
            ids, mask = padded(lengths, seed=len(runners))
            tokens, _ = eager(model, ids, mask, 10)
            cache, token, held = prefilled(model, ids, mask)
            assert decode_behind(model, cache, token, 10, lengths=held).tolist() == tokens.tolist()
            runners.append(run.decoder.runner)
    assert runners[0] is runners[1]
    assert len(set(map(id, runners))) == 3
    assert run.decoder is None  # detached: its cache is free


def test_nothing_changes_while_graphs_are_prepared(models):
    """What is warmed up and recorded is undone: tokens, lengths, counts (capturing is played, not stubbed away)."""
    model = models["llama"]
    ids, mask = padded((30, 21), seed=9)
    with torch.no_grad(), attach(model, some_profile(describe(model)), strategy="kascade-refresh") as run:
        tokens, _ = eager(model, ids, mask, 20)
        run.reset()
        cache, token, lengths = prefilled(model, ids, mask)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        runner = Runner(model, Slots(layers, 2, 64), run, capture=False)
        runner.load(layers, token, lengths)
        before = run.report(), [tensor.clone() for tensor in runner.slots.state()]
        with runner.undone():
            for kind in run.memory.kinds():
                runner._step(kind)
        assert run.report() == before[0]
        assert all(map(torch.equal, runner.slots.state(), before[1]))
        assert decode(runner, 20).tolist() == tokens.tolist()


def test_buckets():
    assert [bucket(n) for n in (1, 256, 257, 4096, 4097, 28_700, 65_536, 65_537)] == [
        256, 256, 512, 4096, 4608, 28_672 + 2048, 65_536, 73_728,
    ]  # fmt: skip
    assert all(n <= bucket(n) <= n * 9 / 8 + 256 for n in range(1, 200_000, 997))


@torch.no_grad()
def test_what_cannot_be_captured_says_why(models, make_tiny_model, monkeypatch):
    gemma = make_tiny_model("gemma3")
    with attach(gemma, strategy="dense") as run:
        ids, mask = padded((20,))
        cache, token, _ = prefilled(gemma, ids, mask)
        assert decode_behind(gemma, cache, token, 9) is None
        assert run.decoder.reason == "layer 0 keeps a sliding window of its keys"
    model = models["llama"]
    with attach(model, strategy="dense") as run:
        cache, token, _ = prefilled(model, *padded((20,)))
        assert decode_behind(model, cache, token, 1) is None
        monkeypatch.setattr(decoding, "EVERYWHERE", False)
        run.decoder = None
        assert decode_behind(model, cache, token, 9) is None
        assert run.decoder.reason == "the model is on cpu, and CUDA graphs need a GPU"
    assert decode_behind(model, cache, token, 9) is None  # nothing is attached


def test_dynamic_rope_is_refused():
    """Its frequencies follow a length that transformers asks the device for."""
    import transformers as tf

    model = tiny_model("llama")
    config = tf.LlamaConfig(**model.config.to_diff_dict() | {"rope_parameters": {
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0,
    }})  # fmt: skip
    with attach(tf.LlamaForCausalLM(config).eval(), strategy="dense") as run:
        assert "rotary embedding (dynamic)" in decoding.Decoder(run).reason
