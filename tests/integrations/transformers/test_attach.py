"""The attached model against the naive oracle, in float64: padding, chunks, caches, strategies, architectures."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kascade_cli import attach
from kascade_cli.benchmarking.roles import Bench, role_strategy
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.kernels import get_backend
from kascade_cli.models import describe
from kascade_cli.schema import Budget
from kascade_cli.sparse import Batch, Layer, Lengths, known_strategies

from .naive import NAIVE, Naive, some_profile

STRATEGIES = [name for name in known_strategies() if name in NAIVE]
LENGTHS = [1, 31, 32, 33, 127, 129]


def ids_of(length, seed=0):
    return torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(model, ids, segments, cache=None):
    """Logits of the attached model, segment after segment through a cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    outs = []
    with torch.no_grad():
        for start, end in segments:
            outs.append(model(torch.tensor([ids[start:end]]), past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(outs)


@pytest.fixture(scope="module")
def llama(make_tiny_model):
    model = make_tiny_model("llama")
    return model, some_profile(describe(model))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_then_decode(llama, strategy, length):
    model, profile = llama
    ids = ids_of(length + 3)
    segments = [(0, length), *[(i, i + 1) for i in range(length, length + 3)]]
    naive = Naive(model, profile, strategy, segments, 0.2, 4)
    want = naive.logits(ids)
    with attach(model, profile, strategy=strategy) as attachment:
        got = run(model, ids, segments)
    torch.testing.assert_close(got, want)
    assert attachment.report()["keys_read"] == pytest.approx(naive.read)
    assert attachment.report()["keys_visible"] == pytest.approx(naive.visible)


def test_a_reused_norm_changes_what_later_anchors_choose(llama):
    model, _ = llama
    ids = ids_of(200, seed=11)
    profile = some_profile(describe(model), anchors=[0, 1, 2], ratio=0.05)
    want = Naive(model, profile, "kascade-reused-norm", [(0, 199), (199, 200)], 0.05, 4).logits(ids)
    got = {}
    for strategy in ("kascade", "kascade-reused-norm"):
        with attach(model, profile, strategy=strategy):
            got[strategy] = run(model, ids, [(0, 199), (199, 200)])
    torch.testing.assert_close(got["kascade-reused-norm"], want)
    assert (got["kascade"] - want).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "phi3", "gemma3"])
@pytest.mark.parametrize("pairs", [False, True])
def test_architectures_and_free_assignment(make_tiny_model, kind, pairs):
    model = make_tiny_model(kind, layers=6)
    info = describe(model)
    profile = some_profile(info, pairs=pairs)
    ids = ids_of(90, seed=1)
    segments = [(0, 88), (88, 89), (89, 90)]
    want = Naive(model, profile, "kascade", segments, 0.2, 4).logits(ids)
    with attach(model, profile) as attachment:
        got = run(model, ids, segments)
    torch.testing.assert_close(got, want)
    assert attachment.report()["roles"].get("passthrough", []) == [
        i for i in range(6) if i not in info.profiled_layers
    ]
    dense = run(model, ids, [(0, 90)])
    assert (got - dense).abs().max() > 1e-4  # the sparse run really was sparse


PADDED = ["kascade", "kascade-pooled", "kascade-reused-norm", "streaming-llm", "oracle", "dense"]


@pytest.mark.parametrize("strategy", PADDED)
def test_left_padded_batch_equals_each_row_alone(llama, strategy):
    model, profile = llama
    rows = [ids_of(length, seed=length) for length in (97, 33, 1, 64)]
    steps, longest = 2, 97
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    extra = torch.tensor([ids_of(steps, seed=100 + i) for i in range(len(rows))])
    with attach(model, profile, strategy=strategy), torch.no_grad():
        cache = DynamicCache(config=model.config)
        position = (mask.cumsum(1) - 1).clamp_min(0)
        outs = [model(padded, attention_mask=mask, position_ids=position, past_key_values=cache).logits]
        for i in range(steps):
            mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
            position = mask.sum(1, keepdim=True) - 1
            step = model(extra[:, i : i + 1], attention_mask=mask, position_ids=position, past_key_values=cache)
            outs.append(step.logits)
        got = torch.cat(outs, 1)
        for i, row in enumerate(rows):
            whole = row + extra[i].tolist()
            segments = [(0, len(row)), *[(len(row) + s, len(row) + s + 1) for s in range(steps)]]
            torch.testing.assert_close(got[i, longest - len(row) :], run(model, whole, segments))


def test_right_padding_does_not_change_the_row(llama):
    model, profile = llama
    row = ids_of(70)
    padded, mask = torch.tensor([row + [0] * 30]), torch.tensor([[1] * 70 + [0] * 30])
    with attach(model, profile), torch.no_grad():
        got = model(padded, attention_mask=mask, use_cache=False).logits[0, :70]
        torch.testing.assert_close(got, run(model, row, [(0, 70)]))


@pytest.mark.parametrize("strategy", ["kascade", "kascade-reused-norm"])
@pytest.mark.parametrize("cuts", [[32, 64], [96], [64, 65, 97], [10, 50, 90], [1, 2, 3, 120]])
def test_chunked_prefill(llama, cuts, strategy):
    model, profile = llama
    ids = ids_of(130, seed=5)
    edges = [0, *cuts, 130]
    segments = list(zip(edges, edges[1:], strict=False))
    want = Naive(model, profile, strategy, segments, 0.2, 4).logits(ids)
    with attach(model, profile, strategy=strategy):
        got = run(model, ids, segments)
        torch.testing.assert_close(got, want)
        if all(cut % 32 == 0 for cut in cuts):
            torch.testing.assert_close(got, run(model, ids, [(0, 130)]))


@pytest.mark.parametrize("strategy", ["kascade", "dense", "streaming-llm"])
def test_static_cache_equals_dynamic(llama, strategy):
    model, profile = llama
    ids = ids_of(75, seed=6)
    segments = [(0, 40), (40, 72), (72, 73), (73, 74), (74, 75)]
    with attach(model, profile, strategy=strategy):
        want = run(model, ids, segments)
        got = run(model, ids, segments, StaticCache(config=model.config, max_cache_len=101))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_on_a_padded_batch(llama, cache):
    model, profile = llama
    rows = [ids_of(60, seed=7), ids_of(41, seed=8)]
    padded = torch.tensor([rows[0], [0] * 19 + rows[1]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    if cache == "dynamic":
        options.pop("cache_implementation")
    with attach(model, profile) as attachment:
        both = model.generate(padded, attention_mask=(padded != 0).long(), **options)
        for i, row in enumerate(rows):
            alone = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **options)
            assert both[i, -6:].tolist() == alone[0, -6:].tolist()
        assert attachment.density < 0.9


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("option", [{"ratio": 1.0}, {"min_keys": 1000}])
def test_all_keys_equals_dense(llama, strategy, option):
    model, profile = llama
    ids = ids_of(101, seed=9)
    segments = [(0, 100), (100, 101)]
    want = run(model, ids, segments)
    with attach(model, profile, strategy=strategy, **option) as attachment:
        torch.testing.assert_close(run(model, ids, segments), want)
    assert attachment.density == 1.0


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_inference_mode_and_no_grad_mix(llama, first):
    model, profile = llama
    ids = torch.tensor([ids_of(80)])
    second = torch.no_grad if first is torch.inference_mode else torch.inference_mode
    with attach(model, profile) as attachment:
        with first():
            one = model(ids, use_cache=False).logits
        with second():
            two = model(ids, use_cache=False).logits
        assert torch.equal(one, two)
        assert attachment.report()["keys_visible"] == 2 * 4 * 80 * 81 / 2


def test_without_profile(llama):
    model, _ = llama
    for strategy in ("dense", "oracle", "streaming-llm"):
        attach(model, strategy=strategy).detach()
    with pytest.raises(UsageError, match="needs a profile"):
        attach(model)


def test_leaving_restores_the_model(llama):
    model, profile = llama
    ids = ids_of(80)
    before = run(model, ids, [(0, 80)])
    compile_before = model.generation_config.disable_compile
    with attach(model, profile):
        assert (run(model, ids, [(0, 80)]) - before).abs().max() > 1e-4
        with pytest.raises(KascadeError, match="attached to this model already"):
            attach(model, profile)
    assert torch.equal(run(model, ids, [(0, 80)]), before)
    assert model.generation_config.disable_compile == compile_before
    assert model.config._attn_implementation == "sdpa"


def test_two_models_at_once(make_tiny_model):
    one, two = make_tiny_model("llama", seed=1), make_tiny_model("qwen3", seed=2)
    ids = ids_of(70)
    alone = []
    for model in (one, two):
        with attach(model, some_profile(describe(model))):
            alone.append(run(model, ids, [(0, 70)]))
    with attach(one, some_profile(describe(one))), attach(two, some_profile(describe(two))):
        torch.testing.assert_close(run(one, ids, [(0, 70)]), alone[0])
        torch.testing.assert_close(run(two, ids, [(0, 70)]), alone[1])


def test_refusals(llama, make_tiny_model):
    model, profile = llama
    other = make_tiny_model("llama", seed=3)
    with pytest.raises(KascadeError, match="whose weights or configuration are not those.*profile this model"):
        attach(other, profile)
    attach(other, profile, allow_other_weights=True).detach()
    with pytest.raises(KascadeError, match="query heads"):
        attach(make_tiny_model("llama", heads=8), profile, allow_other_weights=True)
    for ratio in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="outside"):
            attach(model, profile, ratio=ratio)
    with pytest.raises(UsageError, match="not known"):
        attach(model, profile, strategy="magic")
    with pytest.raises(KascadeError, match="backend"):
        attach(model, profile, backend="magic")
    assert model.config._attn_implementation == "sdpa"


def test_dense_in_disguise_is_an_error(llama):
    model, profile = llama
    attachment = attach(model, profile)
    model.set_attn_implementation("sdpa")
    run(model, ids_of(40), [(0, 40)])
    with pytest.raises(KascadeError, match="none of its attention went through kascade"):
        attachment.report()
    attachment.detach()


def test_masks_that_are_not_causal_are_refused(llama):
    model, profile = llama
    ids = torch.tensor([ids_of(12)])
    with attach(model, profile), torch.no_grad():
        with pytest.raises(KascadeError, match="custom mask"):
            model(ids, attention_mask=torch.ones(1, 1, 12, 12, dtype=torch.bool))
        with pytest.raises(KascadeError, match="padding between tokens"):
            model(ids, attention_mask=torch.tensor([[1, 1, 0, 1] + [1] * 8]))
        packed = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])
        with pytest.raises(KascadeError, match="custom mask"):
            model(ids, position_ids=packed, use_cache=False)
        model.train()
        try:
            with pytest.raises(KascadeError, match="inference only"):
                model(ids)
        finally:
            model.eval()


@pytest.mark.parametrize("queries", [1, 50])
def test_slots_of_no_row_may_hold_nan(queries):
    """Left- and right-padded rows, every layer role: the same as with zeros there."""
    backend, budget = get_backend("torch", "cpu"), Budget(ratio=0.2, min_keys=4, tile=8)
    strategy = role_strategy(2, 16, Bench(backend, torch.device("cpu"), torch.float32, budget))
    slots, starts, lengths = 70, torch.tensor([0, 13, 20]), torch.tensor([70, 50, 31])
    q = torch.randn(3, 4, queries, 16, generator=torch.Generator().manual_seed(1))
    k, v = torch.randn(2, 3, 2, slots, 16, generator=torch.Generator().manual_seed(2))
    last = starts + lengths
    rows = Lengths((last - queries).int(), starts.int(), lengths.int())
    outside = ~((torch.arange(slots) >= starts[:, None]) & (torch.arange(slots) < last[:, None]))[:, None, :, None]
    outs = []
    for rest in (0.0, float("nan")):
        keys, values = k.masked_fill(outside, rest), v.masked_fill(outside, rest)
        state = strategy.start(Batch(rows, "decode" if queries == 1 else "prefill", queries, slots, budget))
        outs.append([strategy.run(Layer(layer, q, keys, values, 0.25, state, backend)) for layer in range(3)])
    for zero, nan in zip(*outs, strict=True):
        assert torch.isfinite(nan).all()
        torch.testing.assert_close(nan, zero)
