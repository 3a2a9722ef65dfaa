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
