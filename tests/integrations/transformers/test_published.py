"""quest, omnikv, lessismore and the two oracles against loops of their definitions, in float64."""

import pytest
import torch

from kascade_cli import attach
from kascade_cli.errors import UsageError
from kascade_cli.models import describe
from kascade_cli.sparse import make_strategy

from .naive import Naive, some_profile
from .test_attach import ids_of, run

CHOOSE = {"omnikv": {"filter_layers": (0, 1, 2)}, "lessismore": {"selection_layers": (0, 2)}}  # of four layers


def steps(length, count):
    return [(0, length), *[(i, i + 1) for i in range(length, length + count)]]


@pytest.fixture(scope="module")
def llama(make_tiny_model):
    model = make_tiny_model("llama")
    return model, some_profile(describe(model))


def compare(model, spec, ids, segments, ratio, min_keys, differs=True, **options):
    """Logits and counted keys of the attached model are those of the loop. spec: what a user writes."""
    name = spec.split(":")[0]
    naive = Naive(model, None, name, segments, ratio, min_keys, **{**CHOOSE.get(name, {}), **options})
    want = naive.logits(ids)
    with attach(model, strategy=spec, min_keys=min_keys) as attachment:
        got = run(model, ids, segments)
    torch.testing.assert_close(got, want)
    report = attachment.report()
    assert report["keys_read"] == naive.read
    assert report["keys_visible"] == naive.visible
    if differs:
        assert (got - run(model, ids, segments)).abs().max() > 1e-4  # it really was sparse
    return report


@pytest.mark.parametrize("length", [2, 15, 16, 31, 33, 97, 130])
@pytest.mark.parametrize("name", ["quest", "omnikv", "lessismore", "oracle-per-query"])
def test_prefill_then_decode(llama, name, length):
    compare(llama[0], f"{name}:ratio=0.2", ids_of(length + 5, seed=length), steps(length, 5), 0.2, 3, length > 31)


OPTIONS = [
    ("quest:page=1", {"page": 1}),
    ("quest:page=5", {"page": 5}),
    ("quest:page=64", {"page": 64}),
    ("quest:page=7:dense_layers=0", {"page": 7, "dense_layers": 0}),
    ("quest:dense_layers=3", {"dense_layers": 3}),
    ("omnikv:filter_layers=1", {"filter_layers": (1,)}),
    ("omnikv:filter_layers=0+2", {"filter_layers": (0, 2)}),
    ("lessismore:selection_layers=1", {"selection_layers": (1,)}),
    ("lessismore:recent=0", {"recent": 0.0}),
    ("lessismore:recent=0.6", {"recent": 0.6}),
    ("lessismore:recent=1", {"recent": 1.0}),
    ("streaming-llm:sinks=0", {"sinks": 0}),
    ("streaming-llm:sinks=9", {"sinks": 9}),
]


@pytest.mark.parametrize(("spec", "options"), OPTIONS)
def test_options(llama, spec, options):
    compare(llama[0], spec + ":ratio=0.1", ids_of(120, seed=3), steps(114, 6), 0.1, 6, **options)


@pytest.mark.parametrize("name", ["quest", "omnikv", "lessismore", "oracle-per-query"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 4), (6, 3)])
def test_groups(make_tiny_model, name, heads, kv_heads):
    model = make_tiny_model("qwen3", heads=heads, kv_heads=kv_heads)
    compare(model, f"{name}:ratio=0.15", ids_of(99, seed=4), steps(94, 5), 0.15, 2)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("quest:dense_layers=1", {"dense_layers": 1}),
        ("omnikv:filter_layers=3", {"filter_layers": (3,)}),
        ("lessismore:selection_layers=1+3", {"selection_layers": (1, 3)}),
        ("oracle-per-query", {}),
    ],
)
def test_layers_of_other_attention_are_left_alone(make_tiny_model, spec, options):
    """Dense layers are counted, and choosing ones named, among the full-attention layers (here 1, 3 and 5)."""
    model = make_tiny_model("gemma3", layers=6)
    compare(model, spec + ":ratio=0.1", ids_of(95, seed=5), steps(91, 4), 0.1, 2, **options)


def test_the_papers_share_of_streaming_llm(llama):
    report = compare(llama[0], "streaming-llm:ratio=0.3", ids_of(130, seed=6), steps(126, 4), 0.3, 4)
    assert report["budget"]["ratio"] == 0.3
    assert report["phases"]["decode"]["density"] == pytest.approx((39 * 4) / (127 + 128 + 129 + 130))


def test_density_by_hand(llama):
    """One decode step at 100 keys, 10 of them in the budget, four layers."""
    model, ids = llama[0], ids_of(100, seed=7)
    want = {
        # newest page: keys 96 to 99; six more fit in, rounded up to one page of 16
        "quest": (2 * 100 + 2 * (16 + 4)) / 400,
        "omnikv": (3 * 100 + 10) / 400,
        "lessismore": (2 * 100 + 2 * 10) / 400,
        "oracle-per-query": (100 + 3 * 10) / 400,
        "oracle": (100 + 3 * 10) / 400,
        "streaming-llm": 10 / 100,
    }
    for name, density in want.items():
        with attach(model, strategy=name, ratio=0.1, min_keys=1) as attachment:
            run(model, ids, steps(99, 1))
            assert attachment.report()["phases"]["decode"]["density"] == pytest.approx(density), name
    for name in ("quest", "omnikv", "lessismore"):  # published for decoding only
        with attach(model, strategy=name, ratio=0.1, min_keys=1) as attachment:
            run(model, ids, [(0, 100)])
            assert attachment.density == 1.0


def test_published_depths_as_shares_of_the_models():
    every = list(range(32))
    assert make_strategy("omnikv", every, None).choosing_layers == (2, 8, 18)
    assert make_strategy("lessismore", every, None).choosing_layers == (2, 13)
    assert make_strategy("omnikv", [1, 3, 5, 7], None).choosing_layers == (1, 3, 5)
    assert make_strategy("lessismore", list(range(36)), None).choosing_layers == (2, 15)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("quest:page=0", "page 0 must be 1 or more"),
        ("quest:page=two", "page two is not a whole number"),
        ("quest:pages=3", "no option 'pages': it has page, dense_layers"),
        ("quest:page=3:page=4", "has page twice"),
        ("quest:page", "'page' is not an option"),
        ("omnikv:filter_layers=9", "layer 9 is not a full-attention layer"),
        ("omnikv:filter_layers=2+1", "ascending order"),
        ("omnikv:filter_layers=a", "not a list of layers"),
        ("lessismore:recent=1.5", r"recent 1.5 is outside \[0, 1\]"),
        ("lessismore:recent=nan", r"recent nan is outside \[0, 1\]"),
        ("oracle:page=3", "no option 'page': it has pool"),
        ("dense:ratio=x", "ratio x is not a number"),
    ],
)
def test_options_that_make_no_sense(llama, spec, message):
    with pytest.raises(UsageError, match=message):
        attach(llama[0], strategy=spec)
    assert llama[0].config._attn_implementation == "sdpa"
