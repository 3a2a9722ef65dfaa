"""Sweeps: what is measured, against independent passes; going on from a file; plans."""

import itertools
import json

import numpy as np
import pytest
import torch

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.evaluation.cases import Case, EncodedQuestion
from kascade_cli.models import describe
from kascade_cli.sparse import Setting
from kascade_cli.sweeps import plan as plans
from kascade_cli.sweeps import run as runs
from kascade_cli.sweeps.document import Result, open_result
from kascade_cli.sweeps.kl import AnswerKL
from kascade_cli.sweeps.run import kl_summary
from tests.integrations.transformers.naive import Naive, some_profile
from tests.toy_captures import random_prompt, write_capture


class Words:
    """A tokenizer for `is_right`: a token is a word."""

    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


def make_cases(count, vocabulary=64):
    random = np.random.default_rng(5)
    cases = []
    for number in range(count):
        context = random.integers(3, vocabulary, 97 + 7 * number).tolist()
        questions = [
            EncodedQuestion(kind, random.integers(3, vocabulary, 3 + n).tolist(), ("7 8",), 2 + n)
            for n, kind in enumerate(("one", "two"))
        ]
        cases.append(Case(context, questions))
    return cases


@pytest.fixture(scope="module")
def llama(make_tiny_model):
    model = make_tiny_model("llama")
    model.generation_config.eos_token_id = None
    return model


def advance(*_):
    pass


@pytest.mark.parametrize("strategy", ["oracle", "kascade", "kascade-no-remap"])
def test_kl_at_the_answers_against_loops(llama, strategy):
    """The dense answer by `generate`, sparse logits by the formulas alone, KL by hand; all in float64."""
    profile = some_profile(describe(llama))
    cases, setting = make_cases(3), Setting(strategy, profile, 0.2, 4)
    found = AnswerKL(llama, cases, 2, advance=advance).measure(setting, advance=advance)
    assert len(found) == 2
    for case, kind, got in zip(cases, (0, 1), found, strict=False):
        question = case.questions[kind]
        ids = case.context + question.ids
        with torch.no_grad():
            whole = llama.generate(torch.tensor([ids]), max_new_tokens=question.new_tokens, do_sample=False)[0]
        answer = whole[len(ids) :].tolist()
        assert len(answer) == question.new_tokens
        given = ids + answer[:-1]
        segments = [(0, len(ids)), *[(i, i + 1) for i in range(len(ids), len(given))]]
        sparse = Naive(llama, profile, strategy, segments, 0.2, 4).logits(given)[len(ids) - 1 :]
        with torch.no_grad():
            dense = llama(torch.tensor([given])).logits[0, len(ids) - 1 :]
        p, q = dense.softmax(-1), sparse.softmax(-1)
        assert got == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5, abs=1e-9)
        assert got > 1e-4


def test_an_answer_that_is_empty_is_measured_at_its_first_token(llama):
    case = make_cases(1)[0]
    with torch.no_grad():
        first = int(llama(torch.tensor([case.context + case.questions[0].ids])).logits[0, -1].argmax())
    llama.generation_config.eos_token_id = first
    try:
        kl = AnswerKL(llama, [case], 1, advance=advance)
        assert kl.positions == 1
        assert kl.measure(Setting("dense"), advance=advance) == pytest.approx([0.0], abs=1e-12)
    finally:
        llama.generation_config.eos_token_id = None


def test_a_summary_of_kl():
    found = kl_summary([0.5, 1.5])
    assert (found["mean"], found["low"], found["high"], found["prompts"]) == (1.0, 0.5, 1.5, 2)
    found = kl_summary([0.5, float("inf")])
    assert (found["mean"], found["per_prompt"]) == (None, [0.5, None])


HEAD = {"schema": "kascade-sweep/v1", "sweep": "oracle", "model": "toy", "fingerprint": "f", "settings": {"seed": 0}}


def shorn(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_sweep_goes_on_where_it_was(llama, tmp_path, monkeypatch):
    """Stopped after two rows, repeated with one point more: the rows of one run, each measured once."""
    cases, base = make_cases(2), Setting(min_keys=4)
    points = plans.oracle_points(base, [0.1, 0.5], [8])
    whole = Result(None, HEAD)
    runs.run_sweep(llama, Words(), cases, points, whole, kl_prompts=2)
    measured = []
    plain = runs.run_cases

    def counted(model, tokenizer, cases, run, **options):
        measured.append(run.settings[0].strategy)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return plain(model, tokenizer, cases, run, **options)

    monkeypatch.setattr(runs, "run_cases", counted)
    path = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        runs.run_sweep(llama, Words(), cases, points, open_result(path, HEAD, False), kl_prompts=2)
    assert len(json.loads(path.read_text())["rows"]) == 2
    result, told = open_result(path, HEAD, False), []
    runs.run_sweep(
        llama, Words(), cases, points, result, kl_prompts=2, done=lambda point, row: told.append(point.describe())
    )
    assert told == ["oracle, ratio 0.5", "oracle, keys 8"]
    assert measured == ["dense", "oracle", "oracle", "oracle", "oracle"]
    assert shorn(result.document(points)["rows"]) == shorn(whole.document(points)["rows"])
    runs.run_sweep(None, None, cases, points, result, kl_prompts=2)  # nothing is left to do
    stored = json.loads(path.read_text())
    assert stored["settings"] == {"seed": 0}
    assert [row.get("keys") for row in stored["rows"]] == [None, None, None, 8]
    assert stored["rows"][1]["density"]["all"] < stored["rows"][2]["density"]["all"] < 1


def test_tokens_to_read_are_those_that_are_told(llama):
    cases, points = make_cases(2), plans.oracle_points(Setting(min_keys=4), [0.5], [])
    seen = []
    runs.run_sweep(
        llama, Words(), cases, points, Result(None, HEAD), kl_prompts=1, advance=lambda what, n: seen.append(n)
    )
    assert sum(seen) == pytest.approx(runs.tokens_to_read(cases, 1, len(points)), rel=0.3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fingerprint": "g"}, "is of fingerprint f, not g: pass --overwrite"),
        ({"sweep": "remap"}, "is of sweep oracle, not remap"),
        ({"settings": {"seed": 1}}, "was made with seed 0, now 1: repeat the old one, or pass --overwrite"),
        ({"settings": {"seed": 0, "min_keys": 3}}, "was made with min keys None, now 3"),
    ],
)
def test_another_sweep_is_not_gone_on_with(tmp_path, change, reason):
    path = tmp_path / "r.json"
    Result(path, HEAD).write()
    assert open_result(path, HEAD, False).rows == {}
    with pytest.raises(UsageError, match=reason):
        open_result(path, HEAD | change, False)
    assert open_result(path, HEAD | change, True).head == HEAD | change


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": "kascade-bench/v1", "rows": []}', "\x00"])
def test_a_file_that_is_no_sweep_is_kept(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="exists and is no sweep's result: pass --overwrite"):
        open_result(path, HEAD, False)
    assert path.read_text() == text


def test_plans():
    base = Setting(min_keys=4)
    points = plans.oracle_points(base, [0.1], [8, 16], per_query=True)
    assert [(p.label, p.at) for p in points] == [
        ("dense", {}), ("oracle", {"ratio": 0.1}), ("oracle", {"keys": 8}), ("oracle", {"keys": 16}),
        ("oracle-per-query", {"ratio": 0.1}), ("oracle-per-query", {"keys": 8}), ("oracle-per-query", {"keys": 16}),
    ]  # fmt: skip
    assert [points[2].setting.budget().count(n) for n in (3, 100, 10_000)] == [3, 8, 8]
    assert [points[1].setting.budget().count(n) for n in (3, 100, 10_000)] == [3, 10, 1000]
    points = plans.pooling_points(base, [4, 64], [0.1])
    assert [(p.label, p.setting.tile, p.setting.options.get("pool")) for p in points[1:]] == [
        ("post-softmax", 4, "probabilities"), ("post-softmax", 64, "probabilities"),
        ("pre-softmax", 4, "logits"), ("pre-softmax", 64, "logits"),
    ]  # fmt: skip
    plans.check_points(points)
    with pytest.raises(UsageError, match="pre-softmax, ratio 0.1, tile 4 is asked for twice"):
        plans.check_points([*points, points[3]])
    with pytest.raises(UsageError, match="ratio 2 is outside"):
        plans.check_points(plans.oracle_points(base, [2.0], []))


def test_anchors_of_a_number_are_the_best_of_all_sets(llama, tmp_path):
    from kascade_cli.analysis.anchors import head_map, layer_similarity
    from kascade_cli.analysis.similarity import measure

    info = describe(llama)
    rng = np.random.default_rng(3)
    tiles = [(32, 32), (64, 32), (120, 1)]
    prompts = [
        random_prompt(rng, layers=4, heads=2, n_tokens=128, tiles=tiles, query_heads=4, related=0.4) for _ in range(2)
    ]
    path = write_capture(tmp_path / "c.h5", prompts, model_fingerprint=info.fingerprint)
    found = plans.profiles_of_sizes(some_profile(info), info, [1, 2, 3], path)
    sims = {phase: measure(path).mean(phase) for phase in ("decode", "prefill")}
    similarity = np.mean([layer_similarity(sim) for sim in sims.values()], axis=0)

    def value(anchors):
        return sum(similarity[max(a for a in anchors if a <= b), b] for b in range(4))

    for size, profile in zip((1, 2, 3), found, strict=True):
        sets = [(0, *rest) for rest in itertools.combinations((1, 2, 3), size - 1)]
        assert value(profile.anchors) == pytest.approx(max(map(value, sets)))
        for layer in set(range(4)) - set(profile.anchors):
            nearest = max(a for a in profile.anchors if a < layer)
            for phase, sim in sims.items():
                assert profile.head_map(layer, phase) == [(nearest, h) for h in head_map(sim, nearest, layer)]
    points = plans.remap_points(Setting(min_keys=4), [0.1], found[1:])
    assert [(p.label, len(p.at["anchors"])) for p in points[1:]] == [
        (name, size) for size in (2, 3) for name in ("kascade", "kascade-pooled", "kascade-no-remap")
    ]
    with pytest.raises(UsageError, match=r"--anchors 5 is outside 1\.\.4"):
        plans.profiles_of_sizes(some_profile(info), info, [5], path)
    other = write_capture(tmp_path / "other.h5", prompts)
    with pytest.raises(KascadeError, match="was captured from another model"):
        plans.profiles_of_sizes(some_profile(info), info, [2], other)
