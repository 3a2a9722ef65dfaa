"""What happens in every process of vLLM before a model is made: the variables are read, the backend is named."""

import logging

from kascade_cli.errors import KascadeError
from kascade_cli.integrations.vllm import compat
from kascade_cli.integrations.vllm.errors import Refusal
from kascade_cli.integrations.vllm.selection import guard_selection
from kascade_cli.integrations.vllm.settings import read_settings

BACKEND = "kascade_cli.integrations.vllm.backend.KascadeBackend"


def start() -> None:
    """Raises Refusal. Calling it again changes nothing."""
    compat.check_version()
    # vLLM shows what its own loggers say; ours are to be seen beside it.
    logging.getLogger("kascade").parent = logging.getLogger("vllm")
    compat.register(BACKEND)
    guard_selection(BACKEND)
    # Last: vLLM calls a plugin once a process, and a program that mends its settings goes on from here.
    try:
        read_settings().setting()
    except KascadeError as error:
        raise Refusal(error) from None
