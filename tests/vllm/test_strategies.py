"""Every strategy, ragged prompts, mixed steps: token by token as `attach` does it, and as many keys read."""

import pytest

from .engine import generate, prompts, replay, whole

LENGTHS = [40, 97, 159, 256, 513, 700]
STRATEGIES = (
    "dense", "kascade", "kascade-pooled", "kascade-no-remap", "kascade-decode-only", "kascade-reused-norm", "oracle",
    "streaming-llm", "quest", "omnikv",
)  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_as_attach(strategy):
    asked = prompts(LENGTHS)
    run = generate(asked, strategy=strategy, max_num_seqs=3)
    assert run.report["steps"]["mixed_steps"] > 2
    read = visible = 0
    for prompt, got in zip(asked, run.tokens, strict=True):
        wrote, report = replay(prompt, got, whole(prompt, len(got)), strategy)
        assert got == wrote
        read, visible = read + report["keys_read"], visible + report["keys_visible"]
    assert (run.report["keys_read"], run.report["keys_visible"]) == (read, visible)
