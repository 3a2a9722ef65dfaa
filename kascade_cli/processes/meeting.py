"""The processes of one command meet, and end together."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

from kascade_cli.errors import KascadeError, UsageError, plain
from kascade_cli.processes.members import START, Over, Team
from kascade_cli.processes.place import ADVICE, Place, place

_current: ContextVar[Team | None] = ContextVar("team", default=None)


def team() -> Team | None:
    """The processes of this command; None where it is one."""
    return _current.get()


def check_alone() -> None:
    """Raises UsageError in a command that several processes run and that knows nothing of it; one of them says so."""
    where = place(os.environ)
    if where is None or team() is not None:
        return
    if where.rank:
        raise SystemExit(2)
    raise UsageError(
        f"this command runs in one process, and {where.size} were started: profile, select-anchors and evaluate share "
        "their work; start it without torchrun"
    )


@contextlib.contextmanager
def together(environment: Mapping[str, str] | None = None) -> Iterator[Team | None]:
    """Meets the other processes, and sees to it that all of them end.

    A failure of any of them is one line from the leader (from another one, if the leader is gone); all others end
    without a word. Raises UsageError for variables that make no sense or processes that do not come.
    """
    where = place(os.environ if environment is None else environment)
    if where is None:
        yield None
        return
    made = Team(where, _connect(where))
    try:
        made.come()
    except UsageError as error:
        if made.leader or made.speaks():
            raise
        raise SystemExit(error.exit_code) from None
    before = _on_terminate(made.stop)
    token = _current.set(made)
    try:
        yield made
    except Over as over:
        made.leave()
        raise SystemExit(0 if over.code == 0 else 1) from None
    except BaseException as error:
        _on_terminate(signal.SIG_IGN)  # it is ending, and has something to say
        before = None
        if made.leader:
            made.end(getattr(error, "exit_code", 1))
            raise
        code = made.complain(_line(error))
        made.leave()
        raise SystemExit(code) from error
    else:
        _leave_group()
        if made.leader:
            made.end(0)
        else:
            made.leave()
    finally:
        _current.reset(token)
        made.close()
        _on_terminate(before)


def _leave_group() -> None:
    """Ends the process group that a split model was run with; PyTorch complains of one that is left."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _line(error: BaseException) -> str:
    if isinstance(error, KascadeError):
        return str(error)
    return f"{type(error).__name__}: {plain(error, 500).strip() or 'no message'}"


def _on_terminate(handler: Any) -> Any:
    """Sets what SIGTERM does, where that can be set; returns what it did."""
    if handler is None or threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, handler)


def _connect(where: Place) -> Any:
    """The store that all processes share."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # one line for an error, and it is ours
    import torch

    if not torch.distributed.is_available():
        raise KascadeError("this build of PyTorch has no torch.distributed: run one process")
    keeps = where.rank == 0 and not where.agent
    try:
        return torch.distributed.TCPStore(
            where.address,
            where.port,
            is_master=keeps,
            wait_for_workers=False,
            timeout=timedelta(seconds=START),
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        at = f"MASTER_ADDR={plain(where.address, 80)}, MASTER_PORT={where.port}"
        if keeps:
            raise KascadeError(f"process 0 cannot listen at {at}: is the port taken? choose another") from error
        raise KascadeError(f"process {where.rank} finds no process 0 at {at}: {ADVICE}") from error
