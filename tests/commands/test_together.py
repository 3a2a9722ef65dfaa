"""What the commands do in several processes before there is work to share."""

from types import SimpleNamespace

import pytest
import torch

from kascade_cli.commands import selection_steps as steps
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.evaluation import session
from kascade_cli.evaluation.session import Verification
from kascade_cli.models.placement import placement, resolve_device
from kascade_cli.processes import Ended
from kascade_cli.processes import team as current
from tests.teams import run_team

SEARCH = SimpleNamespace(
    measured=SimpleNamespace(meta={"model_name": "demo-small"}), settings=SimpleNamespace(phases=["decode"])
)


def verify(team, wanted=False):
    if not team.leader:
        return steps.follow(team, Verification())
    return steps.open_session(SEARCH, Verification(), wanted)


def test_where_no_process_has_the_model_all_go_on_without(monkeypatch):
    def fails(*_):
        raise KascadeError("no weights")

    monkeypatch.setattr(session, "load_session", fails)
    assert run_team(3, verify) == [None, None, None]
    found = run_team(2, lambda team: verify(team, wanted=True))
    assert str(found[0]) == "no weights"


def test_a_process_that_alone_cannot_load_it_stops_all(monkeypatch):
    def load(*_):
        if not current().leader:
            raise KascadeError("no memory")
        return SimpleNamespace(choose_prompts=lambda: [current().pause() for _ in iter(int, 1)])

    monkeypatch.setattr(session, "load_session", load)
    found = run_team(2, verify)
    assert isinstance(found[0], Ended)
    assert str(found[0]) == "process 1: no memory"
    assert found[1].code == 1


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    found = run_team(2, lambda team: [resolve_device(name) for name in ("auto", "cuda", "cpu")])
    assert found == [[torch.device("cuda", rank)] * 2 + [torch.device("cpu")] for rank in (0, 1)]
    assert sorted(used) == [0, 0, 1, 1]
    assert resolve_device("auto") == torch.device("cuda")  # one process: as before

    def waits(team):
        resolve_device("auto")
        while team.leader:
            team.pause()

    found = run_team(3, waits)
    assert "process 2 has no GPU of its own (2 on this host)" in str(found[0])
    # A launcher may show each process one GPU.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert run_team(2, lambda team: resolve_device("auto")) == [torch.device("cuda", 0)] * 2


def test_a_model_is_not_spread_over_gpus_that_others_use():
    def work(team):
        with pytest.raises(UsageError, match="--device-map auto spreads one model over all GPUs: run one process"):
            placement("auto", "auto")

    assert run_team(2, work) == [None, None]
