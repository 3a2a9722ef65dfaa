"""What would be wrong without a word: gradients, threads, NaN, masks, caches of several lengths, compiled models."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from kascade_cli import attach
from kascade_cli.errors import KascadeError
from kascade_cli.evaluation.kl import measure_kl
from kascade_cli.models import describe
from kascade_cli.sparse import known_strategies
from tests.families import LINEAR, Family

from .naive import NAIVE, Naive, some_profile
from .test_attach import ids_of, run
from .test_published import CHOOSE


@pytest.fixture(scope="module")
def llama(make_tiny_model):
    model = make_tiny_model("llama")
    return model, some_profile(describe(model))


def steps(length, count):
    return [(0, length), *[(i, i + 1) for i in range(length, length + count)]]


# -- gradients --
def test_gradients_are_refused(llama):
    model, profile = llama
    ids = torch.tensor([ids_of(40)])
    embedded = model.get_input_embeddings()(ids).detach()
    with attach(model, profile, ratio=1.0):
        with pytest.raises(KascadeError, match="no gradients"):
            model(ids, use_cache=False)  # the parameters require them
        with pytest.raises(KascadeError, match="no gradients"):
            model(inputs_embeds=embedded.clone().requires_grad_(), use_cache=False)
        with torch.no_grad():
            want = model(ids, use_cache=False).logits
        model.requires_grad_(False)
        try:
            got = model(ids, use_cache=False).logits
            with pytest.raises(KascadeError, match="no gradients"):
                model(inputs_embeds=embedded.clone().requires_grad_(), use_cache=False)
        finally:
            model.requires_grad_(True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# -- threads --
@pytest.mark.parametrize("strategy", ["kascade", "kascade-refresh", "streaming-llm", "quest", "omnikv"])
def test_threads_on_one_model(llama, strategy):
    """Many passes of different lengths at once are, to the bit, those of one after the other."""
    model, profile = llama
    tasks = [(ids_of(length + 6, seed=length), steps(length, 6)) for length in (33, 70, 5, 97, 64, 41, 90, 20) * 2]
    with attach(model, profile, strategy=strategy) as attachment:
        want = [run(model, *task) for task in tasks]
        alone = attachment.report()
        attachment.reset()
        before, errors = sys.getswitchinterval(), []
        sys.setswitchinterval(1e-5)
        meet = threading.Barrier(4)

        def work(task):
            if meet.n_waiting < 4 and not meet.broken:
                try:
                    meet.wait(1)
                except threading.BrokenBarrierError as error:
                    errors.append(error)
            return run(model, *task)

        try:
            with ThreadPoolExecutor(4) as pool:
                got = list(pool.map(work, tasks))
        finally:
            sys.setswitchinterval(before)
        together = attachment.report()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    assert together == alone


# -- NaN --
@pytest.mark.parametrize("strategy", known_strategies())
def test_broken_keys_give_nan_logits(make_tiny_model, strategy):
    """A NaN in the weights that make the keys of one layer: in prefill and in decode."""
    model = make_tiny_model("llama")
    profile = some_profile(describe(model))
    ids, segments = ids_of(50, seed=1), steps(47, 3)
    for layer in range(4):
        weight = model.model.layers[layer].self_attn.k_proj.weight
        kept = weight.detach().clone()
        weight.data[3, 5] = torch.nan
        try:
            with attach(model, profile, strategy=strategy, ratio=0.1, allow_other_weights=True):
                got = run(model, ids, segments)
        finally:
            weight.data.copy_(kept)
        assert got[46].isnan().all(), layer
        assert got[47:].isnan().all(), layer


SEES = {  # layers that look at every key before they choose, or are dense
    "dense": range(4), "oracle": range(4), "oracle-per-query": range(4), "quest": range(4), "omnikv": (0, 1, 2),
    "lessismore": (0, 1, 2), "kascade": (0, 2), "kascade-pooled": (0, 2), "kascade-refresh": (0, 2),
}  # fmt: skip


@pytest.mark.parametrize("strategy", SEES)
def test_one_broken_key_is_chosen_by_whoever_sees_it(llama, strategy):
    model, profile = llama
    ids, segments = ids_of(60, seed=2), steps(57, 3)
    for layer in SEES[strategy]:

        def spoil(module, args, output):
            if output.shape[1] > 5:
                output[:, 20, 0] = torch.nan
            return output

        hook = model.model.layers[layer].self_attn.k_proj.register_forward_hook(spoil)
        try:
            with attach(model, profile, strategy=strategy, ratio=0.1, min_keys=16):
                got = run(model, ids, segments)
        finally:
            hook.remove()
        assert got[56:].isnan().all(), layer


@pytest.mark.parametrize("phases", [("decode",), ("prefill",)])
def test_verification_of_a_sparse_run_with_nan_says_infinity(llama, phases):
    model, profile = llama

    def spoil(module, args, output):
        return output * torch.nan if model.config._attn_implementation == "kascade" else output

    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(spoil)
    try:
        found = measure_kl(model, [profile], [ids_of(60)], [[]], phases, decode_tokens=6)[0]
    finally:
        hook.remove()
    assert found.kl == {phases[0]: float("inf")}


# -- masks and caches --
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("left", [0, 13])
def test_a_mask_longer_than_the_tokens(llama, cache, left):
    """What is beyond the keys is not looked at."""
    model, profile = llama
    ids = torch.tensor([[0] * left + ids_of(50, seed=3)])
    mask = torch.tensor([[0] * left + [1] * 50])
    longer = torch.cat([mask, torch.ones(1, 25, dtype=mask.dtype)], 1)
    position = (mask.cumsum(1) - 1).clamp_min(0)

    def forward(mask):
        made = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, 90)
        with torch.no_grad():
            return model(ids, attention_mask=mask, position_ids=position, past_key_values=made).logits[0, left:]

    with attach(model, profile) as attachment:
        torch.testing.assert_close(forward(longer), forward(mask))
        torch.testing.assert_close(forward(longer), run(model, ids[0, left:].tolist(), [(0, 50)]))
        assert attachment.report()["keys_visible"] == 4 * 4 * 50 * 51 / 2
        with pytest.raises(KascadeError, match="made its mask for"), torch.no_grad():
            model(ids, attention_mask=longer, use_cache=False)  # transformers cannot either


def test_layers_with_caches_of_different_lengths_are_refused(llama):
    model, profile = llama
    for queries in (1, 9):
        cache = DynamicCache(config=model.config)
        with attach(model, profile), torch.no_grad():
            model(torch.tensor([ids_of(40)]), past_key_values=cache)
            layer = cache.layers[2]
            layer.keys, layer.values = layer.keys[:, :, :-5], layer.values[:, :, :-5]
            with pytest.raises(KascadeError, match="layer 2 sees .* where the first layer saw"):
                model(torch.tensor([ids_of(queries)]), past_key_values=cache)


def test_a_mask_of_ones_costs_no_copy_of_the_cache(llama):
    """The dense baseline: as many bytes are written as without a mask."""
    model, profile = llama

    class Filled(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.copies = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "masked_fill" in str(func) and out.dim() == 4 and out.shape[1] == 2 and out.shape[-2] >= 60:
                self.copies += 1
            return out

    ids = torch.tensor([ids_of(60), ids_of(60, seed=1)])
    ones = torch.ones(2, 61, dtype=torch.long)
    half = ones.clone()
    half[1, :20] = 0
    for strategy in ("dense", "quest", "kascade-decode-only"):
        copies = []
        for mask in (ones, half):
            with attach(model, profile, strategy=strategy), torch.no_grad(), Filled() as seen:
                cache = DynamicCache(config=model.config)
                model(ids, attention_mask=mask[:, :60], past_key_values=cache)
                before = seen.copies
                model(ids[:, :1], attention_mask=mask, past_key_values=cache)
            copies.append((before, seen.copies - before if strategy == "dense" else 0))
        assert copies[0] == (0, 0)
        assert copies[1][0] == 8  # or the test counts nothing


def test_minimax():
    """Its linear layers do not count the tokens of the cache: unpadded rows are right, padded ones refused."""
    model = Family("minimax", LINEAR).build()
    profile = some_profile(describe(model))
    ids, segments = ids_of(64, seed=4), steps(60, 4)
    for strategy in NAIVE:
        naive = Naive(model, profile, strategy, segments, 0.2, 4, **{k: (1,) for k in CHOOSE.get(strategy, {})})
        want = naive.logits(ids)
        options = {k: "1" for k in CHOOSE.get(strategy, {})}
        with attach(model, profile, strategy=strategy, ratio=0.2, min_keys=4, **options), torch.no_grad():
            outs, cache = [], None
            for start, end in segments:
                at = torch.arange(start, end)[None]  # its cache does not count
                out = model(torch.tensor([ids[start:end]]), position_ids=at, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                outs.append(out.logits[0])
        torch.testing.assert_close(torch.cat(outs), want, rtol=1e-5, atol=1e-5)  # its states are float32
    rows, mask = torch.tensor([ids[:40], ids[:40]]), torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    with attach(model, profile, strategy="streaming-llm"):
        with pytest.raises(KascadeError, match="padded rows cannot be told apart with this model's cache"):
            model.generate(rows, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        model.generate(rows, attention_mask=torch.ones_like(mask), max_new_tokens=4, do_sample=False, pad_token_id=0)


# -- generation --
def test_assistants_are_refused(llama, make_tiny_model):
    model, profile = llama
    ids = torch.tensor([ids_of(30) * 2])
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    for assisted in ({"assistant_model": make_tiny_model("llama", layers=2)}, {"prompt_lookup_num_tokens": 3}):
        with (
            attach(model, profile),
            pytest.raises(KascadeError, match="assisted generation .* is not supported") as told,
        ):
            model.generate(ids, **options, **assisted)
        assert "\n" not in str(told.value)
        model.generate(ids, **options, **assisted)  # detached, it works again
    assert "_get_candidate_generator" not in vars(model)


def test_a_compiled_model(make_tiny_model):
    """Compiled before or inside: attention runs as it is, and its counts are right."""
    model = make_tiny_model("llama", layers=2)
    profile, ids = some_profile(describe(model)), torch.tensor([ids_of(44, seed=6)])
    with attach(model, profile) as attachment, torch.no_grad():
        want, counted = model(ids, use_cache=False).logits, attachment.report()
    mask = torch.ones_like(ids)
    for inside in (True, False):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")
        with attach(model if inside else compiled, profile) as attachment, torch.no_grad():
            got = compiled(ids, attention_mask=mask, use_cache=False).logits
            assert attachment.report()["keys_read"] == counted["keys_read"]
        torch.testing.assert_close(got, want)
    with attach(model, profile), torch.no_grad(), pytest.raises(KascadeError, match="pass an attention_mask"):
        compiled(ids, use_cache=False)
    torch.compiler.reset()
