"""kascade-refresh against the naive oracle, and what must not be read: keys of another sequence, batch or cache."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from kascade_cli import attach
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.kernels import reference
from kascade_cli.kernels.backend import register_backend
from kascade_cli.models import describe
from kascade_cli.sparse.strategies.refresh import Refresh

from .naive import Naive, some_profile
from .test_attach import ids_of, run

STRATEGY = "kascade-refresh"


@pytest.fixture(scope="module")
def llama(make_tiny_model):
    model = make_tiny_model("llama")
    return model, some_profile(describe(model))


def steps_after(length, steps):
    return [(0, length), *[(i, i + 1) for i in range(length, length + steps)]]


def with_refresh(model, profile, every, **options):
    return attach(model, profile, strategy=STRATEGY, refresh=every, **options)


@pytest.mark.parametrize("every", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [2, 33, 95])
def test_against_the_oracle(llama, every, length):
    model, profile = llama
    ids, segments = ids_of(length + 13, seed=length), steps_after(length, 13)
    naive = Naive(model, profile, STRATEGY, segments, 0.2, 4, refresh=every)
    want = naive.logits(ids)
    with with_refresh(model, profile, every) as attachment:
        torch.testing.assert_close(run(model, ids, segments), want)
        report = attachment.report()
    assert report["keys_read"] == pytest.approx(naive.read)
    refreshes = -(-13 // every)
    assert report["refresh"] == {"every": every, "refreshes": refreshes, "between": 13 - refreshes}


@pytest.mark.parametrize("cuts", [[60, 61, 62, 63, 70, 71, 72], [1, 2, 3, 40]])
def test_a_prefill_chunk_between_steps_refreshes(llama, cuts):
    model, profile = llama
    ids, edges = ids_of(80, seed=2), [0, *cuts, 80]
    segments = list(zip(edges, edges[1:], strict=False))
    want = Naive(model, profile, STRATEGY, segments, 0.2, 4, refresh=4).logits(ids)
    with with_refresh(model, profile, 4):
        torch.testing.assert_close(run(model, ids, segments), want)


def test_refresh_1_is_kascade_to_the_bit(llama):
    model, profile = llama
    ids, segments = ids_of(70, seed=3), steps_after(60, 10)
    with attach(model, profile):
        want = run(model, ids, segments)
    with with_refresh(model, profile, 1):
        assert torch.equal(run(model, ids, segments), want)
    with with_refresh(model, profile, 4):
        assert (run(model, ids, segments) - want).abs().max() > 1e-4  # or the test says nothing


@pytest.mark.parametrize("kind", ["qwen3", "phi3", "gemma3"])
@pytest.mark.parametrize("pairs", [False, True])
def test_architectures_and_several_anchors(make_tiny_model, kind, pairs):
    model = make_tiny_model(kind, layers=6)
    info = describe(model)
    anchors = info.profiled_layers[:2] if pairs else None
    profile = some_profile(info, anchors=anchors, pairs=pairs)
    ids, segments = ids_of(90, seed=1), steps_after(80, 10)
    want = Naive(model, profile, STRATEGY, segments, 0.2, 4, refresh=4).logits(ids)
    with with_refresh(model, profile, 4) as attachment:
        torch.testing.assert_close(run(model, ids, segments), want)
        assert attachment.report()["refresh"]["between"] == 7


def test_pooled_sets(llama):
    """One set for all heads, as kascade-pooled chooses it."""
    model, profile = llama
    ids, segments = ids_of(80, seed=4), steps_after(70, 10)

    class Pooled(Naive):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.refresh = 4

    want = Pooled(model, profile, "kascade-pooled", segments, 0.2, 4).logits(ids)

    class PooledRefresh(Refresh):
        name, summary, pooled = "test-pooled-refresh", "both at once", True

        def sources(self, layer, phase):
            return [(self.profile.layers[layer].anchor, 0) for _ in self.profile.head_map(layer, phase)]

    attachment = attach(model, profile, strategy="test-pooled-refresh", refresh=4)
    with attachment:
        torch.testing.assert_close(run(model, ids, segments), want)
        assert attachment.memory.indices[0].shape[1] == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_static_cache(llama, mode):
    model, profile = llama
    ids, segments = ids_of(75, seed=6), steps_after(62, 13)
    want = Naive(model, profile, STRATEGY, segments, 0.2, 4, refresh=4).logits(ids)
    with with_refresh(model, profile, 4) as attachment, mode():
        got = run(model, ids, segments, StaticCache(config=model.config, max_cache_len=101))
        assert attachment.report()["refresh"]["between"] == 9
    torch.testing.assert_close(got, want)


def test_generate_equals_the_oracle(llama):
    """Greedy text, step by step, with both caches; a second prompt does not see the keys of the first."""
    model, profile = llama
    options = {"max_new_tokens": 21, "min_new_tokens": 21, "do_sample": False, "output_logits": True}
    with with_refresh(model, profile, 5) as attachment:
        for cache in (None, "static"):
            for length in (60, 59, 60):
                prompt = torch.tensor([ids_of(length, seed=length)])
                with_cache = options | ({"cache_implementation": cache} if cache else {})
                found = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), return_dict_in_generate=True, **with_cache
                )
                ids = found.sequences[0].tolist()
                want = Naive(model, profile, STRATEGY, steps_after(length, 20), 0.2, 4, refresh=5).logits(ids[:-1])
                model.set_attn_implementation("kascade")
                torch.testing.assert_close(torch.cat(found.logits), want[length - 1 :].to(found.logits[0].dtype))
        assert attachment.report()["refresh"] == {"every": 5, "refreshes": 24, "between": 96}


def test_left_padded_batch_equals_each_row_alone(llama):
    model, profile = llama
    rows = [ids_of(length, seed=length) for length in (97, 33, 1, 64)]
    steps, longest = 9, 97
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    extra = torch.tensor([ids_of(steps, seed=100 + i) for i in range(len(rows))])
    with with_refresh(model, profile, 4) as attachment, torch.no_grad():
        cache = DynamicCache(config=model.config)
        position = (mask.cumsum(1) - 1).clamp_min(0)
        model(padded, attention_mask=mask, position_ids=position, past_key_values=cache)
        outs = []
        for i in range(steps):
            mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
            position = mask.sum(1, keepdim=True) - 1
            step = model(extra[:, i : i + 1], attention_mask=mask, position_ids=position, past_key_values=cache)
            outs.append(step.logits)
            _check_invariants(attachment.memory, mask, i % 4)
        assert attachment.report()["refresh"] == {"every": 4, "refreshes": 3, "between": 6}
    got = torch.cat(outs, 1)
    for i, row in enumerate(rows):
        if len(row) == 1:
            continue  # alone, a prompt of one token is a decode step itself
        segments = steps_after(len(row), steps)
        want = Naive(model, profile, STRATEGY, segments, 0.2, 4, refresh=4).logits(row + extra[i].tolist())
        torch.testing.assert_close(got[i], want[len(row) :])


def _check_invariants(refresh, mask, age):
    """Used entries: distinct real slots, the newest `age` in place; -1 in the rest; counts as the budget says."""
    visible = mask.sum(1)
    assert {sets.storage_offset() % 32 for sets in refresh.indices.values()} == {0}
    for sets in refresh.indices.values():
        assert sets.dtype == torch.int32
        assert sets.is_contiguous()
        for b, row in enumerate(sets):
            count = int(refresh.counts[b])
            before = int(visible[b]) - age
            assert count == min(before, max(4, -(-before * 2 // 10))) + age
            for one in row.tolist():
                used = one[:count]
                assert one[count:] == [-1] * (len(one) - count)
                assert len(set(used)) == count
                assert all(mask[b, slot] for slot in used)
                assert used[count - age :] == list(range(mask.shape[1] - age, mask.shape[1]))


def _decode(model, cache, tokens):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([[t]]), past_key_values=cache).logits[0] for t in tokens])


def _prefilled(model, ids, cache=None):
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache)
    return cache


def test_a_new_sequence_of_one_token_refreshes(llama):
    """It has no prefill, and lengths that could be those of a next step."""
    model, profile = llama
    with attach(model, profile):
        want = _decode(model, DynamicCache(config=model.config), [5, 6, 7])
    with with_refresh(model, profile, 8) as attachment:
        _decode(model, DynamicCache(config=model.config), [8])
        got = _decode(model, DynamicCache(config=model.config), [5])
        assert attachment.report()["refresh"]["between"] == 0
        with torch.no_grad():
            model(torch.tensor([[5]]), use_cache=False)
            model(torch.tensor([[5]]), use_cache=False)
        assert attachment.report()["refresh"]["between"] == 0
    torch.testing.assert_close(got, want[:1])


@pytest.mark.parametrize("static", [False, True])
def test_another_cache_that_is_one_token_longer(llama, static):
    model, profile = llama

    def cache():
        return StaticCache(config=model.config, max_cache_len=90) if static else DynamicCache(config=model.config)

    with attach(model, profile, strategy="dense"):
        one, two = _prefilled(model, ids_of(60, seed=1), cache()), _prefilled(model, ids_of(61, seed=2), cache())
    with attach(model, profile):
        want = _decode(model, _prefilled_like(model, profile, cache()), [9])
    with with_refresh(model, profile, 8) as attachment:
        _decode(model, one, [5])
        got = _decode(model, two, [9])
        assert attachment.report()["refresh"] == {"every": 8, "refreshes": 2, "between": 0}
        _decode(model, two, [9])
        assert attachment.report()["refresh"]["between"] == 1
    torch.testing.assert_close(got, want)


def _prefilled_like(model, profile, cache):
    """The second cache of the test above, once more: its own attachment must not prefill sparsely."""
    model.set_attn_implementation("sdpa")
    try:
        return _prefilled(model, ids_of(61, seed=2), cache)
    finally:
        model.set_attn_implementation("kascade")


def _crop(cache):
    cache.crop(-1)


def _swap(cache):
    cache.reorder_cache(torch.tensor([1, 0]))


def _select(cache):
    cache.batch_select_indices(torch.tensor([0]))


def _overwrite(cache):
    for layer in cache.layers:
        layer.keys[:] = layer.keys.flip(0)
        layer.values[:] = layer.values.flip(0)


def _rewind(cache):
    for layer in cache.layers:
        layer.cumulative_length.sub_(1)


@pytest.mark.parametrize(
    ("change", "static"),
    [(_crop, False), (_swap, False), (_swap, True), (_select, False), (_overwrite, False), (_overwrite, True),
     (_rewind, True)],
)  # fmt: skip
def test_a_cache_that_was_changed_refreshes(llama, change, static):
    """The step after the change equals kascade's; without a change it would have read the kept keys."""
    model, profile = llama
    ids = torch.tensor([ids_of(60, seed=1), ids_of(60, seed=2)])

    def second(changed):
        cache = StaticCache(config=model.config, max_cache_len=90) if static else DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            model(torch.tensor([[5], [6]]), past_key_values=cache)
            if changed:
                change(cache)
            rows = 1 if changed and change is _select else 2
            return model(torch.tensor([[7], [8]])[:rows], past_key_values=cache).logits

    with attach(model, profile):
        want = second(True)
    with with_refresh(model, profile, 8) as attachment:
        torch.testing.assert_close(second(True), want)
        assert attachment.report()["refresh"] == {"every": 8, "refreshes": 2, "between": 0}
        second(False)
        assert attachment.report()["refresh"]["between"] == 1


class _Copies(DynamicLayer):
    """As quantised and offloaded caches do: what attention sees is not what the layer holds, so that a change of the
    one need not show in the other."""

    def update(self, *args, **options):
        return tuple(tensor.clone() for tensor in super().update(*args, **options))


def test_a_cache_that_hands_out_copies_refreshes(llama):
    model, profile = llama
    with with_refresh(model, profile, 8) as attachment:
        cache = DynamicCache(config=model.config)
        cache.layers = [_Copies() for _ in cache.layers]
        _decode(model, _prefilled(model, ids_of(60), cache), [5, 6, 7])
        assert attachment.report()["refresh"] == {"every": 8, "refreshes": 3, "between": 0}


def test_beam_search_is_kascade(llama):
    model, profile = llama
    prompt = torch.tensor([ids_of(60, seed=7)])
    options = {"attention_mask": torch.ones_like(prompt), "num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    with attach(model, profile):
        want = model.generate(prompt, **options)
    with with_refresh(model, profile, 8) as attachment:
        assert torch.equal(model.generate(prompt, **options), want)
        assert attachment.report()["refresh"]["between"] == 0


@pytest.mark.parametrize("kind", ["refresh", "between"])
def test_a_pass_that_fails_leaves_nothing_to_read(llama, monkeypatch, kind):
    model, profile = llama
    with with_refresh(model, profile, 8) as attachment:
        cache = _prefilled(model, ids_of(60))
        if kind == "between":
            _decode(model, cache, [5])
        calls = iter([attachment.backend.decode_sparse] * 2)
        with monkeypatch.context() as patch:
            patch.setattr(attachment.backend, "decode_sparse", lambda *a, **b: next(calls)(*a, **b))
            with pytest.raises(StopIteration):
                _decode(model, cache, [6])  # the last layer does not get through
        with pytest.raises(KascadeError, match="run a refresh"), attachment.memory.only("between"):
            _decode(model, cache, [7])


def test_steps_of_a_forced_kind(llama):
    """What capturing a graph of each kind needs: the caller says which one a step is."""
    model, profile = llama
    ids = ids_of(68, seed=9)
    segments = steps_after(62, 6)
    want = Naive(model, profile, STRATEGY, segments, 0.2, 4, refresh=4).logits(ids)[62:]
    with with_refresh(model, profile, 4) as attachment:
        cache = _prefilled(model, ids[:62], StaticCache(config=model.config, max_cache_len=80))
        places, got = set(), []
        with (
            pytest.raises(KascadeError, match="run a refresh of this batch first"),
            attachment.memory.only("between"),
        ):
            _decode(model, cache, ids[62:63])
        cache = _prefilled(model, ids[:62], StaticCache(config=model.config, max_cache_len=80))
        for i, token in enumerate(ids[62:]):
            with attachment.memory.only("between" if i % 4 else "refresh"):
                got.append(_decode(model, cache, [token]))
            places.add(attachment.memory.indices[0].data_ptr())
        assert len(places) == 1  # graphs write where others read
        torch.testing.assert_close(torch.cat(got), want)
        before = attachment.report()["refresh"]
        assert before["between"] == 4
        _decode(model, cache, [3])  # nothing is known of what a graph did: refresh
        assert attachment.report()["refresh"]["refreshes"] == before["refreshes"] + 1
    with pytest.raises(UsageError, match="not 'never'"), attachment.memory.only("never"):
        pass


class _HostReads(TorchDispatchMode):
    """Ops that wait for a value from the device, or whose shape depends on one."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().split("::")[1].split(".")[0]
        if name in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique"):
            self.found.append(name)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["refresh", "between"])
def test_no_step_waits_for_the_device(llama, monkeypatch, kind):
    """On the path of fast backends. The reference's Top-k does, so another stands in for it."""
    model, profile = llama

    def topk(scores, count, start, length, *, max_count):
        return scores.topk(max_count, -1).indices.int()

    register_backend("mirror", reference)
    monkeypatch.setattr(reference.decode, "may_hold_nan", lambda tensor: False)  # looks at values, as kernels cannot
    with with_refresh(model, profile, 4, backend="mirror") as attachment, torch.no_grad():
        cache = _prefilled(model, ids_of(62), StaticCache(config=model.config, max_cache_len=80))
        monkeypatch.setattr(attachment.backend, "select_topk", topk)
        if kind == "between":
            _decode(model, cache, [5])
        token = torch.tensor([[6]])
        with _HostReads() as reads:
            model(token, past_key_values=cache)
        assert reads.found == []
        with reads:
            float(token)
        assert reads.found == ["_local_scalar_dense"]
        assert attachment.report()["refresh"]["between"] == (kind == "between")


@pytest.mark.parametrize("mistake", ["rewound", "too many", "other padding", "shifted"])
def test_forced_steps_that_do_not_follow_are_reported(llama, mistake):
    model, profile = llama
    attachment = with_refresh(model, profile, 4)  # 13 keys of 63, room for 16 + 3
    cache = _prefilled(model, ids_of(62), StaticCache(config=model.config, max_cache_len=80))
    with attachment.memory.only("refresh"):
        _decode(model, cache, [5])
    with attachment.memory.only("between"):
        _decode(model, cache, [5, 6, 7])
        attachment.report()
        if mistake == "rewound":
            _rewind(cache)
        if mistake == "too many":
            _decode(model, cache, [8, 9, 10])
            attachment.report()
        if mistake == "shifted":  # as many keys as a next step has, all one slot further on
            for layer in cache.layers:
                layer.cumulative_length.add_(1)
        mask = torch.ones(1, {"too many": 70, "shifted": 68}.get(mistake, 67))
        mask[:, : {"other padding": 2, "shifted": 1}.get(mistake, 0)] = 0
        with torch.no_grad():
            model(torch.tensor([[8]]), past_key_values=cache, attention_mask=mask)
    with pytest.raises(KascadeError, match="did not follow"):
        attachment.report()
    with pytest.raises(KascadeError, match="did not follow"):
        attachment.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"


def test_mistakes(llama):
    model, profile = llama
    for every in (0, -1):
        with pytest.raises(UsageError, match=f"refresh {every} must be 1 or more"):
            attach(model, profile, strategy=STRATEGY, refresh=every)
    for strategy in ("kascade", "dense", "kascade-pooled"):
        with pytest.raises(UsageError, match=f"strategy {strategy} has no option 'refresh'"):
            attach(model, profile, strategy=strategy, refresh=4)
    with pytest.raises(UsageError, match="needs a profile"):
        attach(model, strategy=STRATEGY)
    with attach(model, profile, strategy=STRATEGY) as attachment:
        assert attachment.strategy.refresh == 8
