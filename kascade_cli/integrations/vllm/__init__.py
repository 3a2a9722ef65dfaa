"""A plugin of vLLM: its full-attention layers run a strategy over vLLM's own paged cache.

`register` is the entry point (group `vllm.general_plugins`), which vLLM calls in every process. It does nothing, and
imports nothing, unless KASCADE_PROFILE or KASCADE_VLLM is set.
"""

from kascade_cli.integrations.vllm.settings import wanted


def register() -> None:
    """Makes `--attention-backend CUSTOM` kascade's.

    Raises Refusal for variables that make no sense, a vLLM that is not supported, and a backend that is taken.
    """
    if not wanted():
        return
    from kascade_cli.integrations.vllm.start import start

    start()
