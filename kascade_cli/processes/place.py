"""Which of the processes of one command this is: what the launcher's variables say, and where process numbers hold."""

import contextlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

from kascade_cli.errors import UsageError, plain

ADVICE = "start them with torchrun or accelerate launch, which set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


@dataclass(frozen=True)
class Place:
    """Which of `size` processes this is; `local` counts within its host."""

    rank: int
    size: int
    local: int
    address: str
    port: int
    agent: bool  # the launcher keeps the store, not process 0


def place(environment: Mapping[str, str]) -> Place | None:
    """What the launcher's variables say; None for one process. Raises UsageError where they make no sense."""
    if environment.get("WORLD_SIZE", "1") == "1" and environment.get("RANK", "0") == "0":
        return None
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            given = "WORLD_SIZE" if "WORLD_SIZE" in environment else "RANK"
            raise UsageError(f"{given} is set and {name} is not: {ADVICE}, or unset {given} to run one process")
    rank, size, port = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    local = _number(environment, "LOCAL_RANK") if environment.get("LOCAL_RANK") else rank
    if not 0 <= rank < size:
        raise UsageError(f"RANK={rank} is none of WORLD_SIZE={size} processes: {ADVICE}")
    if not 0 <= local < size:
        raise UsageError(f"LOCAL_RANK={local} is none of WORLD_SIZE={size} processes: {ADVICE}")
    if not 0 < port < 1 << 16:
        raise UsageError(f"MASTER_PORT={port} is no port: {ADVICE}")
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(rank, size, local, environment["MASTER_ADDR"], port, agent)


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError as error:
        raise UsageError(f"{name}={plain(environment[name], 40)} is no whole number: {ADVICE}") from error


def host() -> str:
    """Where process numbers mean the same: a host, or a container on it."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        parts.append(file.read().strip())
    return " ".join(parts)


def running(number: int) -> bool:
    """Whether a process of this host is there; one that has ended and not been waited for is not."""
    try:
        with open(f"/proc/{number}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        if os.path.isdir("/proc/self"):
            return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
