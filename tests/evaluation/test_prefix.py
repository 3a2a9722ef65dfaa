"""Prefills that share their first layers give, to the last bit, what prefills that do not share give."""

import itertools

import pytest
import torch

from kascade_cli.devset import DevSet
from kascade_cli.evaluation import prefix
from kascade_cli.evaluation.prefix import SharedPrefill, can_share, layout_of
from kascade_cli.evaluation.runs import Runs
from kascade_cli.integrations.transformers import attach_setting
from kascade_cli.models import describe, logits_at
from kascade_cli.schema import Budget, Profile
from kascade_cli.sparse import Setting

LAYERS = 6


def profile_of(model, anchors, *, maps=(1, 0), ratio=0.1, free=False):
    info = describe(model, "toy")
    heads = "pooled" if maps == "pooled" else {}
    for layer in info.profiled_layers if maps != "pooled" else ():
        before = [anchor for anchor in anchors if anchor < layer]
        if layer not in anchors:
            row = list(maps)
            if free:
                row = [(before[-1], maps[0]), (before[0], maps[1])]
            heads[layer] = {"decode": row, "prefill": row}
    return Profile.build(
        model=info.card, anchors=anchors, profiled_layers=info.profiled_layers, head_maps=heads,
        budget=Budget(ratio=ratio, min_keys=4, tile=8),
    )  # fmt: skip


@pytest.fixture(scope="module")
def llama(make_tiny_model):
    return make_tiny_model("llama", layers=LAYERS)


def ids_of(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (1, length), generator=generator)


def every_profile(model):
    sets = [[0, *rest] for size in range(4) for rest in itertools.combinations(range(1, LAYERS), size)]
    profiles = [profile_of(model, anchors) for anchors in sets]
    profiles += [profile_of(model, anchors, maps=(0, 0)) for anchors in sets[:6]]
    profiles += [profile_of(model, anchors, ratio=0.3) for anchors in sets[:4]]
    profiles += [profile_of(model, anchors, maps="pooled") for anchors in sets[:20:3]]
    return profiles + [profile_of(model, anchors, free=True) for anchors in sets if len(anchors) == 3]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_equal_to_runs_alone(make_tiny_model, kind, order):
    model = make_tiny_model(kind, layers=LAYERS)
    profiles = every_profile(model)
    if order == "sorted":
        profiles.sort(key=layout_of)
    else:
        places = torch.randperm(len(profiles), generator=torch.Generator().manual_seed(3)).tolist()
        profiles = [profiles[place] for place in places]
    ids, places, shared = ids_of(75), [40, 74, 3], SharedPrefill(model)
    for profile in profiles:
        with attach_setting(model, Setting(profile=profile)) as attached:
            want, alone = logits_at(model, ids, places, use_cache=True)
            more = logits_at(model, ids[:, :1], past_key_values=alone.past_key_values, use_cache=True)[0]
        with attach_setting(model, Setting(profile=profile)) as attached:
            got, output = shared(model, attached, ids, places, use_cache=True)
            again = logits_at(model, ids[:, :1], past_key_values=output.past_key_values, use_cache=True)[0]
        assert torch.equal(got, want)
        assert torch.equal(again, more)  # decoding behind the shared cache too
    every = LAYERS * len(profiles)
    assert shared.run_layers < (0.7 if order == "sorted" else 0.95) * every
    assert all("forward" not in vars(module) for module in shared.layers.values())


@torch.no_grad()
def test_what_is_shared_is_what_agrees(llama):
    ids, shared = ids_of(60), SharedPrefill(llama)
    ran = []
    for anchors in ([0, 3], [0, 3, 5], [0, 3, 4], [0, 2, 4], [0, 2, 4]):
        before = shared.run_layers
        with attach_setting(llama, Setting(profile=profile_of(llama, anchors))) as attached:
            shared(llama, attached, ids, [59], use_cache=True)
        ran.append(shared.run_layers - before)
    # The first layer always runs, and the last one; layer 5 differs, then 4, then 2, then nothing.
    assert ran == [6, 2, 3, 5, 2]


@torch.no_grad()
def test_an_anchor_that_nobody_read_runs_again_for_those_who_do(llama):
    ids, shared = ids_of(60), SharedPrefill(llama)
    for anchors in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0, 1, 2]):
        profile = profile_of(llama, anchors)
        with attach_setting(llama, Setting(profile=profile)):
            want = logits_at(llama, ids, [59], use_cache=False)[0]
        with attach_setting(llama, Setting(profile=profile)) as attached:
            got, _ = shared(llama, attached, ids, [59], use_cache=False)
        assert torch.equal(got, want)


def runs_of(model, monkeypatch, share):
    if not share:
        monkeypatch.setattr("kascade_cli.evaluation.runs.can_share", lambda *_: False)
    prompts = [ids_of(length, seed=length)[0].tolist() for length in (70, 91)]
    devset = DevSet("toy", "", prompts, 0, 91, [[(30, 33), (60, 66)], [(80, 88)]], [[], []])
    told = []
    runs = Runs(model, devset, ("decode", "prefill"), advance=lambda what, _: told.append(what))
    profiles = [(str(index), profile) for index, profile in enumerate(every_profile(model)[:20])]
    with torch.no_grad():
        found = [runs.measure(profiles, prompt) for prompt in (0, 1)]
        assert runs.measure(profiles[:3], 1) == found[1][:3]
    assert sorted(told) == sorted([name for name, _ in profiles] * 2)  # each once
    assert runs._can_share is share
    return found


def test_measured_figures_are_the_same_and_in_the_order_asked_for(llama, monkeypatch):
    assert runs_of(llama, monkeypatch, True) == runs_of(llama, monkeypatch, False)


def test_models_that_cannot_share(make_tiny_model, llama, monkeypatch):
    ids = ids_of(90)[0].tolist()
    profiles = every_profile(llama)[:9]
    assert can_share(llama, profiles, ids)
    assert not can_share(llama, profiles[:1], ids)
    hybrid = make_tiny_model("gemma3", layers=LAYERS)
    assert not can_share(hybrid, [profile_of(hybrid, [1]), profile_of(hybrid, [1, 3])], ids)
    monkeypatch.setattr(prefix, "_MOST_BYTES", 100)
    assert not can_share(llama, profiles, ids)


def test_a_model_with_a_side_channel_is_found_out(make_tiny_model):
    """Layers that tell each other more than hidden states: what stands in for them says nothing."""
    model = make_tiny_model("llama", layers=LAYERS)
    told, layers = [], model.model.layers
    second, own = layers[2], layers[2].forward

    def telling(*arguments, **named):
        told.append(1)
        return own(*arguments, **named)

    second.forward = telling
    layers[0].register_forward_hook(lambda *_: told.clear())
    layers[5].register_forward_hook(lambda _, __, output: output * (1 + len(told)))
    profiles = [profile_of(model, anchors) for anchors in ([0, 4], [0, 4, 5], [0, 3])]
    assert not can_share(model, profiles, ids_of(90)[0].tolist())
    assert second.forward is telling
