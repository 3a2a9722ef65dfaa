"""`evaluate`, `--verify` and `--compare` on models that mix attention with other layers: question by question as
`model.generate` answers, and as full passes without a cache say."""

import pytest
import torch

from kascade_cli import attach
from kascade_cli.evaluation.answers import greedy_answers
from kascade_cli.evaluation.behind import continues_in_chunks
from kascade_cli.evaluation.kl import measure_kl
from kascade_cli.generation import forced_log_probabilities
from kascade_cli.models import describe
from kascade_cli.sparse import Setting
from tests.families import TABLE
from tests.integrations.transformers.naive import Naive, some_profile

KINDS = (
    "jamba", "bamba", "qwen3_next", "lfm2", "zamba2", "minimax", "nemotron_h", "granitemoehybrid", "olmo_hybrid",
    "gemma3_text",
)  # fmt: skip
FAMILIES = {family.kind: family for family in TABLE if family.kind in KINDS and not family.refused}


def ids_of(length, seed=0):
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def generate_alone(model, ids, count):
    mask = torch.ones(1, len(ids), dtype=torch.long)
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return model.generate(torch.tensor([ids]), attention_mask=mask, **options)[0, len(ids) :].tolist()


@pytest.mark.parametrize("kind", FAMILIES)
def test_answers_and_verification(kind):
    model = FAMILIES[kind].build()
    profile = some_profile(describe(model), ratio=0.1, min_keys=4)
    context, questions = ids_of(75, seed=1), [ids_of(size, seed=20 + size) for size in (3, 2, 3, 7)]
    for strategy in ("dense", "kascade", "streaming-llm"):
        with attach(model, profile, strategy=strategy) as attachment:
            got = greedy_answers(model, context, questions, [4, 4, 4, 4], tile=32)
            assert got == [generate_alone(model, context + question, 4) for question in questions], strategy
            assert (attachment.density < 1) == (strategy != "dense")
    ids, more = ids_of(66, seed=2), ids_of(5, seed=3)
    naive = Naive(model, profile, "kascade", [(0, 66), *((i, i + 1) for i in range(66, 70))], 0.1, 4)
    want = naive.logits(ids + more[:4])[65:].log_softmax(-1)
    found = forced_log_probabilities(model, ids, more, Setting("kascade", profile))
    # States are float32 in some; those of nemotron_h's decode steps are its own.
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 if kind != "nemotron_h" else 0.02)
    with torch.no_grad():
        dense = model(torch.tensor([ids + more[:4]]), use_cache=False).logits[0, 66:].log_softmax(-1)
    by_hand = (dense.exp() * (dense - want[1:])).sum(-1).mean()
    whole = ids + more[:4]
    measured = measure_kl(model, [profile], [whole], [[]], ("decode", "prefill"), decode_tokens=4)[0]
    assert measured.kl["decode"] == pytest.approx(float(by_hand), rel=1e-3 if kind != "nemotron_h" else 0.05)


def test_models_whose_recurrent_layers_forget_in_chunks_are_found():
    plain, attached = [], []
    for kind, family in FAMILIES.items():
        model = family.build()
        if not continues_in_chunks(model):
            plain.append(kind)
        with attach(model, strategy="dense"):
            if not continues_in_chunks(model):
                attached.append(kind)
    assert plain == ["jamba", "minimax"]
    assert attached == ["jamba"]
