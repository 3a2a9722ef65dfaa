"""What anchor sets really do to a model: KL(dense || sparse) of its next-token distributions, teacher-forced.

On each held-out prompt the dense model runs once. A sparse run prefills all but the last `decode_tokens`
tokens and then decodes these one by one with the prompt's own tokens, so that one pass measures both phases
as they follow each other in use. KL is taken where an answer token is predicted (built-in tasks) or on the
last positions (other texts).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kascade_cli.devset import DevSet, load_devset
from kascade_cli.errors import KascadeError
from kascade_cli.evaluation.behind import logits_behind
from kascade_cli.integrations.transformers import attach_setting
from kascade_cli.models import logits_at
from kascade_cli.schema import Profile
from kascade_cli.sparse import Setting
from kascade_cli.tasks import TASKS

DECODE_TOKENS = 32  # of each prompt, decoded
LAST_POSITIONS = 64  # of the prefilled part, where no answer is marked
HOPELESS = 0.25  # nats above the best so far: not measured on further prompts


@dataclass
class MeanKL:
    """Mean KL per phase over the prompts measured so far, and how many those are."""

    kl: dict[str, float] = field(default_factory=dict)
    prompts: int = 0

    @property
    def score(self) -> float:
        return sum(self.kl.values()) / len(self.kl) if self.kl else float("inf")

    def add(self, kl: dict[str, float]) -> None:
        for phase, value in kl.items():
            self.kl[phase] = (self.kl.get(phase, 0.0) * self.prompts + value) / (self.prompts + 1)
        self.prompts += 1


@dataclass(frozen=True)
class _Positions:
    """Where KL is taken: `prefill` within the first `split` tokens, `decode` at or after them."""

    split: int
    prefill: list[int]
    decode: list[int]


def split_positions(length: int, answers: Sequence[int], phases: Sequence[str], decode_tokens: int) -> _Positions:
    """Divides a prompt of `length` tokens. The last position predicts nothing that the prompt holds, but its
    distribution can be compared all the same. `answers` may be empty. Raises KascadeError for a prompt too
    short."""
    split = length if "decode" not in phases else max(1, length - decode_tokens)
    if answers:
        prefill = [position for position in answers if position < split]
        decode = [position for position in answers if position >= split]
    else:
        prefill = list(range(max(0, split - LAST_POSITIONS), split))
        decode = list(range(split, length))
    found = _Positions(split, prefill if "prefill" in phases else [], decode)
    if ("prefill" in phases and not prefill) or ("decode" in phases and not decode):
        raise KascadeError(
            f"a held-out prompt of {length} tokens is too short to verify on; use a longer --max-length"
        )
    return found


def held_out_prompts(
    meta: dict[str, Any], tokenizer: Any, source: str, *, num_prompts: int, max_length: int
) -> DevSet:
    """The held-out twin of dev set `source`. If the capture was made from `source`, they share no prompt.

    `meta`: the capture's root attributes; seed, text field and chat template are as it was made, the last two only
    where they mean something (a built-in task has neither).
    """
    options = {} if source in TASKS else meta["options"]
    return load_devset(
        source,
        tokenizer,
        num_prompts=num_prompts,
        max_length=max_length,
        seed=meta["seed"],
        text_field=options.get("text_field"),
        chat_template=options.get("chat_template"),
        held_out=True,
    )


def measure_kl(
    model: Any,
    profiles: Sequence[Profile],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    phases: Sequence[str],
    *,
    backend: str = "auto",
    decode_tokens: int = DECODE_TOKENS,
    advance: Callable[[], None] | None = None,
) -> list[MeanKL]:
    """KL of every profile, in nats, averaged over positions, then prompts.

    prompts: token ids; answers: per prompt the positions whose next token is an answer (empty: the last
    positions). phases: `prefill`, `decode` or both. With decode alone the prefill is dense. After each
    prompt a profile whose mean is more than 0.25 nats above the best is measured no further. `advance` is
    called once per profile and prompt. Raises KascadeError if the dense model itself gives NaN, or a prompt
    is too short.
    """
    results = [MeanKL() for _ in profiles]
    for ids, marked in zip(prompts, answers, strict=True):
        positions = split_positions(len(ids), marked, phases, decode_tokens)
        best = min(result.score for result in results)
        running = [
            index for index, result in enumerate(results) if not result.prompts or result.score <= best + HOPELESS
        ]
        with torch.no_grad():
            dense = _Dense(model, ids, positions, phases)
            for index, profile in enumerate(profiles):
                if index in running:
                    with attach_setting(model, Setting(profile=profile, backend=backend)) as attached:
                        results[index].add(_sparse_kl(model, dense, positions, phases))
                        attached.report()  # raises if the model did not run the plan
                if advance:
                    advance()
    return results


class _Dense:
    """A prompt, the dense log-probabilities at its measured positions, and the cache of a dense prefill."""

    def __init__(self, model: Any, ids: Sequence[int], positions: _Positions, phases: Sequence[str]) -> None:
        self.ids = torch.tensor([list(ids)], device=next(model.parameters()).device)
        wanted = [*positions.prefill, *positions.decode]
        logits = logits_at(model, self.ids, wanted, use_cache=False)[0][0]
        if torch.isnan(logits).any():
            raise KascadeError("the dense model gives NaN logits; use another --dtype")
        logs = log_probabilities(logits)
        self.logs = {"prefill": logs[: len(positions.prefill)], "decode": logs[len(positions.prefill) :]}
        # With decode alone the prefill is dense, and one cache serves every profile.
        self.cache = None
        if "prefill" not in phases:
            self.cache = logits_at(model, self.ids[:, : positions.split], use_cache=True)[1].past_key_values


def _sparse_kl(model: Any, dense: _Dense, positions: _Positions, phases: Sequence[str]) -> dict[str, float]:
    """One sparse pass over the prompt: mean KL per phase."""
    found = {}
    cache = copy.deepcopy(dense.cache)  # decoding appends to it
    if "prefill" in phases:
        prompt = dense.ids[:, : positions.split]
        logits, output = logits_at(model, prompt, positions.prefill, use_cache="decode" in phases)
        found["prefill"] = _mean_kl(dense.logs["prefill"], logits[0])
        cache = output.past_key_values
    if "decode" in phases:
        steps = []
        for position in range(positions.split, max(positions.decode) + 1):
            logits, output = logits_behind(model, dense.ids[:, position : position + 1], cache, position)
            cache = output.past_key_values
            if position in positions.decode:
                steps.append(logits[0, -1])
        found["decode"] = _mean_kl(dense.logs["decode"], torch.stack(steps))
    return found


def _mean_kl(dense: Tensor, logits: Tensor) -> float:
    """Mean over positions of KL(dense || sparse), nats; NaN logits count as infinitely wrong."""
    value = float(kl_divergence(dense, log_probabilities(logits)).mean())
    return value if value == value else float("inf")


def log_probabilities(logits: Tensor) -> Tensor:
    """At least in float32."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats over the last dimension, float64, from log-probabilities; never below 0."""
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), torch.zeros_like(log_p))
    return terms.double().sum(-1).clamp_min(0.0)
