"""Which processes need each other's indices under tensor parallelism, and what a process has that needs none."""

import pytest

from kascade_cli.integrations.vllm.heads import local_profile, split
from kascade_cli.models import ModelInfo
from kascade_cli.partition import Partition
from kascade_cli.schema import ModelCard, Profile
from kascade_cli.sparse import Setting, make_strategy

LAYERS, WORLD = 6, 2
INFO = ModelInfo("m", None, LAYERS, 8, 4, 16, list(range(LAYERS)))


def profile(prefill=(1, 0, 2, 2), decode=(0, 0, 3, 2)):
    card = ModelCard(name="m", layers=LAYERS, query_heads=8, kv_heads=4, head_dim=16)
    maps = {layer: {"decode": decode, "prefill": prefill} for layer in (1, 2, 4, 5)}
    return Profile.build(model=card, anchors=[0, 3], profiled_layers=range(LAYERS), head_maps=maps)


def shared(strategy, found, rank=0):
    return split(Setting(strategy, found), INFO, Partition(rank, WORLD, None))


@pytest.mark.parametrize("rank", [0, 1])
def test_maps_that_stay_at_home(rank):
    heads = shared("kascade", profile(), rank)
    assert (heads.partition, heads.gathers, heads.world) == (None, (), WORLD)
    own = heads.strategy
    assert (own.profile.model.kv_heads, own.profile.model.query_heads) == (2, 4)
    for phase, maps in (("prefill", (1, 0, 2, 2)), ("decode", (0, 0, 3, 2))):
        for layer, anchor in ((1, 0), (2, 0), (4, 3), (5, 3)):
            # The head that a KV head reads, counted from the process's first.
            want = [(anchor, head - 2 * rank) for head in maps[2 * rank : 2 * rank + 2]]
            assert own.sources(layer, phase) == want
    assert own.profile.loads(own.profile.dumps()).anchors == [0, 3]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_head_across_makes_all_gather(rank):
    """Whichever process it belongs to: all of them take part in a gather."""
    for crossing in ((2, 0, 2, 2), (1, 0, 2, 1)):
        for maps in ({"prefill": crossing}, {"decode": crossing}):
            heads = shared("kascade", profile(**maps), rank)
            assert heads.gathers == (0, 3)
            assert heads.partition == Partition(rank, WORLD, None)
            assert "gathered" in heads.describe()


def test_strategies():
    crossing = profile(prefill=(3, 3, 0, 0))
    assert shared("kascade-pooled", profile()).partition is not None
    assert shared("kascade-no-remap", crossing).gathers == ()
    assert shared("kascade-no-remap", crossing, 1).strategy.sources(1, "prefill") == [(0, 0), (0, 1)]
    assert shared("kascade-decode-only", profile()).gathers == ()
    for name in ("dense", "oracle", "streaming-llm"):
        heads = shared(name, profile())
        assert heads.gathers == ()
    assert shared("omnikv", profile()).gathers != ()
    assert split(Setting("kascade", crossing), INFO, Partition(0, 1, None)).describe() == "one process"


def test_anchors_of_several_layers():
    """Free assignment keeps the anchor of every head."""
    card = ModelCard(name="m", layers=4, query_heads=4, kv_heads=4, head_dim=16)
    maps = {3: [[0, 1], [2, 0], [2, 3], [0, 2]]}
    free = Profile.build(
        model=card,
        anchors=[0, 1, 2],
        profiled_layers=range(4),
        head_maps={k: [tuple(e) for e in v] for k, v in maps.items()},
    )
    own = local_profile(make_strategy("kascade", range(4), free), 1, 2)
    assert own.head_map(3, "decode") == [(2, 1), (0, 0)]
    assert local_profile(make_strategy("kascade", range(4), free), 1, 4) is None


def test_heads_that_were_not_measured_are_pooled():
    card = ModelCard(name="m", layers=LAYERS, query_heads=8, kv_heads=4, head_dim=16)
    unmeasured = Profile.build(model=card, anchors=[0, 3], profiled_layers=range(LAYERS), head_maps=None)
    assert shared("kascade", unmeasured).gathers == (0, 3)
    pooled = Profile.build(model=card, anchors=[0, 3], profiled_layers=range(LAYERS), head_maps="pooled")
    assert shared("kascade", pooled).gathers == (0, 3)
    assert shared("kascade", pooled).describe().startswith("scores of layers [0, 3] gathered from")
