"""What a verification needs before it can start."""

from types import SimpleNamespace

import pytest
import torch

from kascade_cli.devset import DevSet, ids_sha256
from kascade_cli.errors import KascadeError
from kascade_cli.evaluation import session
from kascade_cli.evaluation.session import Verification


def test_a_prompt_too_short_names_the_option_that_helps():
    long, short = list(range(3, 80)), [3, 4, 5]
    devset = DevSet("toy", "", [long, short], 0, 80, [[(40, 44)], [(2, 3)]], [[], []])
    with pytest.raises(KascadeError) as error:
        session._check_lengths(devset, ("decode", "prefill"))
    assert str(error.value) == "a held-out prompt of 3 tokens is too short to verify on: raise --verify-length"
    session._check_lengths(devset, ("prefill",))


def test_a_model_is_here_if_it_is_a_path_or_in_the_cache(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names, **_: asked.append(names))
    for name in ("demo", str(tmp_path)):
        assert Verification().missing({"model_name": name}) is None
    for name in ("org/model", "no name at all", "/nowhere"):
        assert Verification().missing({"model_name": name}) == f"model {name} is not on this machine"
    assert Verification(model="demo").missing({"model_name": "/nowhere"}) is None
    assert ("org/model", "config.json") in asked
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    assert Verification().missing({"model_name": "org/model"}) is None


@pytest.mark.parametrize(("source", "passed"), [("hops", (None, None)), ("notes.jsonl", ("body", True))])
def test_options_of_the_captured_texts_are_not_those_of_a_built_in_task(monkeypatch, tmp_path, source, passed):
    seen = {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.jsonl").write_text("{}")
    monkeypatch.setattr("kascade_cli.devset.load_devset", lambda *_, **options: seen.update(options))
    meta = {"seed": 3, "options": {"text_field": "body", "chat_template": True}}
    session.held_out_prompts(meta, None, source, num_prompts=2, max_length=64)
    assert (seen["text_field"], seen["chat_template"]) == passed
    assert (seen["seed"], seen["held_out"]) == (3, True)


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ([2, 1, 4, 9, 9, 9], [0, 1, 2]),  # all of the first three
        ([2, 0, 4, 0, 1, 9], [0, 2, 4]),
        ([0, 0, 3, 0, 0, 0], [2]),
        ([0, 0, 0, 0, 0, 0], [0, 1, 2]),  # dense answers nothing: said elsewhere, and all of them are taken
        ([None, 0, 2, 5, 0, 0], [0, 2, 3]),  # the first asks nothing
    ],
)
def test_prompts_that_dense_cannot_answer_are_passed_over(monkeypatch, given, chosen):
    prompts = [[number] * 5 for number in range(6)]
    spans = [[] if count is None else [(3, 5)] for count in given]
    whole = DevSet("d", "0", prompts, 0, 5, spans, spans)
    cpu = sized("cpu", 1000)
    info, meta = SimpleNamespace(max_positions=None), {"max_length": 5}
    asked = session.Session(cpu, None, info, "m", None, ["prefill"], Verification(prompts=3), meta)
    monkeypatch.setattr(asked, "held_out", lambda length, prompts=None, lengths=None: whole.take(range(prompts or 3)))
    monkeypatch.setattr(asked, "dense", lambda devset, prompt: SimpleNamespace(given=given[devset.prompts[prompt][0]]))
    found = asked.answerable(5)
    assert found.prompts == [prompts[number] for number in chosen]
    assert found.sha256 == ids_sha256(*found.prompts)


def sized(device, parameters):
    """A model of so many parameters, without their memory."""
    numbers = torch.empty(parameters, device="meta")
    return SimpleNamespace(device=SimpleNamespace(type=device), parameters=lambda: iter([numbers]))


@pytest.mark.parametrize(
    ("device", "parameters", "options", "wanted"),
    [
        ("cpu", 7_600_000, {}, (8, [2048], 0)),
        ("cpu", 300_000_000, {}, (6, [2048], 0)),  # ten minutes on two cores
        ("cpu", 8_000_000_000, {}, (4, [2048], 0)),  # the fewest
        ("cuda", 8_000_000_000, {}, (24, [16384, 4096, 8192], 24)),
        ("cuda", 1, {"prompts": 5}, (5, [16384, 4096, 8192], 0)),
        ("cuda", 1, {"max_length": 3000}, (24, [3000], 24)),
        ("cpu", 8_000_000_000, {"max_length": 3000, "prompts": 1}, (1, [3000], 0)),
    ],
)
def test_what_a_kind_of_machine_affords(device, parameters, options, wanted, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    model = sized(device, parameters)
    info, meta = SimpleNamespace(max_positions=40_000), {"max_length": 30_000}
    found = session.Session(model, None, info, "m", None, ["prefill"], Verification(**options), meta).effort
    assert (found.prompts, found.lengths, found.again) == wanted


def test_never_longer_than_the_capture_or_the_model():
    model = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    for limit, meta, wanted in ((None, 6000, [6000, 1500, 3000]), (4000, 6000, [4000, 1024, 2000])):
        info = SimpleNamespace(max_positions=limit)
        found = session.Session(model, None, info, "m", None, ["prefill"], Verification(), {"max_length": meta})
        assert found.effort.lengths == wanted
