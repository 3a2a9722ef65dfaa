"""Processes of one command: they meet, share work and end together."""

import socket
import threading
import time

import pytest

from kascade_cli import processes
from kascade_cli.app import main
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.processes import Ended, place, together
from tests.teams import environment, free_port, run_team


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "2"}, "RANK=2 is none of WORLD_SIZE=2 processes"),
        ({"RANK": "one"}, "RANK=one is no whole number"),
        ({"RANK": ""}, "WORLD_SIZE is set and RANK is not"),
        ({"WORLD_SIZE": "0"}, "RANK=1 is none of WORLD_SIZE=0 processes"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 is none of"),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE is set and MASTER_ADDR is not"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
    ],
)
def test_variables_that_make_no_sense_are_one_line(changes, message):
    with pytest.raises(UsageError, match=message) as found:
        place(environment(1, 2, 29500) | changes)
    assert "torchrun" in str(found.value)
    assert "\n" not in str(found.value)


def test_a_command_says_so_in_one_line(monkeypatch, capsys):
    for name, value in environment(5, 2, 29500).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["profile", "demo-small"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("error: RANK=5 is none of WORLD_SIZE=2 processes: start them with torchrun")
    assert err.count("\n") == 1


def test_a_rank_without_a_number_of_processes_is_refused():
    with pytest.raises(UsageError, match="RANK is set and WORLD_SIZE is not.* or unset RANK"):
        place({"RANK": "1"})


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_one_process_is_no_team(variables):
    with together(variables) as found:
        assert found is None
        assert processes.team() is None


def test_work_is_shared_and_nothing_is_done_twice():
    def work(team):
        assert processes.team() is team
        told = team.from_leader("word", lambda: {"from": team.rank})
        mine = []
        for number in team.claims("items", 50):
            mine.append(number)
            time.sleep(0.001 * team.rank)
        if not team.leader:
            team.send((told, mine))
            for task in team.tasks():  # ends when the leader is through
                team.send(task + team.rank)
        sent = []
        while len(sent) < team.size - 1:
            sent += team.receive()
        team.hand_out(100)
        answers = []
        while len(answers) < team.size - 1:
            answers += team.receive()
        return mine, sent, sorted(answers)

    (mine, sent, answers), *others = run_team(3, work)
    assert sorted(mine + [number for _, (_, numbers) in sent for number in numbers]) == list(range(50))
    assert {rank for rank, _ in sent} == {1, 2}
    assert all(told == {"from": 0} for _, (told, _) in sent)
    assert answers == [(1, 101), (2, 102)]
    assert all(isinstance(other, SystemExit) and other.code == 0 for other in others)


@pytest.mark.parametrize("size", [(4 << 20) - 200, 8 << 20, (9 << 20) + 1])
def test_values_may_be_larger_than_the_store_takes_at_once(size):
    def work(team):
        value = team.from_leader("prompts", lambda: b"ab" * (size // 2))
        if team.leader:
            team.hand_out(value[::-1])
            received = []
            while len(received) < 2:
                received += team.receive()
                team.pause()
            # What has been received is gone, so that the store does not grow with what is sent.
            left = [key for key in ("inbox/1", "inbox/1/0", "inbox/2/0") if team._store.check([f"kascade/{key}"])]
            return [value for _, value in received], left
        team.send(value)
        team.send(next(team.tasks()))
        return value

    (received, left), value = run_team(2, work)
    assert value == b"ab" * (size // 2)
    assert received == [value, value[::-1]]
    assert left == []


def waits_for_ever(team):
    while True:
        team.pause()


@pytest.mark.parametrize("failing", [0, 2])
def test_one_failure_is_one_line_and_ends_all(failing, capfd):
    def work(team):
        if team.rank == failing:
            raise KascadeError("something is wrong: mend it")
        waits_for_ever(team)

    found = run_team(3, work)
    assert isinstance(found[0], KascadeError)
    assert str(found[0]) == ("process 2: " if failing else "") + "something is wrong: mend it"
    assert isinstance(found[0], Ended) == bool(failing)
    assert [error.code for error in found[1:]] == [1, 1]
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")  # the leader's error is printed by whoever catches it


def test_a_process_that_does_not_come(monkeypatch):
    monkeypatch.setattr("kascade_cli.processes.members.START", 0.3)
    with pytest.raises(UsageError, match="1 of WORLD_SIZE=2 processes came"), together(environment(0, 2, free_port())):
        pass


def test_two_processes_of_one_rank():
    port, found = free_port(), []

    def come(rank):
        try:
            with together(environment(rank, 3, port)):
                pass
        except BaseException as error:
            found.append(error)

    for rank in (0, 1):
        threading.Thread(target=come, args=(rank,), daemon=True).start()
    time.sleep(0.5)
    with pytest.raises(SystemExit) as ended, together(environment(1, 3, port)):
        pass
    assert ended.value.code == 2 or "two processes have RANK=1" in str(ended.value)


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(KascadeError, match=f"cannot listen at.*MASTER_PORT={port}"),
            together(environment(0, 2, port)),
        ):
            pass


@pytest.mark.parametrize(("rank", "said"), [(0, 1), (1, 0)])
def test_a_command_that_shares_nothing_says_so_once(rank, said, monkeypatch, capsys):
    for name, value in environment(rank, 3, 29500).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "demo-small", "--prompt", "x", "--strategy", "dense"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.count("error: this command runs in one process, and 3 were started") == said
    assert bool(err) == bool(said)


def test_a_silent_process_of_another_host_counts_as_ended(monkeypatch):
    for name, seconds in {"SILENT": 0.6, "_BEAT": 0.05, "_LOOK": 0.02}.items():
        monkeypatch.setattr(f"kascade_cli.processes.members.{name}", seconds)
    quiet, over = threading.Event(), threading.Event()

    def work(team):
        if not team.leader:
            quiet.wait(10)
            team.close()  # no sign of life from here on
            over.wait(10)
            return
        team._cards[1] = ("elsewhere", 1)
        began = time.monotonic()
        while time.monotonic() - began < 1.2:  # longer than SILENT, and alive
            team.pause()
        quiet.set()
        try:
            waits_for_ever(team)
        finally:
            over.set()

    assert str(run_team(2, work)[0]) == "process 1 ended"
