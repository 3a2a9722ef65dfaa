"""Scoring against model.generate one question at a time, and against figures worked out by hand."""

import json

import numpy as np
import pytest
import torch

from kascade_cli import attach
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.evaluation.anchors import HeadMaps, parse_anchors, random_sets, with_anchors
from kascade_cli.evaluation.answers import greedy_answers, shared_tokens
from kascade_cli.evaluation.cases import Asking, Case, EncodedQuestion, built_in_cases, file_cases, split_sources
from kascade_cli.evaluation.require import describe_verdict, parse_requirement
from kascade_cli.evaluation.run import Outcome, Run, draws_interval, run_cases, summarise
from kascade_cli.models import describe, load_model
from kascade_cli.sparse import Setting
from kascade_cli.tasks import make_prompts
from kascade_cli.tasks.scoring import cluster_interval, paired_interval
from tests.integrations.transformers.naive import some_profile
from tests.toy_captures import random_prompt, write_capture


def ids_of(length, seed=0):
    return torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def small():
    model, tokenizer = load_model("demo-small", dtype="float32", device="cpu")
    return model, tokenizer, describe(model, "demo-small")


# -- answers --
def generate_alone(model, ids, count):
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    tokens = out[0, len(ids) :].tolist()
    return tokens[: tokens.index(2)] if 2 in tokens else tokens


@pytest.mark.parametrize("length", [1, 33, 64, 95, 97])
@pytest.mark.parametrize("strategy", ["dense", "kascade", "kascade-decode-only", "streaming-llm"])
def test_answers_are_those_of_generate(make_tiny_model, length, strategy):
    model = make_tiny_model("llama")
    # So few keys that an answer depends on which tile a query is in.
    profile = some_profile(describe(model), ratio=0.02, min_keys=1)
    context = ids_of(length, seed=length)
    questions = [ids_of(size, seed=10 + i) for i, size in enumerate([2, 5, 2, 1, 2, 40, 3, 3, 2, 2, 2, 5])]
    counts = [3, 1, 4, 2, 3, 2, 8, 8, 8, 8, 8, 8]
    with attach(model, profile, strategy=strategy) as attachment:
        got = greedy_answers(model, context, questions, counts, tile=32)
        density = attachment.density
        tight = greedy_answers(model, context, questions, counts, tile=32, max_bytes=1)
        want = [generate_alone(model, context + q, n) for q, n in zip(questions, counts, strict=True)]
    assert got == want == tight
    assert strategy == "dense" or density < 1


def test_answers_of_a_hybrid_model(make_tiny_model):
    model = make_tiny_model("gemma3")
    context, questions = ids_of(80), [ids_of(2, seed=i) for i in range(3)]
    with attach(model, some_profile(describe(model))):
        got = greedy_answers(model, context, questions, [4, 4, 4], tile=32)
        assert got == [generate_alone(model, context + question, 4) for question in questions]


@pytest.mark.parametrize("rows", [1, 3, 5, 20])
def test_the_bound_on_repeated_cache_is_kept(make_tiny_model, monkeypatch, rows):
    """Never more rows at once than `max_bytes` has room for, whether few or many questions have one length."""
    from kascade_cli.evaluation import answers

    model = make_tiny_model("llama")  # 4 layers, 2 KV heads of 8, float64
    shared, rest, length, new = 64, 6, 3, 4
    row = 4 * 2 * 2 * 8 * 8 * (shared + rest + length + new)
    ran, held, decode, take = [], [], answers._decode, answers.Repeated.take

    def noted(model, cache, seen, chunk, steps):
        ran.append(len(chunk))
        return decode(model, cache, seen, chunk, steps)

    def taken(self, rows):
        held.append(sum(tensor.numel() * tensor.element_size() for pair in self.slots for tensor in pair))
        return take(self, rows)

    monkeypatch.setattr(answers, "_decode", noted)
    monkeypatch.setattr(answers.Repeated, "take", taken)
    questions = [ids_of(length, seed=i) for i in range(11)]
    bound = rows * row + row // 2
    with attach(model, strategy="oracle"):
        greedy_answers(model, ids_of(shared + rest), questions, [new] * 11, tile=32, max_bytes=bound)
    assert max(held) <= bound
    full, left = divmod(11, rows)
    assert ran == [rows] * full + [left] * (left > 0)


def test_shared_tokens_end_on_a_tile_and_leave_a_chunk():
    for tile in (1, 4, 32):
        for context in range(0, 100):
            for question in (1, 2, 3):
                shared = shared_tokens(context, question, tile)
                assert shared % tile == 0
                assert shared <= context
                assert shared != 1
                if context + question > 1:
                    assert context + question - shared >= 2


# -- cases --
def test_built_in_cases_have_the_length_and_share_nothing_with_dev_sets(small):
    _, tokenizer, _ = small
    cases = built_in_cases(
        ["single-hop", "two-hop"], "pairs", tokenizer, length=256, num_prompts=6, questions=3, seed=0
    )
    assert [len(case.context) for case in cases] == [256] * 6
    assert all(len(case.questions) == 6 for case in cases)
    texts = {tokenizer.decode(case.context[1:]) for case in cases}
    for split in ("train", "dev", "held-out"):
        others = make_prompts("pairs", length=256, count=6, questions_per_task=3, seed=0, split=split)
        assert texts.isdisjoint(prompt.haystack for prompt in others)
    more = built_in_cases(
        ["single-hop", "two-hop"], "pairs", tokenizer, length=256, num_prompts=8, questions=3, seed=0
    )
    assert more[:6] == cases


def test_words_of_several_tokens_shrink_the_haystack(small):
    class TwoPieces:
        bos_token_id, eos_token_id, unk_token_id = 1, 2, None

        def __call__(self, text, add_special_tokens=True, **_):
            ids = [i for word in text.split() for i in (10, 100 + self.number(word))]
            return {"input_ids": [1] * add_special_tokens + ids}

        def number(self, word):
            self.words = getattr(self, "words", {})
            return self.words.setdefault(word, len(self.words))

        def decode(self, ids, **_):
            names = {number: word for word, number in self.words.items()}
            return " ".join(names[i - 100] for i in ids if i >= 100)

    case = built_in_cases(["single-hop"], "hops", TwoPieces(), length=256, num_prompts=1, questions=2, seed=0)[0]
    assert 200 < len(case.context) <= 256
    assert case.questions[0].new_tokens == 4


def test_sources(tmp_path):
    assert split_sources(["single-hop"], "pairs") == (["single-hop"], "pairs", [], [])
    assert split_sources(["single-hop"], "hops") == (["single-hop"], "hops", [], [])
    assert split_sources(["silent-two-hop"], "pairs") == (["silent-two-hop"], "hops", [], [])
    assert split_sources(["hops", "q.jsonl"])[0][-1] == "silent-three-hop"
    with pytest.raises(UsageError, match="no task is called 'nope'"):
        split_sources(["nope"])
    with pytest.raises(UsageError, match="mixes two kinds of haystack"):
        split_sources(["hops", "pairs"])


def test_file_cases(small, tmp_path):
    _, tokenizer, _ = small
    path = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": "@ k1 v2 v3 ? k1", "answer": "v2 v3"},
        {"prompt": "@ k1 v2 v3 " * 20 + "? k1", "answer": "v2 v3"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    cases, dropped = file_cases(path, tokenizer, max_length=20, room=None, asking=Asking())
    assert dropped == 1
    assert tokenizer.decode(cases[0].context + cases[0].questions[0].ids).split()[1:] == rows[0]["prompt"].split()
    assert cases[0].questions[0].new_tokens == 2
    for text, problem in [
        ('{"prompt": "a"}', 'line 1: needs a non-empty text "answer"'),
        ("{", "line 1: not JSON"),
        ('\n{"prompt": " ", "answer": "b"}', 'line 2: needs a non-empty text "prompt"'),
        ("", "it has no rows"),
        (json.dumps(rows[1]), "all 1 prompts are longer than 20 tokens"),
    ]:
        path.write_text(text)
        with pytest.raises(KascadeError, match=problem):
            file_cases(path, tokenizer, max_length=20, room=None, asking=Asking())
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(KascadeError, match="longer than 16 tokens"):
        file_cases(path, tokenizer, max_length=20, room=16, asking=Asking())
    with pytest.raises(KascadeError, match="cannot read"):
        file_cases(tmp_path / "none.jsonl", tokenizer, max_length=20, room=None, asking=Asking())


# -- scores --
def test_run_cases_scores_like_generate_question_by_question(small):
    model, tokenizer, info = small
    profile = some_profile(info, anchors=[0, 1, 2, 7], ratio=0.1, min_keys=16)
    cases = built_in_cases(
        ["single-hop", "two-hop"], "pairs", tokenizer, length=320, num_prompts=2, questions=3, seed=1
    )
    run = Run("kascade", (Setting(profile=profile),))
    tokens = []
    outcome = run_cases(model, tokenizer, cases, run, advance=tokens.append)
    assert tokens == [case.tokens for case in cases]
    want = []
    with attach(model, profile):
        for case in cases:
            for question in case.questions:
                ids = torch.tensor([case.context + question.ids])
                out = model.generate(ids, max_new_tokens=question.new_tokens, do_sample=False)
                want.append(tokenizer.decode(out[0, ids.shape[1] :]).split() == question.answers[0].split())
    assert outcome.right[0].tolist() == want
    assert 0 < sum(want) < len(want) + 1
    assert outcome.density["prefill"] < 1


def outcome_of(right, strategy="kascade", draws=False):
    profile = type("P", (), {"anchors": [0, 1]})
    run = Run(strategy, (Setting(strategy, profile, 0.1),) * len(right), draws)
    budget = {"ratio": 0.1, "min_keys": 16}
    return Outcome(run, np.array(right, float), {"all": 0.1}, budget, "torch", 1.0)


def cases_of(tasks):
    return [Case([1], [EncodedQuestion(task, [2], ("v1",), 1) for task in prompt]) for prompt in tasks]


def test_summary_has_the_intervals_of_the_questions():
    cases = cases_of([["a", "b", "a", "b"]] * 5)
    rng = np.random.default_rng(0)
    dense, sparse = (rng.random((2, 20)) < [[0.9], [0.6]]).astype(float)
    row = summarise(outcome_of([sparse]), cases, outcome_of([dense], "dense"))
    first = np.tile([True, False, True, False], 5)
    clusters = np.repeat(np.arange(5), 4)
    for name, part in (("a", first), ("b", ~first)):
        score = cluster_interval(sparse[part], clusters[part])
        difference = paired_interval(sparse[part], dense[part], clusters[part])
        got = row["scores"][name]
        for interval, figures in ((score, got), (difference, got["vs_dense"])):
            assert [figures[key] for key in ("score", "low", "high")] == pytest.approx(
                [100 * interval.mean, 100 * interval.low, 100 * interval.high], abs=0.005
            )
    assert row["mean"]["score"] == pytest.approx(100 * sparse.mean(), abs=0.005)
    assert row["mean"]["questions"] == 20
    assert "vs_dense" not in summarise(outcome_of([dense], "dense"), cases, outcome_of([dense], "dense"))["mean"]


def test_the_mean_is_over_tasks_also_where_one_has_fewer_questions():
    cases = cases_of([["a", "a", "a", "b"], ["a", "a", "b"]])
    sparse, dense = [1, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]
    row = summarise(outcome_of([sparse]), cases, outcome_of([dense], "dense"))
    assert row["mean"]["score"] == pytest.approx((80 + 0) / 2)
    assert row["mean"]["vs_dense"]["score"] == pytest.approx(-60)
    assert 0 <= row["mean"]["low"] <= 40 <= row["mean"]["high"] <= 100


def test_draws_vary_in_the_interval():
    clusters = np.repeat(np.arange(10), 4)
    rng = np.random.default_rng(1)
    one = (rng.random((1, 40)) < 0.5).astype(float)
    same = draws_interval(np.repeat(one, 8, 0), clusters)
    plain = paired_interval(one[0], np.zeros(40), clusters)
    assert (same.low, same.high) == pytest.approx((plain.low, plain.high), abs=0.05)
    mixed = draws_interval(np.concatenate([np.ones((4, 40)), np.zeros((4, 40))]), clusters)
    assert mixed.mean == 0.5
    # Eight draws of 0 or 1: the binomial 2.5 % and 97.5 % quantiles are 1/8 and 7/8.
    assert (mixed.low, mixed.high) == (0.125, 0.875)
    row = summarise(
        outcome_of(np.concatenate([np.ones((1, 4)), np.zeros((1, 4))]), draws=True),
        cases_of([["a", "a"], ["a", "a"]]),
        outcome_of([[1, 1, 1, 1]], "dense"),
    )
    assert row["draws"] == [100, 0]
    assert row["mean"]["vs_dense"]["score"] == -50


# -- other anchors --
def test_random_sets(small):
    info = small[2]
    sets = random_sets(info, [0, 2, 7], 20, seed=0)
    assert sets == sorted(map(list, {tuple(s) for s in sets}), key=sets.index)
    assert all(s[0] == 0 and len(s) == 3 and s != [0, 2, 7] and s == sorted(s) for s in sets)
    assert sets == random_sets(info, [0, 2, 7], 20, seed=0) != random_sets(info, [0, 2, 7], 20, seed=1)
    with pytest.raises(UsageError, match="only 20 other sets of 3 anchors"):
        random_sets(info, [0, 2, 7], 21, seed=0)


def test_head_maps_come_from_the_capture(small, tmp_path):
    info = small[2]
    rng = np.random.default_rng(0)
    prompt = random_prompt(rng, layers=8, heads=4, n_tokens=256, tiles=[(224, 32), (255, 1)], query_heads=8)
    # Layer 5, head 0 attends like head 3 of layer 2 in prefill, and like head 2 when decoding.
    prompt["mass"][5, 0, 0], prompt["mass"][5, 1, 0] = prompt["mass"][2, 0, 3], prompt["mass"][2, 1, 2]
    path = write_capture(tmp_path / "c.h5", [prompt], model_fingerprint=info.fingerprint)
    maps = HeadMaps(info, path)
    assert maps.of([0, 2], 5)["prefill"][0] == 3
    assert maps.of([0, 2], 5)["decode"][0] == 2
    profile = some_profile(info, anchors=[0, 1])
    assert not with_anchors(profile, info, [0, 2], HeadMaps(info)).heads_measured  # without a capture: pooled
    other = with_anchors(profile, info, [0, 2], maps)
    assert other.anchors == [0, 2]
    assert other.head_map(5, "prefill")[0] == (2, 3)
    assert other.budget == profile.budget
    foreign = write_capture(tmp_path / "f.h5", [prompt])
    with pytest.raises(KascadeError, match="captured from another model"):
        HeadMaps(info, foreign)
    with pytest.raises(UsageError, match="layer 9 is not"):
        with_anchors(profile, info, [0, 9], maps)
    with pytest.raises(UsageError, match="first full-attention layer, 0"):
        with_anchors(profile, info, [1, 2], maps)
    assert parse_anchors("random") == 10
    assert parse_anchors("random:3") == 3
    assert parse_anchors("0,2") == [0, 2]
    with pytest.raises(UsageError, match="random:10"):
        parse_anchors("random:x")


# -- targets --
def row(strategy, ratio, score, length=1024):
    return {
        "strategy": strategy,
        "ratio": ratio,
        "length": length,
        "mean": {"score": score},
        "scores": {"t": {"score": 5}},
    }


def test_requirements():
    rows = [row("dense", None, 90.0), row("kascade", 0.1, 88.0), row("kascade", 0.2, 91.0), row("random", 0.1, 10.0)]
    labels = ["dense", "kascade", "kascade-pooled", "random", "kascade[0,2,7]"]

    def met(text):
        return [verdict["met"] for verdict in parse_requirement(text, labels, ["t"]).check(rows)]

    assert met("kascade >= dense - 2") == [True, True]
    assert met("kascade>=dense-1.9") == [False, True]
    assert met("kascade > dense") == [False, True]
    assert met("random <= kascade - 60") == [True]
    assert met("dense < kascade + 2") == [False, True]
    assert met("dense >= 90") == [True]
    assert met("t: kascade <= 5") == [True, True]
    missed = parse_requirement("kascade >= dense - 1", labels, ["t"]).check(rows)[0]
    assert describe_verdict(missed) == "kascade >= dense - 1 (at 1k tokens, ratio 0.1: 88.0, target 89.0)"
    for text in ("kascade >= nothing", "kascade", "oracle >= 3", "kascade >= dense * 2", "kascade[0,2] > 1", ""):
        with pytest.raises(UsageError, match="is not understood"):
            parse_requirement(text, labels, ["t"])
    with pytest.raises(UsageError, match="no task 'u'"):
        parse_requirement("u: kascade > 1", labels, ["t"])


def test_no_interval_is_without_width_where_little_is_known():
    from kascade_cli.evaluation.run import _mean_interval

    # Weighted means (tasks have different numbers of questions), all right: Wilson's width, not a bootstrap's none.
    weights = np.array([0.5, 0.5, 0.5, 0.5, 2.0, 2.0])
    clusters = np.array([0, 0, 1, 1, 0, 1])
    right = _mean_interval(weights, clusters)
    assert right.mean == right.high == 1
    assert right.low == cluster_interval(np.ones(6), clusters).low < 0.9
    assert _mean_interval(0 * weights, clusters).high > 0.1
    # Where it has a width the bootstrap stays.
    mixed = weights * [1, 0, 1, 1, 0, 1]
    assert _mean_interval(mixed, clusters) == paired_interval(mixed, 0 * mixed, clusters)
    one = _mean_interval(weights[:3], np.zeros(3, int))
    assert one == cluster_interval(np.full(3, one.mean), np.zeros(3, int))
    assert one.high - one.low > 0.7
    draws = draws_interval(np.array([[1.0, 0.0], [1.0, 1.0]]), [5, 5])
    assert (draws.mean, draws.low, draws.high) == (0.75, 0.0, 1.0)
    below = draws_interval(np.array([[0.0, -1.0]]), [5, 5], least=-1.0)
    assert (below.mean, below.low, below.high) == (-0.5, -1.0, 1.0)
