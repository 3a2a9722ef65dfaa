"""What a pass keeps, and for how long; a strategy that cannot change; the registry; paged caches."""

import gc
import weakref

import pytest
import torch

from kascade_cli import attach
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.kernels import get_backend
from kascade_cli.kernels.reference import gather_pages
from kascade_cli.models import describe
from kascade_cli.schema import Budget, ModelCard, Profile
from kascade_cli.sparse import Batch, Keys, Layer, Lengths, Strategy, known_strategies, make_strategy
from kascade_cli.sparse.strategies.dense import Dense
from tests.integrations.transformers.naive import some_profile
from tests.integrations.transformers.test_attach import ids_of, run

LAYERS, HEADS, GROUPS, SIZE = 8, 4, 2, 16
BUDGET = Budget(ratio=0.2, min_keys=3, tile=8)
ANCHORS = [0, 2, 3, 6]


def profile():
    card = ModelCard(
        name="m",
        fingerprint="sha256:" + "0" * 64,
        layers=LAYERS,
        query_heads=HEADS,
        kv_heads=GROUPS,
        head_dim=SIZE,
    )
    # Layer 4 reads anchors 2 and 3 (free assignment), layer 7 anchor 0.
    maps = {layer: [1, 0] for layer in range(LAYERS) if layer not in ANCHORS}
    maps[4], maps[7] = [(2, 1), (3, 0)], [(0, 1), (6, 1)]
    maps = {layer: {"decode": heads, "prefill": heads} for layer, heads in maps.items()}
    return Profile.build(
        model=card, anchors=ANCHORS, profiled_layers=list(range(LAYERS)), head_maps=maps, budget=BUDGET
    )


def layers_of(slots, queries, rows=2, dtype=torch.float64):
    """Per layer (query, key, value)."""
    random = torch.Generator().manual_seed(slots)
    return [
        tuple(
            torch.randn(rows, heads, length, SIZE, generator=random, dtype=dtype)
            for heads, length in ((HEADS, queries), (GROUPS, slots), (GROUPS, slots))
        )
        for _ in range(LAYERS)
    ]


def batch_of(slots, queries, **more):
    lengths = Lengths(
        *(torch.tensor(x, dtype=torch.int32) for x in ([slots - queries] * 2, [0, 9], [slots, slots - 9]))
    )
    return Batch(lengths, "decode" if queries == 1 else "prefill", queries, slots, BUDGET, **more)


def outputs(strategy, batch, tensors, each=lambda layer, state: None):
    state = strategy.start(batch, strategy.memory())
    outs = []
    for index, (query, key, value) in enumerate(tensors):
        outs.append(strategy.run(Layer(index, query, key, value, SIZE**-0.5, state, get_backend("torch", "cpu"))))
        each(index, state)
    strategy.end(state)
    return outs, state


# -- key sets go after their last reader --
@pytest.mark.parametrize("queries", [1, 40])
def test_key_sets_go_after_their_last_reader(queries):
    """Of anchors 0, 2, 3 and 6: layer 7 is the last to read 0 and 6, layer 4 reads 2, layers 4 and 5 read 3."""
    live = {}

    def look(layer, state):
        live[layer] = sorted(state.keys)

    outputs(make_strategy("kascade", range(LAYERS), profile()), batch_of(61, queries), layers_of(61, queries), look)
    assert live == {0: [0], 1: [0], 2: [0, 2], 3: [0, 2, 3], 4: [0, 3], 5: [0], 6: [0, 6], 7: []}


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("name", [n for n in known_strategies() if n != "streaming-llm"])
def test_no_more_key_sets_are_alive_than_will_be_read(name, queries, monkeypatch):
    """Counted by weak references, whoever holds them; the oracles keep none."""
    made = []
    plain = Keys.__init__

    def noted(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        made.append(weakref.ref(self.indices))

    monkeypatch.setattr(Keys, "__init__", noted)
    options = {"omnikv": {"filter_layers": "1+3"}, "lessismore": {"selection_layers": "1+3"}}.get(name, {})
    strategy = make_strategy(name, range(LAYERS), profile(), **options)
    counts = {}

    def look(layer, state):
        counts[layer] = len({id(ref()) for ref in made if ref() is not None})

    _, state = outputs(strategy, batch_of(61, queries), layers_of(61, queries), look)
    assert not state.keys
    assert counts[LAYERS - 1] == 0
    if name in ("oracle", "oracle-per-query", "quest", "dense"):
        assert set(counts.values()) == {0}
    elif name in ("omnikv", "lessismore"):
        assert set(counts.values()) == ({0} if queries > 1 else {0, 1})
    elif name == "kascade-decode-only" and queries > 1:
        assert set(counts.values()) == {0}
    elif name != "kascade-refresh":
        assert 1 <= max(counts.values()) <= 3


def test_a_pass_that_fails_leaves_nothing(make_tiny_model, monkeypatch):
    model = make_tiny_model("llama")
    made, real = [], Keys.__init__

    def noted(self, *args, **kwargs):
        real(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Keys, "__init__", noted)
    with attach(model, some_profile(describe(model))) as attachment:
        want = run(model, ids_of(70), [(0, 70)])
        made.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Layer, "attend", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(model, ids_of(70), [(0, 70)])
        gc.collect()
        assert made
        assert not [ref for ref in made if ref() is not None]
        assert attachment._thread.state is None
        assert torch.equal(run(model, ids_of(70), [(0, 70)]), want)


def test_a_layer_never_reads_a_pass_that_is_not_its_own():
    strategy = make_strategy("kascade", range(LAYERS), profile())
    batch, tensors = batch_of(61, 1), layers_of(61, 1)
    outputs(strategy, batch, tensors)
    state = strategy.start(batch)
    with pytest.raises(KascadeError, match="layer 1 reuses layer 0, which has not run in this forward pass"):
        strategy.run(Layer(1, *tensors[1], 0.25, state, get_backend("torch", "cpu")))


# -- a strategy does not change --
@pytest.mark.parametrize("name", known_strategies())
def test_a_strategy_cannot_be_changed(name):
    strategy = make_strategy(name, range(LAYERS), profile())
    for attribute in ("layers", "profile", "anything", *strategy.options):
        with pytest.raises(AttributeError, match="does not change"):
            setattr(strategy, attribute, 1)
    before = {k: v for k, v in vars(strategy).items() if k != "_derived"}
    for queries in (40, 1):
        outputs(strategy, batch_of(61, queries), layers_of(61, queries))
    assert {k: v for k, v in vars(strategy).items() if k != "_derived"} == before
    assert isinstance(strategy.layers, tuple)


def test_two_strategies_of_one_name_are_refused():
    with pytest.raises(KascadeError, match="two strategies are called 'dense'"):
        type("Mine", (Strategy,), {"name": "dense", "summary": "mine"})
    assert known_strategies()["dense"] is Dense


def test_options_are_checked():
    with pytest.raises(UsageError, match="quest has no option 'ratios': it has page, dense_layers"):
        make_strategy("quest", [0], None, ratios=1)
    with pytest.raises(UsageError, match="dense has no option 'page': it has none"):
        make_strategy("dense", [0], None, page=1)
    with pytest.raises(UsageError, match="strategy 'kwest' is not known"):
        make_strategy("kwest", [0], None)
    with pytest.raises(UsageError, match="needs a profile"):
        make_strategy("kascade", [0], None)


def test_a_strategy_that_does_not_attend_says_so():
    class Silent(Strategy):
        summary = "nothing"

    Silent.name = "silent"
    state_of = Silent([0]).start(batch_of(20, 1))
    with pytest.raises(KascadeError, match="write `attend`"):
        Silent([0]).run(Layer(0, *layers_of(20, 1)[0], 0.25, state_of, get_backend("torch", "cpu")))


# -- paged caches --
def paged(cache, page, table):
    """[B, G, S, D] -> pages [P, page, G, D] that `table` [B, MP] puts in order; NaN in pages of nobody."""
    pages = torch.full((int(table.max()) + 2, page, *cache.shape[1::2]), torch.nan, dtype=cache.dtype)
    for row, entries in enumerate(table.tolist()):
        for place, number in enumerate(entries):
            pages[number] = cache[row, :, place * page : (place + 1) * page].transpose(0, 1)
    return pages


PAGED = [
    "dense",
    "kascade",
    "kascade-pooled",
    "streaming-llm",
    "quest",
    "omnikv",
    "lessismore",
    "oracle",
    "oracle-per-query",
]


@pytest.mark.parametrize("name", PAGED)
def test_a_decode_step_over_pages_equals_one_over_slots(name):
    page, slots = 12, 72
    table = torch.randperm(14, generator=torch.Generator().manual_seed(1))[:12].view(2, 6).int()
    options = {"omnikv": {"filter_layers": "1+3"}, "lessismore": {"selection_layers": "1+3"}}.get(name, {})
    strategy = make_strategy(name, range(LAYERS), profile(), **options)
    lengths = Lengths(*(torch.tensor(x, dtype=torch.int32) for x in ([70, 52], [0, 9], [71, 44])))
    tensors = layers_of(slots, 1)
    pages = [(query, paged(key, page, table), paged(value, page, table)) for query, key, value in tensors]
    assert torch.equal(gather_pages(pages[0][1], table), tensors[0][1])
    want, plain = outputs(strategy, Batch(lengths, "decode", 1, slots, BUDGET), tensors)
    got, state = outputs(strategy, Batch(lengths, "decode", 1, slots, BUDGET, pages=table), pages)
    for one, other in zip(got, want, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other)
    assert torch.equal(state.totals(), plain.totals())
    dense, _ = outputs(
        make_strategy("dense", range(LAYERS), None), Batch(lengths, "decode", 1, slots, BUDGET), tensors
    )
    assert name == "dense" or (got[-1] - dense[-1]).abs().max() > 1e-3
