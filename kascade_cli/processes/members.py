"""How the processes of one command talk, share work, and learn that one has ended. No torch on import."""

import contextlib
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from kascade_cli.errors import KascadeError, UsageError, plain
from kascade_cli.processes.place import ADVICE, Place, host, running

T = TypeVar("T")
START = 120.0  # seconds for all processes to come
SILENT = 60.0  # seconds without a sign of life after which a process of another host counts as ended
_BEAT, _LOOK, _POLL = 1.0, 0.5, 0.02
_GO = 10.0  # seconds that a process may take to end once it is told
_PIECE = 4 << 20  # bytes of a value that go into the store at once: it takes 8 MiB, and drops who sends more


class Ended(KascadeError):
    """Another process ended or failed, or this one was told to stop."""


class Over(BaseException):
    """The leader has ended: nothing is left to do here. Never seen outside of `together`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Team:
    """The processes of one command. Made by `together`."""

    def __init__(self, place: Place, store: Any) -> None:
        self.rank, self.size, self.local_rank = place.rank, place.size, place.local
        self._hosts_store = place.rank == 0 and not place.agent
        self._store, self._others = store, [rank for rank in range(place.size) if rank != place.rank]
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._cards: dict[int, tuple[str, int]] = {}
        self._looked, self._received, self._handed = 0.0, 0, 0
        self._heart = threading.Event()
        self._told: Ended | None = None

    @property
    def leader(self) -> bool:
        return self.rank == 0

    # -- the store --

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, name)(*arguments)
        except RuntimeError as error:  # what every error of the store is: its keeper is gone
            raise Ended("process 0 ended" if not self.leader else "the launcher ended") from error

    def _put(self, key: str, value: Any) -> None:
        """The rest of a large value comes first, so that it is whole once its key is there."""
        pickled = pickle.dumps(value)
        first, *rest = [pickled[start : start + _PIECE] for start in range(0, len(pickled), _PIECE)]
        for index, piece in enumerate(rest):
            self._call("set", f"kascade/{key}/{index}", piece)
        self._call("set", f"kascade/{key}", len(rest).to_bytes(4) + first)

    def _has(self, key: str) -> bool:
        return self._call("check", [f"kascade/{key}"])

    def _get(self, key: str, drop: bool = False) -> Any:
        """The value of a key that is there; `drop`: it goes."""
        first = self._call("get", f"kascade/{key}")
        names = [f"kascade/{key}", *(f"kascade/{key}/{index}" for index in range(int.from_bytes(first[:4])))]
        value = pickle.loads(b"".join([first[4:], *(self._call("get", name) for name in names[1:])]))
        for name in names if drop else ():
            self._call("delete_key", name)
        return value

    def _await(self, key: str) -> Any:
        while not self._has(key):
            self.pause()
        return self._get(key)

    # -- to come, to go --

    def come(self) -> None:
        """All processes are there when this returns. Raises UsageError for two of one rank, or if one is missing."""
        if self._call("add", f"kascade/came/{self.rank}", 1) > 1:
            raise UsageError(f"two processes have RANK={self.rank}: {ADVICE}")
        self._put(f"card/{self.rank}", (host(), os.getpid()))
        until = time.monotonic() + START
        for rank in self._others:
            while not self._has(f"card/{rank}"):
                if time.monotonic() > until:
                    there = 1 + sum(self._has(f"card/{other}") for other in self._others)
                    raise UsageError(f"{there} of WORLD_SIZE={self.size} processes came: {ADVICE}; or unset it")
                time.sleep(_POLL)
            self._cards[rank] = self._get(f"card/{rank}")
        threading.Thread(target=self._live, args=(self._store.clone(),), daemon=True).start()

    def _live(self, store: Any) -> None:
        beat = 0
        with contextlib.suppress(Exception):  # the store's keeper is gone, which the main thread finds out as well
            while not self._heart.wait(_BEAT):
                beat += 1
                store.set(f"kascade/beat/{self.rank}", str(beat))

    def alive(self, rank: int) -> bool:
        """Whether process `rank` is there: by its number on this host, elsewhere by its signs of life."""
        where, number = self._cards[rank]
        if where == host():
            return running(number)
        key = f"kascade/beat/{rank}"
        beat = self._call("get", key) if self._call("check", [key]) else b""
        before, since = self._beats.get(rank, (None, 0.0))
        if beat != before:
            self._beats[rank] = beat, time.monotonic()
            return True
        return time.monotonic() - since < SILENT

    def check(self) -> None:
        """Called now and then. Raises Ended where another process ended or failed, Over once the leader is through."""
        if self._told:
            raise self._told
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        self._looked = now
        if not self.leader:
            if self._has("over"):
                raise Over(self._get("over"))
            if not self.alive(0):
                raise Ended("process 0 ended")
            return
        for rank in self._others:
            if self._has(f"failed/{rank}"):
                raise Ended(f"process {rank}: {self._get(f'failed/{rank}')}")
            if not self._has(f"gone/{rank}") and not self.alive(rank):
                raise Ended(f"process {rank} ended")

    def pause(self) -> None:
        """Waits a moment for the others. Raises as `check` does."""
        self.check()
        time.sleep(_POLL)

    def stop(self, *_: Any) -> None:
        """The launcher's signal: it stops everyone when one process ends."""
        gone = [rank for rank, (where, number) in self._cards.items() if where == host() and not running(number)]
        self._told = Ended(f"process {gone[0]} ended" if gone else "told to stop (SIGTERM)")
        raise self._told

    def end(self, code: int) -> None:
        """The leader is through: tells the others, and waits for them where their store would go with it."""
        self.halt(code, _GO if self._hosts_store else 0.0)

    def halt(self, code: int, seconds: float = _GO) -> None:
        """The leader stops the others, and waits until they have ended, but not for ever."""
        with contextlib.suppress(Ended):
            if not self._has("over"):
                self._put("over", code)
            until = time.monotonic() + seconds
            for rank in self._others:
                while time.monotonic() < until and not self._has(f"gone/{rank}") and self.alive(rank):
                    time.sleep(_POLL)

    def leave(self) -> None:
        """Any other process is through."""
        with contextlib.suppress(Ended):
            self._put(f"gone/{self.rank}", True)

    def complain(self, text: str) -> int:
        """A follower failed: has the leader say so, and waits until it has. Says it itself where there is no leader.

        Returns the exit code.
        """
        with contextlib.suppress(Ended):
            self._put(f"failed/{self.rank}", text)
            while self.alive(0):
                if self._has("over"):
                    return max(1, self._get("over"))
                time.sleep(_POLL)
        if self.speaks():
            print(f"error: {plain(text)}", file=sys.stderr, flush=True)
        return 1

    def speaks(self) -> bool:
        """Whether it is for this follower to say why all of them end: the leader never came, or is gone."""
        with contextlib.suppress(Ended):
            there = self._has("card/0")
            if there and (0 not in self._cards or self.alive(0)):
                return False
            return self._call("add", "kascade/said", 1) == 1
        return True

    def close(self) -> None:
        self._heart.set()

    # -- to share work --

    def from_leader(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives in the leader, where alone it runs; in every process, each `name` once."""
        if not self.leader:
            return self._await(f"value/{name}")
        value = make()
        self._put(f"value/{name}", value)
        return value

    def claims(self, name: str, count: int) -> Iterator[int]:
        """Numbers below `count` that no other process gets, one at a time: whoever is free takes the next."""
        while (number := self._call("add", f"kascade/claim/{name}", 1) - 1) < count:
            yield number

    def send(self, value: Any) -> None:
        """To the leader."""
        number = self._call("add", "kascade/inbox", 1)
        self._put(f"inbox/{number}", (self.rank, value))

    def receive(self) -> list[tuple[int, Any]]:
        """(rank, value) of what was sent since the last call; empty if nothing was. Raises as `check` does."""
        self.check()
        found = []
        while self._has(f"inbox/{self._received + 1}"):
            self._received += 1
            found.append(self._get(f"inbox/{self._received}", drop=True))
        return found

    def hand_out(self, task: Any) -> None:
        """To every other process, whose `tasks` gives it."""
        self._handed += 1
        self._put(f"task/{self._handed}", task)

    def tasks(self) -> Iterator[Any]:
        """What the leader hands out, in order, until it is through (Over)."""
        while True:
            self._handed += 1
            yield self._await(f"task/{self._handed}")
