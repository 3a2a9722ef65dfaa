"""Profiles without head maps and without a fingerprint, attached: what runs, what is said, what is refused."""

import pytest
import torch

from kascade_cli import attach
from kascade_cli.errors import KascadeError
from kascade_cli.models import describe
from kascade_cli.schema import Profile

from .naive import Naive, some_profile, without_head_maps
from .test_attach import ids_of, run

SEGMENTS = [(0, 100), *[(i, i + 1) for i in range(100, 103)], (103, 140)]


@pytest.fixture(scope="module")
def llama(make_tiny_model):
    model = make_tiny_model("llama", kv_heads=4, heads=8, layers=5)
    return model, some_profile(describe(model), anchors=[0, 1, 3])


@pytest.mark.parametrize(
    "strategy", ["kascade", "kascade-pooled", "kascade-decode-only", "kascade-reused-norm", "kascade-refresh"]
)
def test_without_head_maps_every_head_reads_the_pooled_keys(llama, strategy):
    model, profile = llama
    ids = ids_of(140)
    naive = Naive(model, profile, strategy, SEGMENTS, 0.2, 4, pooled=True)
    want = naive.logits(ids)
    with attach(model, without_head_maps(profile), strategy=strategy) as attachment:
        torch.testing.assert_close(run(model, ids, SEGMENTS), want)
        report = attachment.report()
    assert report["keys_read"] == pytest.approx(naive.read)
    assert report.get("head_maps") == (None if strategy == "kascade-pooled" else "not measured: pooled")
    assert report["roles"] == {"dense": [0], "anchor": [1, 3], "reuse": [2, 4]}


def test_with_head_maps_nothing_is_said_and_heads_differ(llama):
    model, profile = llama
    ids = ids_of(140)
    with attach(model, profile) as attachment:
        measured = run(model, ids, SEGMENTS)
        assert "head_maps" not in attachment.report()
    with attach(model, without_head_maps(profile)):
        assert (run(model, ids, SEGMENTS) - measured).abs().max() > 1e-4


def test_the_identity_map_needs_no_measured_one(llama):
    model, profile = llama
    ids = ids_of(140)
    want = Naive(model, profile, "kascade-no-remap", SEGMENTS, 0.2, 4).logits(ids)
    with attach(model, without_head_maps(profile), strategy="kascade-no-remap") as attachment:
        torch.testing.assert_close(run(model, ids, SEGMENTS), want)
        assert "head_maps" not in attachment.report()


def bare(profile, **model):
    """The profile as one writes it for every model of a geometry, through its file."""
    card = profile.model.model_copy(update={"fingerprint": None, "name": "published/model", **model})
    return Profile.loads(profile.model_copy(update={"model": card}).dumps())


def test_without_a_fingerprint_any_weights_of_the_geometry_run(llama, make_tiny_model):
    model, profile = llama
    ids, free = ids_of(140), bare(profile)
    assert "fingerprint" not in free.dumps()
    want = Naive(model, profile, "kascade", SEGMENTS, 0.2, 4).logits(ids)
    with attach(model, free):
        torch.testing.assert_close(run(model, ids, SEGMENTS), want)
    attach(make_tiny_model("llama", kv_heads=4, heads=8, layers=5, seed=7), free).detach()


@pytest.mark.parametrize(
    ("kind", "geometry", "message"),
    [
        ("llama", {"layers": 6}, "the profile is for published/model with 5 layers; LlamaForCausalLM has 6"),
        ("llama", {"heads": 4}, "8 query heads; LlamaForCausalLM has 4"),
        ("llama", {"kv_heads": 2}, "4 kv heads; LlamaForCausalLM has 2"),
        ("qwen3", {}, "4 head dim; Qwen3ForCausalLM has 12"),
    ],
)
@pytest.mark.parametrize("allowed", [False, True])
def test_another_geometry_is_refused(llama, make_tiny_model, kind, geometry, message, allowed):
    other = make_tiny_model(kind, **{"layers": 5, "heads": 8, "kv_heads": 4} | geometry)
    with pytest.raises(KascadeError) as error:
        attach(other, bare(llama[1]), allow_other_weights=allowed)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_other_full_attention_layers_are_refused(make_tiny_model):
    model = make_tiny_model("gemma3", layers=6)
    info = describe(model)
    profile = some_profile(info)
    attach(model, bare(profile)).detach()
    everywhere = Profile.build(
        model=info.card.model_copy(update={"fingerprint": None}), anchors=[0, 2], profiled_layers=range(6),
        head_maps=None,
    )  # fmt: skip
    with pytest.raises(KascadeError, match="full-attention layers are not those of"):
        attach(model, everywhere)
