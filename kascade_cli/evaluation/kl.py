"""What anchor sets really do to a model: KL(dense || sparse) of its next-token distributions, and answers kept.

On each held-out prompt the dense model runs once; forced.py says what a sparse run is. KL is taken where an answer
token is predicted (tasks) or on the last positions (other texts).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kascade_cli.analysis.candidates import Figures
from kascade_cli.evaluation.forced import (
    DECODE_TOKENS,
    DensePrompt,
    Span,
    kl_divergence,
    log_probabilities,
)
from kascade_cli.schema import Profile
from kascade_cli.sparse import Setting

__all__ = ["DECODE_TOKENS", "MeanKL", "kl_divergence", "log_probabilities", "measure_kl"]


@dataclass
class MeanKL(Figures):
    """Mean KL per phase over the prompts measured so far, how many those are, and their answers in sum."""

    kl: dict[str, float] = field(default_factory=dict)
    prompts: int = 0
    asked: int = 0
    given: int = 0
    kept: int = 0


def measure_kl(
    model: Any,
    profiles: Sequence[Profile],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Span]],
    phases: Sequence[str],
    *,
    backend: str = "auto",
    decode_tokens: int = DECODE_TOKENS,
    advance: Callable[[], None] | None = None,
) -> list[MeanKL]:
    """KL of every profile, in nats, averaged over positions, then prompts; and how many answers each keeps.

    prompts: token ids; answers: per prompt the half-open token spans of its answers (none: the last positions are
    compared). phases: `prefill`, `decode` or both. With decode alone the prefill is dense. `advance` is called once
    per profile and prompt. Raises KascadeError if the dense model itself gives NaN, or a prompt is too short.
    """
    results = [MeanKL() for _ in profiles]
    with torch.no_grad():
        for ids, spans in zip(prompts, answers, strict=True):
            dense = DensePrompt(model, ids, spans, phases, decode_tokens)
            cache = dense.prefilled(model)
            for result, profile in zip(results, profiles, strict=True):
                result.add(dense.compare(model, Setting(profile=profile, backend=backend), cache))
                if advance:
                    advance()
    return results
