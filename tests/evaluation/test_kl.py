"""KL and answers of a profile equal those computed by hand from the logits of separate runs."""

import pytest
import torch

from kascade_cli import attach
from kascade_cli.errors import KascadeError
from kascade_cli.evaluation.forced import DensePrompt, PromptKL, split_positions
from kascade_cli.evaluation.kl import MeanKL, measure_kl
from kascade_cli.models import describe
from kascade_cli.schema import Budget, Profile
from kascade_cli.sparse import Setting

BOTH = ("decode", "prefill")


def profile_for(model, anchors, ratio=0.1, min_keys=4, tile=8):
    info = describe(model, "toy")
    reuse = [layer for layer in info.profiled_layers if layer not in anchors]
    maps = {layer: {"decode": [1, 0], "prefill": [0, 0]} for layer in reuse}
    budget = Budget(ratio=ratio, min_keys=min_keys, tile=tile)
    return Profile.build(
        model=info.card, anchors=anchors, profiled_layers=info.profiled_layers, head_maps=maps, budget=budget
    )


def prompt_of(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (length,), generator=generator).tolist()


def by_hand(dense, sparse):
    p = dense.double().softmax(-1)
    return float((p * (p.log() - sparse.double().softmax(-1).log())).sum(-1).mean())


@pytest.fixture(scope="module")
def llama(make_tiny_model):
    return make_tiny_model("llama")


@torch.no_grad()
def sparse_logits(model, profile, ids, split, stop):
    """Logits at 0..stop-1: `split` tokens prefilled, the others decoded; with `split` None a dense prefill."""
    tokens = torch.tensor([ids])
    with attach(model, profile):
        output = model(tokens[:, :split], use_cache=True)
        rows, cache = [output.logits[0]], output.past_key_values
        for i in range(split, stop):
            rows.append(model(tokens[:, i : i + 1], past_key_values=cache).logits[0])
    return torch.cat(rows)


@torch.no_grad()
@pytest.mark.parametrize("phases", [("decode",), ("prefill",), BOTH])
def test_kl_by_hand(llama, phases):
    ids, answers = prompt_of(91), [(41, 43), (71, 72), (80, 86)]
    profile = profile_for(llama, [0, 2])
    found = measure_kl(llama, [profile], [ids], [answers], phases)[0]
    tokens, split = torch.tensor([ids]), 91 if phases == ("prefill",) else 80
    dense = llama(tokens).logits[0]
    wanted = {}
    if phases == ("decode",):
        cache = llama(tokens[:, :split], use_cache=True).past_key_values
        with attach(llama, profile):
            steps = [llama(tokens[:, i : i + 1], past_key_values=cache).logits[0, -1] for i in range(split, 85)]
        wanted["decode"] = by_hand(dense[80:85], torch.stack(steps))
    else:
        sparse = sparse_logits(llama, profile, ids, split, 85)
        early = [40, 41, 70, 79, *(range(80, 85) if split == 91 else ())]
        wanted["prefill"] = by_hand(dense[early], sparse[early])
        if "decode" in phases:
            wanted["decode"] = by_hand(dense[80:85], sparse[80:85])
    assert found.kl.keys() == wanted.keys()
    for phase, value in wanted.items():
        assert found.kl[phase] == pytest.approx(value, rel=1e-4)
        assert value > 1e-4  # a sparse run that differs, or the test says nothing


@torch.no_grad()
@pytest.mark.parametrize("anchors", [[0], [0, 2], [0, 1, 2, 3]])
@pytest.mark.parametrize("phases", [("prefill",), BOTH])
def test_answers_by_hand(llama, phases, anchors):
    """Answers that the dense model gives are made by letting it write them; others are random."""
    spans = [(20, 22), (33, 34), (47, 52), (60, 63), (75, 79), (83, 90)]
    tokens = torch.tensor([prompt_of(93, seed=4)])
    for start, stop in (spans[0], spans[1], spans[2], spans[4], spans[5]):
        for place in range(start, stop):
            tokens[0, place] = llama(tokens[:, :place]).logits[0, -1].argmax()
    ids = tokens[0].tolist()
    profile = profile_for(llama, anchors, ratio=0.05, min_keys=2)
    found = measure_kl(llama, [profile], [ids], [spans], phases)[0]
    split = 83 if "decode" in phases else 93
    sparse, dense = sparse_logits(llama, profile, ids, split, 90), llama(tokens).logits[0]

    def right(logits, span):
        return all(int(logits[i - 1].argmax()) == ids[i] for i in range(*span))

    given = [span for span in spans if right(dense, span)]
    assert given == [span for span in spans if span != (60, 63)]
    assert (found.asked, found.given) == (6, 5)
    assert found.kept == sum(right(sparse, span) for span in given)
    if anchors == [0]:
        assert found.kept < 5


@torch.no_grad()
def test_only_answers_that_dense_gives_are_measured(llama):
    spans, ids = [(20, 22), (40, 43), (50, 53), (55, 60)], prompt_of(60, seed=6)
    tokens = torch.tensor([ids])
    for start, stop in (spans[1], spans[3]):
        for place in range(start, stop):
            tokens[0, place] = llama(tokens[:, :place]).logits[0, -1].argmax()
    ids = tokens[0].tolist()
    dense = DensePrompt(llama, ids, spans, BOTH)
    assert (dense.asked, dense.given) == (4, 2)
    assert (dense.positions.prefill, dense.positions.decode) == ([39, 40, 41, 54], [55, 56, 57, 58])
    assert dense.compare(llama, Setting(profile=profile_for(llama, [0, 1], ratio=1.0))).kept == 2
    nothing = DensePrompt(llama, ids, [spans[0], spans[2]], BOTH)
    assert (nothing.asked, nothing.given) == (2, 0)
    assert nothing.positions.measured == [19, 20, 49, 50, 51]  # of a prompt without such answers all are


@torch.no_grad()
def test_with_decode_alone_answers_within_the_dense_prefill_are_not_judged(llama):
    ids = prompt_of(80, seed=5)
    tokens = torch.tensor([ids])
    for place in range(70, 77):
        tokens[0, place] = llama(tokens[:, :place]).logits[0, -1].argmax()
    ids, profile = tokens[0].tolist(), profile_for(llama, [0, 1, 2, 3], ratio=1.0)
    found = measure_kl(llama, [profile], [ids], [[(30, 33), (70, 77)]], ("decode",))[0]
    assert (found.asked, found.given, found.kept) == (1, 1, 1)
    ids[70] = 63 - ids[70]  # its first token is dense's own affair, and dense does not say it
    found = measure_kl(llama, [profile], [ids], [[(30, 33), (70, 77)]], ("decode",))[0]
    assert (found.asked, found.given, found.kept) == (1, 0, 0)


@torch.no_grad()
def test_all_keys_give_no_divergence(llama):
    ids = prompt_of(75)
    every = profile_for(llama, [0, 1], ratio=1.0)
    some = profile_for(llama, [0, 1])
    results = measure_kl(llama, [every, some], [ids], [[]], BOTH, decode_tokens=8)
    assert results[0].score < 1e-6  # the comparison is made in float32
    assert results[1].score > 1e-4


@torch.no_grad()
def test_a_dense_prefill_serves_every_profile_alike(llama):
    """Decoding appends to the cache; the second profile must not see what the first one added."""
    ids, profile = prompt_of(75), profile_for(llama, [0, 2])
    calls = []
    twice = measure_kl(
        llama, [profile, profile], [ids], [[]], ("decode",), decode_tokens=8, advance=lambda: calls.append(1)
    )
    assert twice[0].kl == twice[1].kl
    assert len(calls) == 2


@torch.no_grad()
def test_hybrid_models(make_tiny_model):
    model = make_tiny_model("gemma3")
    profile = profile_for(model, [1])
    result = measure_kl(model, [profile], [prompt_of(60)], [[]], BOTH, decode_tokens=8)[0]
    assert result.kl["decode"] > 0
    assert result.kl["prefill"] > 0


def test_means_over_prompts():
    result = MeanKL()
    for value in (1.0, 2.0, 6.0):
        result.add(PromptKL({"decode": value, "prefill": 2 * value}, asked=4, given=3, kept=int(value) % 3))
    assert result.kl == {"decode": pytest.approx(3.0), "prefill": pytest.approx(6.0)}
    assert result.score == pytest.approx(4.5)
    assert (result.prompts, result.asked, result.given, result.kept) == (3, 12, 9, 3)


@torch.no_grad()
def test_nan_in_a_sparse_run_is_infinitely_wrong_and_no_answer(make_tiny_model, monkeypatch):
    model = make_tiny_model("llama", layers=2)
    tokens = torch.tensor([prompt_of(60)])
    tokens[0, 50] = 0  # argmax of NaN is token 0
    dense = DensePrompt(model, tokens[0].tolist(), [(50, 51)], ("prefill",))
    dense.judged = [(50, 51)]
    monkeypatch.setattr(DensePrompt, "_sparse", lambda self, *_: iter([model(tokens).logits[0, 49:50] * torch.nan]))
    monkeypatch.setattr("kascade_cli.integrations.transformers.report.Tally.check", lambda self: {})
    assert dense.compare(model, Setting("dense")) == PromptKL({"prefill": float("inf")}, 1, 1, 0)


@torch.no_grad()
def test_nan_in_the_dense_model(make_tiny_model):
    model = make_tiny_model("llama", layers=2)
    profile = profile_for(model, [0])
    model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(KascadeError, match="dense model gives NaN"):
        measure_kl(model, [profile], [prompt_of(40)], [[]], ("decode",), decode_tokens=4)


@pytest.mark.parametrize(
    ("answers", "phases", "split", "prefill", "decode"),
    [
        # An answer long enough: divided where it begins, its first token still the prefill's.
        ([(11, 13), (90, 97)], BOTH, 90, [10, 11, 89], list(range(90, 96))),
        ([(11, 13), (90, 97)], ("prefill",), 100, [10, 11, *range(89, 96)], []),
        ([(11, 13), (90, 97)], ("decode",), 90, [], list(range(90, 96))),
        # Answers of two tokens (the demo models): as many of them as 32 steps hold, up to 4 decoded tokens.
        ([(40, 42), (73, 75), (84, 86), (95, 97)], BOTH, 73, [39, 40, 72], [73, 83, 84, 94, 95]),
        ([(40, 42), (95, 97)], BOTH, 95, [39, 40, 94], [95]),
        # Answers of one token: the last steps, as without answers.
        ([(10, 11), (95, 96)], BOTH, 63, [9], [94]),
        ([(50, 51), (75, 76)], BOTH, 50, [49], [74]),
        ([(30, 33)], BOTH, 30, [29], [30, 31]),  # what follows the last answer is not run
        ([], BOTH, 92, list(range(28, 92)), list(range(92, 100))),
    ],
)
def test_positions(answers, phases, split, prefill, decode):
    found = split_positions(100, answers, phases, 8 if not answers else 32)
    assert (found.split, found.prefill, found.decode) == (split, prefill, decode)


@pytest.mark.parametrize(("answers", "phases"), [([(96, 97)], BOTH), ([(0, 1)], ("decode",)), ([], BOTH)])
def test_nothing_to_measure(answers, phases):
    with pytest.raises(KascadeError, match="too short to verify"):
        split_positions(100 if answers else 1, answers, phases, 8)
