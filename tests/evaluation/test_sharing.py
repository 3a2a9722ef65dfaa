"""Verification and evaluation by several processes give what one process gives."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from kascade_cli.devset import DevSet
from kascade_cli.errors import KascadeError
from kascade_cli.evaluation import answering, batched, forced
from kascade_cli.evaluation.cases import Case, EncodedQuestion
from kascade_cli.evaluation.journal import Journal
from kascade_cli.evaluation.run import Run, run_cases
from kascade_cli.evaluation.session import Session, Verification
from kascade_cli.evaluation.sharing import even, follow
from kascade_cli.models import describe
from kascade_cli.sparse import Setting
from tests.integrations.transformers.naive import some_profile
from tests.teams import run_team

PROMPTS = [[3 + (7 * number + 11 * place) % 60 for place in range(90 + number)] for number in range(5)]
ANSWERS = [[(80, 82), (88, 90)], [], [(85, 87)], [(70, 72)], []]
DEVSET = DevSet("toy", "0", PROMPTS, 0, 100, ANSWERS, ANSWERS)
MAKING = threading.Lock()  # seeds are the process's, and threads stand for processes here


@pytest.fixture
def make(make_tiny_model):
    def model():
        with MAKING:
            return make_tiny_model("llama")

    return model


def session_of(model):
    info = describe(model, "tiny")
    meta = {"max_length": 100}
    return Session(model, None, info, "tiny", DEVSET, ["prefill"], Verification(backend="torch"), meta)


def profiles_of(model):
    info = describe(model, "tiny")
    kept = {"ratio": 0.1, "min_keys": 4}
    found = [some_profile(info, anchors=anchors, **kept) for anchors in ([0], [0, 1], [0, 2], [0, 1, 2])]
    return [(str(number), profile) for number, profile in enumerate([*found, found[1]])]


@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 3), (7, 3), (6, 2), (2, 5)])
def test_shares_are_even_and_in_order(count, size):
    shares = even(range(count), size)
    assert [item for share in shares for item in share] == list(range(count))
    assert len(shares) == size
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("size", [3])
def test_a_verification_measures_what_one_process_measures(make, tmp_path, monkeypatch, size):
    model, told, here = make(), [], []
    alone = session_of(model).runs()
    want = [alone.measure(profiles_of(model), prompt) for prompt in range(len(PROMPTS))]
    real = forced.DensePrompt.compare
    monkeypatch.setattr(
        forced.DensePrompt, "compare", lambda *a, **o: here.append(threading.get_ident()) or real(*a, **o)
    )

    def work(team):
        session = session_of(make())
        if not team.leader:
            follow(team, session)
        journal = Journal(tmp_path / "journal", {}, print)
        runs = session.runs(journal, lambda *run: told.append(run))
        profiles = profiles_of(session.model)
        found = [runs.measure(profiles, prompt, range(prompt + 1, 3)) for prompt in range(3)]
        assert len(journal) == 3 * 4
        return found + [runs.measure(profiles, prompt) for prompt in (3, 4)]

    found = run_team(size, work)
    assert found[0] == want
    assert [other.code for other in found[1:]] == [0] * (size - 1)
    assert len(told) == 5 * 4  # each run once, the one that comes twice too
    by = [here.count(thread) for thread in set(here)]
    assert len(by) == size
    assert sum(by) >= 5 * 4  # and the short runs that prove what may be shared
    again = session_of(model).runs(Journal(tmp_path / "journal", {}, print))
    assert [again.measure(profiles_of(model), prompt) for prompt in range(len(PROMPTS))] == want


def test_prompts_that_dense_answers_are_found_together(make, monkeypatch):
    monkeypatch.setattr(Session, "held_out", lambda self, length, count, lengths: DEVSET.take(range(min(count, 5))))

    def work(team=None):
        session = session_of(make())
        session.options = replace(session.options, prompts=3)
        if team and not team.leader:
            follow(team, session)
        return session.answerable(100).prompts

    assert run_team(2, work)[0] == work()


def test_a_failure_in_another_process_says_what_is_kept(make, tmp_path, monkeypatch):
    real = forced.DensePrompt.compare
    leaders = []

    def fails(*arguments, **options):
        if threading.get_ident() not in leaders:
            raise KascadeError("no memory")
        return real(*arguments, **options)

    monkeypatch.setattr(forced.DensePrompt, "compare", fails)

    def work(team):
        session = session_of(make())
        if not team.leader:
            follow(team, session)
        leaders.append(threading.get_ident())
        runs = session.runs(Journal(tmp_path / "journal", {}, print))
        runs.measure(profiles_of(session.model), 0, [1])

    found = run_team(2, work)
    assert "process 1: no memory; " in str(found[0])
    assert "runs are kept in" in str(found[0])
    assert found[1].code == 1


CASES = [
    Case(
        [3 + (5 * number + 13 * place) % 60 for place in range(66 + number)],
        [EncodedQuestion("a", [9, 8 + number], ("x",), 3), EncodedQuestion("b", [5] * (1 + number), ("y",), 5)],
    )
    for number in range(5)
]


@pytest.mark.parametrize(("strategy", "size"), [("dense", 2), ("kascade", 3), ("kascade", 6)])
def test_an_evaluation_scores_what_one_process_scores(make, monkeypatch, size, strategy):
    monkeypatch.setattr("kascade_cli.evaluation.run.score_question", lambda _, tokens, question: hash(tuple(tokens)))
    monkeypatch.setattr("kascade_cli.evaluation.batched._TOGETHER", 3)
    cases = [replace(case, questions=[replace(one, new_tokens=4) for one in case.questions]) for case in CASES]
    together, finish = [], batched._finish

    def note(model, rows, answers):  # in 16 bits a row's logits depend on those beside it
        together.append(tuple(row.tokens for row in rows))
        finish(model, rows, answers)

    monkeypatch.setattr(batched, "_finish", note)
    model = make()
    profile = some_profile(describe(model, "tiny"), ratio=0.1, min_keys=4)
    run = Run(strategy, (Setting(strategy, profile, backend="torch"),))
    want, read = run_cases(model, None, cases, run), []
    alone, together[:] = sorted(together), []

    def work(team):
        mine = make()
        if not team.leader:
            answering.follow_answers(team, mine)
        return run_cases(mine, None, cases, run, team=team, advance=read.append)

    found = run_team(size, work)[0]
    assert np.array_equal(found.right, want.right)
    assert found.density == want.density
    assert (found.budget, found.backend, found.head_maps) == (want.budget, want.backend, want.head_maps)
    assert sorted(read) == sorted(case.tokens for case in CASES)
    assert sorted(together) == alone
    assert sorted(map(len, alone)) == [2, 4, 4]  # of three groups of cases


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_shares_are_made_of_the_groups_that_one_process_makes(size):
    rng = np.random.default_rng(size)
    cases = [Case([1], [EncodedQuestion("", [1], (), 1)] * int(count)) for count in rng.integers(1, 6, 23)]
    names = {id(case): number for number, case in enumerate(cases)}

    def groups(some):
        return [[names[id(some[place])] for place in group] for group in batched.grouped(some)]

    whole = groups(cases)
    assert sorted(place for group in whole for place in group) == list(range(23))
    shares = [[cases[place] for group in whole[rank::size] for place in group] for rank in range(size)]
    assert sorted(group for share in shares for group in groups(share)) == whole


def test_a_process_that_has_no_gradients_switched_off_keeps_no_graph(make):
    prompt = forced.DensePrompt(make(), DEVSET.prompts[0], DEVSET.answers[0], ["decode", "prefill"])
    assert not prompt.logs.requires_grad
