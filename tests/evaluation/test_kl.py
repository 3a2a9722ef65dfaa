"""KL measured for a profile equals KL computed by hand from the logits of separate runs."""

import pytest
import torch

from kascade_cli import attach
from kascade_cli.errors import KascadeError
from kascade_cli.evaluation import kl as verify
from kascade_cli.models import describe
from kascade_cli.schema import Budget, Profile


def profile_for(model, anchors, ratio=0.1, min_keys=4, tile=8):
    info = describe(model, "toy")
    reuse = [layer for layer in info.profiled_layers if layer not in anchors]
    maps = {layer: {"decode": [1, 0], "prefill": [0, 0]} for layer in reuse}
    budget = Budget(ratio=ratio, min_keys=min_keys, tile=tile)
    return Profile.build(
        model=info.card, anchors=anchors, profiled_layers=info.profiled_layers, head_maps=maps, budget=budget
    )


def prompt_of(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (length,), generator=generator).tolist()


def by_hand(dense, sparse):
    p = dense.double().softmax(-1)
    return float((p * (p.log() - sparse.double().softmax(-1).log())).sum(-1).mean())


@pytest.fixture(scope="module")
def llama(make_tiny_model):
    return make_tiny_model("llama")


@torch.no_grad()
@pytest.mark.parametrize("phases", [("decode",), ("prefill",), ("decode", "prefill")])
def test_kl_by_hand(llama, phases):
    ids, answers = prompt_of(91), [40, 41, 70, 83, 84, 89]
    profile = profile_for(llama, [0, 2])
    found = verify.measure_kl(llama, [profile], [ids], [answers], phases, decode_tokens=11)[0]
    tokens, split = torch.tensor([ids]), 91 if phases == ("prefill",) else 80
    dense = llama(tokens).logits[0]
    wanted = {}
    if phases == ("decode",):
        cache = llama(tokens[:, :split], use_cache=True).past_key_values
    with attach(llama, profile):
        if "prefill" in phases:
            output = llama(tokens[:, :split], use_cache=True)
            at = [position for position in answers if position < split]
            wanted["prefill"] = by_hand(dense[at], output.logits[0, at])
            cache = output.past_key_values
        if "decode" in phases:
            steps = [llama(tokens[:, i : i + 1], past_key_values=cache).logits[0, -1] for i in range(split, 90)]
            wanted["decode"] = by_hand(dense[[83, 84, 89]], torch.stack(steps)[[3, 4, 9]])
    assert found.kl.keys() == wanted.keys()
    for phase, value in wanted.items():
        assert found.kl[phase] == pytest.approx(value, rel=1e-4)
        assert value > 1e-4  # a sparse run that differs, or the test says nothing


@torch.no_grad()
def test_all_keys_give_no_divergence(llama):
    ids = prompt_of(75)
    every = profile_for(llama, [0, 1], ratio=1.0)
    some = profile_for(llama, [0, 1])
    results = verify.measure_kl(llama, [every, some], [ids], [[]], ("decode", "prefill"), decode_tokens=8)
    assert results[0].score < 1e-6  # the comparison is made in float32
    assert results[1].score > 1e-4


@torch.no_grad()
def test_a_dense_prefill_serves_every_profile_alike(llama):
    """Decoding appends to the cache; the second profile must not see what the first one added."""
    ids, profile = prompt_of(75), profile_for(llama, [0, 2])
    twice = verify.measure_kl(llama, [profile, profile], [ids], [[]], ("decode",), decode_tokens=8)
    assert twice[0].kl == twice[1].kl


@torch.no_grad()
def test_hybrid_models(make_tiny_model):
    model = make_tiny_model("gemma3")
    profile = profile_for(model, [1])
    result = verify.measure_kl(model, [profile], [prompt_of(60)], [[]], ("decode", "prefill"), decode_tokens=8)[0]
    assert result.kl["decode"] > 0
    assert result.kl["prefill"] > 0


def test_means_over_prompts():
    result = verify.MeanKL()
    for value in (1.0, 2.0, 6.0):
        result.add({"decode": value, "prefill": 2 * value})
    assert result.kl == {"decode": pytest.approx(3.0), "prefill": pytest.approx(6.0)}
    assert result.score == pytest.approx(4.5)
    assert result.prompts == 3


@torch.no_grad()
def test_hopeless_profiles_are_given_up_after_one_prompt(llama, monkeypatch):
    values = iter([0.0, 0.2, 3.0, 0.0, 0.2])
    monkeypatch.setattr(verify, "_sparse_kl", lambda *_: llama(torch.tensor([[3]])) and {"decode": next(values)})
    monkeypatch.setattr("kascade_cli.integrations.transformers.report.Tally.check", lambda self: {})
    calls = []
    profiles = [profile_for(llama, [0, anchor]) for anchor in (1, 2, 3)]
    prompts = [prompt_of(40), prompt_of(41)]
    found = verify.measure_kl(
        llama, profiles, prompts, [[], []], ("decode",), decode_tokens=4, advance=lambda: calls.append(1)
    )
    assert [entry.prompts for entry in found] == [2, 2, 1]
    assert len(calls) == 6


def test_nan_in_a_sparse_run_is_infinitely_wrong():
    dense = torch.zeros(2, 5).log_softmax(-1)
    assert verify._mean_kl(dense, torch.full((2, 5), torch.nan)) == float("inf")
    assert verify._mean_kl(dense, torch.zeros(2, 5)) == 0


@torch.no_grad()
def test_nan_in_the_dense_model(make_tiny_model):
    model = make_tiny_model("llama", layers=2)
    profile = profile_for(model, [0])
    model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(KascadeError, match="dense model gives NaN"):
        verify.measure_kl(model, [profile], [prompt_of(40)], [[]], ("decode",), decode_tokens=4)


@pytest.mark.parametrize(
    ("answers", "phases", "split", "prefill", "decode"),
    [
        ([10, 90, 97], ("decode", "prefill"), 92, [10, 90], [97]),
        ([10, 90, 97], ("prefill",), 100, [10, 90, 97], []),
        ([10, 90, 97], ("decode",), 92, [], [97]),
        ([], ("decode", "prefill"), 92, list(range(28, 92)), list(range(92, 100))),
    ],
)
def test_positions(answers, phases, split, prefill, decode):
    found = verify.split_positions(100, answers, phases, 8)
    assert (found.split, found.prefill, found.decode) == (split, prefill, decode)


@pytest.mark.parametrize(("answers", "phases"), [([95], ("prefill", "decode")), ([10], ("decode",))])
def test_nothing_to_measure(answers, phases):
    with pytest.raises(KascadeError, match="too short to verify"):
        verify.split_positions(100, answers, phases, 8)


@pytest.mark.parametrize(("source", "passed"), [("hops", (None, None)), ("notes.jsonl", ("body", True))])
def test_options_of_the_captured_texts_are_not_those_of_a_built_in_task(monkeypatch, source, passed):
    seen = {}
    monkeypatch.setattr(verify, "load_devset", lambda *_, **options: seen.update(options))
    meta = {"seed": 3, "options": {"text_field": "body", "chat_template": True}}
    verify.held_out_prompts(meta, None, source, num_prompts=2, max_length=64)
    assert (seen["text_field"], seen["chat_template"]) == passed
    assert (seen["seed"], seen["held_out"]) == (3, True)
