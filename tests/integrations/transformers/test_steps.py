"""Decode steps run together give what the same steps give one by one, and count the same keys."""

import pytest
import torch

from kascade_cli import attach
from kascade_cli.errors import KascadeError
from kascade_cli.evaluation.behind import logits_behind
from kascade_cli.models import describe
from kascade_cli.sparse import known_strategies

from .naive import some_profile
from .test_attach import ids_of as token_list


def ids_of(length, seed=0):
    return torch.tensor([token_list(length, seed)])


STEPWISE = {"kascade-refresh"}


@pytest.fixture(scope="module")
def llama(make_tiny_model):
    model = make_tiny_model("llama")
    return model, some_profile(describe(model))


@torch.no_grad()
def decoded(model, ids, split, attachment, together):
    _, output = logits_behind(model, ids[:, :split], None, 0)
    attachment.reset()
    cache, rows = output.past_key_values, []
    if together:
        with attachment.steps_together():
            rows.append(logits_behind(model, ids[:, split:], cache, split, ids.shape[1] - split)[0])
    else:
        for at in range(split, ids.shape[1]):
            logits, output = logits_behind(model, ids[:, at : at + 1], cache, at)
            cache = output.past_key_values
            rows.append(logits)
    return torch.cat(rows, 1)


@pytest.mark.parametrize("strategy", sorted(set(known_strategies()) - STEPWISE))
@pytest.mark.parametrize("split", [1, 40, 97])
def test_like_steps_one_by_one(llama, strategy, split):
    model, profile = llama
    ids = ids_of(split + 11, seed=split)
    found = {}
    for together in (False, True):
        with attach(model, profile, strategy=strategy, ratio=0.2, min_keys=4) as attachment:
            found[together] = decoded(model, ids, split, attachment, together), attachment.report()
    torch.testing.assert_close(found[True][0], found[False][0])
    for count in ("keys_read", "keys_visible"):
        assert found[True][1][count] == pytest.approx(found[False][1][count])


def test_what_is_carried_from_step_to_step_is_refused(llama):
    model, profile = llama
    with (
        attach(model, profile, strategy="kascade-refresh") as attachment,
        pytest.raises(KascadeError, match="its steps run one by one"),
        attachment.steps_together(),
    ):
        raise AssertionError


def test_one_sequence(llama):
    model, profile = llama
    ids = ids_of(40, seed=1).expand(2, -1)
    with torch.no_grad(), attach(model, profile) as attachment:
        cache = logits_behind(model, ids[:, :30], None, 0)[1].past_key_values
        with attachment.steps_together(), pytest.raises(KascadeError, match="one sequence at a time"):
            logits_behind(model, ids[:, 30:], cache, 30)
