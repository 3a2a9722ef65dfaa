"""Answers of rows decoded together against those of `model.generate`, one question at a time."""

import numpy as np
import pytest
import torch

from kascade_cli.evaluation.batched import answer_all
from kascade_cli.evaluation.cases import Case, EncodedQuestion
from kascade_cli.integrations.transformers import attach_setting
from kascade_cli.sparse import Setting
from tests.conftest import tiny_model
from tests.evaluation.test_evaluation import some_profile


def questions_of(seed, contexts):
    """Contexts of `contexts` tokens with 1 to 3 questions of odd lengths."""
    rng = np.random.default_rng(seed)
    asked = []
    for length in contexts:
        sizes = rng.integers(1, 41, int(rng.integers(1, 4)))
        new = 11 if length % 2 else 9
        questions = [EncodedQuestion("", rng.integers(3, 64, size).tolist(), (), new) for size in sizes]
        asked.append(Case(rng.integers(3, 64, length).tolist(), questions))
    return asked


def one_by_one(model, asked):
    answers = []
    for case in asked:
        answers.append([])
        for question in case.questions:
            ids = torch.tensor([[*case.context, *question.ids]])
            options = {"max_new_tokens": question.new_tokens, "do_sample": False, "pad_token_id": 0}
            out = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
            answers[-1].append(out[: out.index(2)] if 2 in out else out)
    return answers


@pytest.mark.parametrize("strategy", ["dense", "kascade", "kascade-refresh", "oracle", "streaming-llm", "quest"])
@pytest.mark.parametrize("max_bytes", [None, 200_000])
def test_rows_of_different_lengths_answer_as_alone(strategy, max_bytes):
    from kascade_cli.models import describe

    model = tiny_model("llama")
    info = describe(model, "tiny")
    profile = some_profile(info, anchors=[0, 2], ratio=0.2, min_keys=8)
    asked = questions_of(1, (161, 97, 33, 200, 65))
    read = []
    with attach_setting(model, Setting(strategy, profile, ratio=0.2, min_keys=8)):
        found = answer_all(model, asked, tile=32, max_bytes=max_bytes, advance=read.append)
        want = one_by_one(model, asked)
    assert found == want
    assert read == list(range(len(asked)))
    assert len({tuple(answer) for answers in found for answer in answers}) > 3


@pytest.mark.parametrize("kind", ["gemma3", "qwen2"])
def test_models_with_other_caches_answer_context_by_context(kind):
    model = tiny_model(kind)
    asked = questions_of(2, (97, 31, 130))
    with attach_setting(model, Setting("oracle", ratio=0.2, min_keys=8)):
        assert answer_all(model, asked, tile=32) == one_by_one(model, asked)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_context_is_read_once(kind, monkeypatch):
    model = tiny_model(kind)
    asked = questions_of(3, (97, 130))
    genuine, widths = model.forward, []

    def counted(input_ids, *args, **options):
        widths.append(input_ids.shape[1])
        return genuine(input_ids, *args, **options)

    monkeypatch.setattr(model, "forward", counted)
    with attach_setting(model, Setting("oracle", ratio=0.2, min_keys=8)):
        answer_all(model, asked, tile=32)
    assert sum(width == 96 for width in widths) == 1
    assert sum(width == 128 for width in widths) == 1


@pytest.mark.parametrize("strategy", ["dense", "kascade", "kascade-refresh", "quest"])
def test_the_static_loop_answers_the_same(strategy, monkeypatch):
    """What runs on a GPU, here without graphs: padded rows on a static cache, and context by context."""
    from kascade_cli.evaluation.answers import greedy_answers
    from kascade_cli.integrations.transformers.decoding import decoder
    from kascade_cli.models import describe

    monkeypatch.setattr(decoder, "EVERYWHERE", True)
    model = tiny_model("llama", seed=2)
    profile = some_profile(describe(model, "tiny"), anchors=[0, 2], ratio=0.2, min_keys=8)
    asked = questions_of(3, (161, 97, 200, 65))
    with attach_setting(model, Setting(strategy, profile, ratio=0.2, min_keys=8)) as run:
        found = answer_all(model, asked, tile=32)
        assert run.decoder.runner is not None
        want = one_by_one(model, asked)
        case = asked[0]
        ids, new = [question.ids for question in case.questions], [question.new_tokens for question in case.questions]
        alone = greedy_answers(model, case.context, ids, new, tile=32)
    assert found == want
    assert alone == want[0]
