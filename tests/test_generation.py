"""Generation and its comparison with dense, against model.generate, full forward passes and scipy."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.evaluation.kl import kl_divergence
from kascade_cli.generation import (
    Sampling,
    agreement,
    check_room,
    compare,
    forced_log_probabilities,
    generate,
)
from kascade_cli.models import describe
from kascade_cli.sparse import Setting
from kascade_cli.tasks.chat import encode_request

from .integrations.transformers.naive import Naive, some_profile


class Tokenizer:
    """Token i is the word `w<i>`; enough for generation."""

    pad_token_id = 0
    unk_token_id = None

    def decode(self, ids, **_):
        return " ".join(f"w{int(i)}" for i in ids)


def ids_of(length, seed=0):
    return torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def llama(make_tiny_model):
    model = make_tiny_model("llama")
    model.generation_config.eos_token_id = None
    return model, some_profile(describe(model))


def test_dense_is_the_model_s_own_generation(llama):
    model, _ = llama
    ids, written = ids_of(50), []
    run = generate(model, Tokenizer(), ids, Setting("dense"), max_new_tokens=8, write=written.append)
    alone = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert run.tokens == alone[0, 50:].tolist()
    assert "".join(written) == run.text == Tokenizer().decode(run.tokens)
    assert len(written) > 1  # it came in pieces
    assert run.report["density"] == 1.0
    assert run.first_token_s > 0
    assert run.tokens_per_s > 0


def test_sampling_repeats_with_its_seed(llama):
    model, profile = llama
    setting = Setting("kascade", profile)
    texts = [
        generate(model, Tokenizer(), ids_of(60), setting, max_new_tokens=12, sampling=Sampling(1.0, seed)).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("strategy", ["dense", "kascade", "streaming-llm"])
def test_forced_distributions_equal_the_oracle_s(llama, strategy):
    model, profile = llama
    ids, continuation = ids_of(70, seed=1), ids_of(5, seed=2)
    got = forced_log_probabilities(model, ids, continuation, Setting(strategy, profile))
    segments = [(0, 70), *[(70 + i, 71 + i) for i in range(4)]]
    naive = Naive(model, profile, strategy, segments, profile.budget.ratio, profile.budget.min_keys)
    want = naive.logits(ids + continuation[:-1])[69:].log_softmax(-1)
    torch.testing.assert_close(got, want)


def test_compare_equals_scipy_on_full_forward_passes(llama):
    model, profile = llama
    ids = ids_of(90, seed=3)
    dense, sparse = Setting("dense"), Setting("kascade", profile)
    runs = [generate(model, Tokenizer(), ids, setting, max_new_tokens=10) for setting in (dense, sparse)]
    result = compare(model, ids, (dense, runs[0]), (sparse, runs[1]))

    whole = ids + runs[0].tokens[:-1]
    with torch.no_grad():
        p = model(torch.tensor([whole]), use_cache=False).logits[0, 89:].softmax(-1).numpy()
    segments = [(0, 90), *[(90 + i, 91 + i) for i in range(9)]]
    q = Naive(model, profile, "kascade", segments, 0.2, 4).logits(whole)[89:].softmax(-1).numpy()
    divergence = np.array([entropy(p[i], q[i]) for i in range(10)])
    assert divergence.max() > 1e-4
    assert result.kl_mean == pytest.approx(divergence.mean(), rel=1e-6)
    assert result.kl_max == pytest.approx(divergence.max(), rel=1e-6)

    same = np.array(runs[0].tokens) == np.array(runs[1].tokens)
    assert result.agreement == same.mean()
    assert result.first_divergence == (None if same.all() else int(np.argmin(same)))


def test_divergence_is_zero_for_equal_distributions_and_bears_zero_probability():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]]).log()
    assert kl_divergence(p, q).tolist() == pytest.approx([0.5 * np.log(2), 0.0], abs=1e-7)


def test_agreement_counts_missing_tokens_as_different():
    assert agreement([1, 2, 3], [1, 2, 3]) == (1.0, None)
    assert agreement([1, 2, 3, 4], [1, 9, 3, 4]) == (0.75, 1)
    assert agreement([1, 2], [1, 2, 3, 4]) == (0.5, 2)


def test_room(llama):
    info = describe(llama[0])
    check_room(info, 1000, 24)
    with pytest.raises(KascadeError, match="takes 1024 positions: shorten it"):
        check_room(info, 1024, 1)
    with pytest.raises(KascadeError, match="--max-new-tokens 24 or less"):
        check_room(info, 1000, 25)


def test_prompts_carry_one_bos():
    from transformers import AutoTokenizer

    from kascade_cli.demo import DEMO_MODELS

    tokenizer = AutoTokenizer.from_pretrained(str(DEMO_MODELS["demo-small"]))
    with pytest.raises(UsageError, match="no chat template"):
        encode_request(tokenizer, "? k1", chat=True)
    with pytest.raises(UsageError, match="the prompt is empty"):
        encode_request(tokenizer, "  ", chat=False)
    bos = tokenizer.bos_token_id
    assert encode_request(tokenizer, "? k1", chat=False).count(bos) == 1
    tokenizer.chat_template = (
        "{{ bos_token }} ? {{ messages[0]['content'] }}{% if add_generation_prompt %} @{% endif %}"
    )
    ids = encode_request(tokenizer, "k1", chat=True)
    assert tokenizer.decode(ids).split() == ["<bos>", "?", "k1", "@"]


def test_sampling_draws_from_all_tokens(llama):
    """Not from the most likely few, whatever the checkpoint's own settings say."""
    model, _ = llama
    ids, generation = ids_of(40, seed=4), model.generation_config
    before = (generation.top_k, generation.top_p, generation.temperature)
    generation.top_k, generation.top_p, generation.temperature = 5, 0.3, 0.1
    try:
        drawn = generate(
            model, Tokenizer(), ids, Setting("dense"), max_new_tokens=150, sampling=Sampling(40.0, seed=1)
        ).tokens
    finally:
        generation.top_k, generation.top_p, generation.temperature = before
    with torch.no_grad():
        logits = model(torch.tensor([ids + drawn[:-1]]), use_cache=False).logits[0, 39:]
    likely = (logits / 40.0).softmax(-1)
    rank = (likely > likely.gather(1, torch.tensor(drawn)[:, None])).sum(-1)
    # Nearly uniform over 64 tokens at this temperature: each fifth of the ranks is drawn about as it should be.
    for first in range(0, 60, 12):
        ordered = likely.sort(-1, descending=True).values[:, first : first + 12].sum(-1)
        share = ((rank >= first) & (rank < first + 12)).double().mean()
        error = (ordered * (1 - ordered)).sum().sqrt() / len(drawn)
        assert abs(share - ordered.mean()) < 4 * error


def test_models_that_give_all_logits(llama):
    """Whose forward does not take `logits_to_keep`: `--compare`, `--verify` and `evaluate` give the same."""
    from kascade_cli.evaluation.answers import greedy_answers
    from kascade_cli.evaluation.kl import measure_kl
    from kascade_cli.integrations.transformers import attach_setting

    model, profile = llama
    kind = type(model)

    class Everything(kind):
        def forward(
            self,
            input_ids=None,
            attention_mask=None,
            position_ids=None,
            past_key_values=None,
            use_cache=None,
            return_dict=None,
        ):
            return kind.forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache)

    found = []
    ids, questions = ids_of(70, seed=6), [ids_of(3, seed=i) for i in range(3)]
    setting = Setting("kascade", profile)
    for model.__class__ in (Everything, kind):
        run = generate(model, Tokenizer(), ids, setting, max_new_tokens=4)
        result = compare(model, ids, (Setting("dense"), run), (setting, run))
        with attach_setting(model, setting):
            answers = greedy_answers(model, ids, questions, [3, 3, 3], tile=32)
        verified = measure_kl(model, [profile], [ids], [[]], ("prefill", "decode"), decode_tokens=4)[0].kl
        found.append((run.tokens, result.kl_mean, answers, verified))
    (tokens, kl, answers, verified), other = found
    assert (tokens, answers) == (other[0], other[2])
    assert kl == pytest.approx(other[1], rel=1e-9)
    assert verified == pytest.approx(other[3], rel=1e-9)
    assert kl > 1e-6


OPTIONS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "top_k": 0},
    "processed": {"do_sample": False, "repetition_penalty": 1.3, "min_new_tokens": 9},
    "both": {"do_sample": True, "temperature": 3.0, "top_k": 20, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("strategy", ["dense", "kascade"])
def test_a_static_loop_chooses_as_transformers_does(llama, strategy, options, monkeypatch):
    """Seeded sampling, processors, padded rows, two tokens that end a row: the same tokens, padding and counts."""
    from kascade_cli import attach
    from kascade_cli.integrations.transformers.decoding import GraphDecode, decoder

    monkeypatch.setattr(decoder, "EVERYWHERE", True)
    model, profile = llama
    ids = torch.tensor([ids_of(60, seed) for seed in range(3)])
    mask = torch.ones_like(ids)
    mask[1, :20] = mask[2, :33] = 0
    ids = ids * mask
    call = {"attention_mask": mask, "max_new_tokens": 30, "pad_token_id": 0, **options}
    with attach(model, profile, strategy=strategy) as run:
        torch.manual_seed(5)
        free = model.generate(ids, **call)[:, 60:]
        call["eos_token_id"] = [int(free[row, place]) for row, place in enumerate((4, 9, 15))]
        run.reset()
        torch.manual_seed(5)
        want, expected = model.generate(ids, **call), run.report()
        run.reset()
        torch.manual_seed(5)
        loop = GraphDecode()
        got = model.generate(ids, custom_generate=loop, **call)
        report = run.report()
        assert run.decoder.runner is not None
    assert got.tolist() == want.tolist()
    assert 60 < want.shape[1] <= 90
    assert (want[:, 60:] == 0).any()  # some rows end before others
    assert {key: report[key] for key in ("keys_read", "forward_passes")} == {
        key: expected[key] for key in ("keys_read", "forward_passes")
    }


def test_samples_are_those_of_multinomial():
    from kascade_cli.integrations.transformers.decoding.generate import draw

    weights = torch.rand(7, 501, generator=torch.Generator().manual_seed(1)) ** 8
    weights[:, ::3] = 0
    weights /= weights.sum(-1, keepdim=True)
    for seed in range(20):
        torch.manual_seed(seed)
        want = torch.multinomial(weights, 1)[:, 0]
        torch.manual_seed(seed)
        assert draw(weights).tolist() == want.tolist()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"return_dict_in_generate": True}, "return_dict_in_generate asks for what each step leaves"),
        ({"max_time": 60.0}, "MaxTimeCriteria looks at every step"),
        ({"cache_implementation": "static"}, "its cache is a StaticCache"),
        ({"use_cache": False}, "it runs without a cache"),
        ({"prefill_chunk_size": 16}, "the prompt is prefilled in chunks"),
        ({"max_new_tokens": 3}, "4 new tokens or more pay for recording graphs"),
    ],
)
def test_calls_that_need_transformers_own_loop(llama, options, reason, monkeypatch):
    from kascade_cli import attach
    from kascade_cli.integrations.transformers.decoding import GraphDecode, decoder

    monkeypatch.setattr(decoder, "EVERYWHERE", True)
    model, profile = llama
    ids, call = torch.tensor([ids_of(40)]), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    with attach(model, profile):
        loop = GraphDecode()
        got, want = model.generate(ids, custom_generate=loop, **call), model.generate(ids, **call)
    assert loop.reason == reason
    got, want = (getattr(out, "sequences", out) for out in (got, want))
    assert got.tolist() == want.tolist()


def test_a_cache_that_the_caller_brought_holds_the_new_tokens(llama, monkeypatch):
    """So that a chat goes on behind it."""
    from transformers import DynamicCache

    from kascade_cli import attach
    from kascade_cli.integrations.transformers.decoding import GraphDecode, decoder

    monkeypatch.setattr(decoder, "EVERYWHERE", True)
    model, profile = llama
    texts = []
    for loop in (None, GraphDecode()):
        cache, text = DynamicCache(config=model.config), torch.tensor([ids_of(45)])
        with attach(model, profile):
            for turn in range(2):
                call = {"past_key_values": cache, "do_sample": False, "pad_token_id": 0, "max_new_tokens": 9}
                text = model.generate(text, **call, **({} if loop is None else {"custom_generate": loop}))
                text = torch.cat([text, torch.tensor([ids_of(33, seed=turn)])], 1)
        texts.append(text.tolist())
        assert cache.get_seq_length() == 45 + 9 + 33 + 9 - 1
    assert texts[0] == texts[1]


@pytest.mark.parametrize("sample", [False, True])
def test_where_capturing_fails_transformers_loop_writes_the_same(llama, sample, monkeypatch):
    """As on a GPU when a step waits for the device: found out behind the prefill, with the first token told."""
    from kascade_cli import attach
    from kascade_cli.integrations.transformers.decoding import GraphDecode, Runner, decoder

    monkeypatch.setattr(decoder, "EVERYWHERE", True)
    model, profile = llama
    ids = torch.tensor([ids_of(52)])
    call = {"max_new_tokens": 12, "do_sample": sample, "temperature": 2.0 if sample else None, "pad_token_id": 0}
    told = []

    class Streamer:
        def put(self, tokens):
            told.append(tokens.flatten().tolist())

        def end(self):
            told.append("end")

    def fails(runner):
        runner.reason = "RuntimeError: operation not permitted when stream is capturing"

    with attach(model, profile) as run:
        torch.manual_seed(3)
        want, expected = model.generate(ids, **call), run.report()
        run.reset()
        monkeypatch.setattr(Runner, "prepare", fails)
        monkeypatch.setattr(decoder.Decoder, "_captures", lambda self: True)
        for _ in range(2):
            torch.manual_seed(3)
            loop = GraphDecode(Streamer())
            got = model.generate(ids, custom_generate=loop, **call)
            assert got.tolist() == want.tolist()
            assert loop.reason == "RuntimeError: operation not permitted when stream is capturing"
            assert told == [[token] for token in want[0, 52:].tolist()] + ["end"]
            assert run.report()["keys_read"] == expected["keys_read"]
            assert run.report()["forward_passes"] == expected["forward_passes"]
            run.reset()
            told.clear()


def test_graph_decode_is_for_what_is_attached(llama):
    from kascade_cli import attach
    from kascade_cli.integrations.transformers.decoding import GraphDecode

    model, profile = llama
    ids = torch.tensor([ids_of(20)])
    with pytest.raises(KascadeError, match="GraphDecode runs what is attached"):
        model.generate(ids, max_new_tokens=3, pad_token_id=0, custom_generate=GraphDecode())
    with attach(model, profile), pytest.raises(KascadeError, match="does not search with beams"):
        model.generate(ids, max_new_tokens=3, pad_token_id=0, num_beams=2, custom_generate=GraphDecode())


def test_generate_says_why_it_ran_eagerly(llama):
    model, _ = llama
    run = generate(model, Tokenizer(), ids_of(20), Setting("dense"), max_new_tokens=3)
    assert run.eager == "the model is on cpu, and CUDA graphs need a GPU"
    assert run.graphs_s == 0


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt2", "mixtral", "opt", "starcoder2"])
def test_other_families_on_a_static_cache(kind, monkeypatch):
    """Keys and values of different sizes, learned positions, experts, positions counted from a mask."""
    from kascade_cli import attach
    from kascade_cli.integrations.transformers.decoding import GraphDecode, decoder
    from tests.families import TABLE

    monkeypatch.setattr(decoder, "EVERYWHERE", True)
    model = next(family for family in TABLE if family.kind == kind).build()
    ids = torch.tensor([ids_of(37, seed) for seed in (1, 2)])
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    ids = ids * mask
    call = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": True, "pad_token_id": 0}
    with attach(model, some_profile(describe(model), anchors=[0, 2])) as run:
        torch.manual_seed(1)
        want = model.generate(ids, **call)
        torch.manual_seed(1)
        assert model.generate(ids, custom_generate=GraphDecode(), **call).tolist() == want.tolist()
        assert run.decoder.runner is not None
    assert len(set(want[:, 37:].flatten().tolist())) > 3


def test_a_prompt_s_cache_goes_once_it_is_copied(llama, monkeypatch):
    """Two copies of a long prompt's keys would be one too many; a cache that the call brought stays."""
    from transformers import DynamicCache

    from kascade_cli import attach
    from kascade_cli.integrations.transformers.decoding import Decoder, GraphDecode, decoder

    monkeypatch.setattr(decoder, "EVERYWHERE", True)
    model, profile = llama
    seen, genuine = [], Decoder.refuses
    monkeypatch.setattr(Decoder, "refuses", lambda self, cache: seen.append(cache) or genuine(self, cache))
    call = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "custom_generate": GraphDecode()}
    with attach(model, profile):
        for given in ({}, {"past_key_values": DynamicCache(config=model.config)}):
            model.generate(torch.tensor([ids_of(30)]), **call, **given)
    assert [layer.keys is None for cache in seen for layer in cache.layers] == [True] * 4 + [False] * 4
