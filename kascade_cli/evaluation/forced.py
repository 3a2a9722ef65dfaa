"""One prompt, run with its own tokens: where it is divided, what dense says there, what a sparse run says.

A sparse run prefills the first `split` tokens and decodes the rest, so that one pass measures both phases as they
follow each other in use. An answer is given if the most likely token is the answer's at every position that
predicts one of its tokens.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError
from kascade_cli.evaluation.behind import continues_in_chunks, logits_behind
from kascade_cli.integrations.transformers import attach_setting
from kascade_cli.models import logits_at
from kascade_cli.sparse import Setting
from kascade_cli.tasks.encoding import predicting

DECODE_TOKENS = 32  # of each prompt, decoded
LAST_POSITIONS = 64  # of the prefilled part, where no answer is marked
_DECODED = 4  # answer tokens that shall be decoded, if 32 steps have so many

Span = tuple[int, int]  # an answer's tokens, half-open
Prefill = Callable[..., tuple[Tensor, Any]]  # (model, attachment, ids, positions, use_cache=) -> as `logits_at`


@dataclass(frozen=True)
class PromptKL:
    """What one run over one prompt shows.

    kl: phase -> mean KL(dense || sparse), nats. asked: answers in the prompt; given: those that dense gives; kept:
    those of them that the sparse run gives too.
    """

    kl: dict[str, float]
    asked: int = 0
    given: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Positions:
    """Where a prompt is measured: `prefill` within the first `split` tokens, `decode` at or after them, ascending.

    answers: the spans that are judged, those of which some token is predicted at a measured position.
    """

    split: int
    prefill: list[int]
    decode: list[int]
    answers: list[Span]

    @property
    def measured(self) -> list[int]:
        return [*self.prefill, *self.decode]


def split_positions(
    length: int, answers: Sequence[Span], phases: Sequence[str], decode_tokens: int = DECODE_TOKENS
) -> Positions:
    """Divides a prompt of `length` tokens. Raises KascadeError for one too short.

    With answers, where one of them begins, so that its first token is predicted by the last prefilled position, as
    in generation: at the last answer from which on at least 4 answer tokens are decoded, or as many as there are in
    `decode_tokens` steps. Without any, these steps are the last ones, as of a text without answers. There KL is taken
    at the last positions; the very last predicts nothing that the prompt holds, but can be compared all the same.
    """
    decoding = "decode" in phases
    split = _split(length, answers, decode_tokens) if decoding else length
    if answers:
        wanted = predicting(answers)
        prefill = [position for position in wanted if 0 <= position < split]
        decode = [position for position in wanted if position >= split]
    else:
        prefill = list(range(max(0, split - LAST_POSITIONS), split))
        decode = list(range(split, length))
    if "prefill" not in phases:
        prefill = []
    if ("prefill" in phases and not prefill) or (decoding and not decode):
        raise KascadeError(
            f"a held-out prompt of {length} tokens is too short to verify on; use a longer --max-length"
        )
    measured = {*prefill, *decode}
    judged = [span for span in answers if span[0] > 0 and measured.intersection(predicting([span]))]
    return Positions(split, prefill, decode, judged)


def _split(length: int, answers: Sequence[Span], decode_tokens: int) -> int:
    end = max((stop - 1 for _, stop in answers), default=length)  # behind the last step
    best, most = max(1, end - decode_tokens), 0
    for start, _ in sorted(answers, reverse=True):
        if start < 1 or end - start > decode_tokens:
            break
        decoded = sum(stop - begin - (begin == start) for begin, stop in answers if begin >= start)
        if decoded > most:
            best, most = start, decoded
        if most >= _DECODED:
            break
    return best


class DensePrompt:
    """A prompt and what the dense model says at its measured positions.

    Of answers only those count that dense gives: what it does not know, it says in a way that a hair can change, and
    KL there says nothing. Where it gives none, all of them are measured, and none is judged.

    Attributes: ids int64 [1, T]; asked: answers in the prompt; given: how many of them dense gives; positions; logs:
    log-probabilities [P, vocabulary] of positions.measured.
    """

    @torch.no_grad()  # what autograd would keep of a 16k prompt is gigabytes
    def __init__(self, model: Any, ids: Sequence[int], answers: Sequence[Span], phases: Sequence[str],
                 decode_tokens: int = DECODE_TOKENS) -> None:  # fmt: skip
        """Runs the model once. Raises KascadeError if it gives NaN, or the prompt is too short."""
        self.phases = tuple(phases)
        self.ids = torch.tensor([list(ids)], device=next(model.parameters()).device)
        answers = [span for span in answers if span[0] > 0]
        positions = split_positions(len(ids), answers, phases, decode_tokens)
        places = sorted({*positions.measured, *predicting(answers)})
        logits = logits_at(model, self.ids, places, use_cache=False)[0][0]
        if torch.isnan(logits).any():
            raise KascadeError("the dense model gives NaN logits; use another --dtype")
        likeliest = dict(zip(places, logits.argmax(-1).tolist(), strict=True))
        self.asked = len(positions.answers)
        right = [span for span in positions.answers if self._says(likeliest, span)]
        with contextlib.suppress(KascadeError):  # what dense gives may leave a phase without a position
            positions = split_positions(len(ids), right, phases, decode_tokens) if right else positions
        self.positions = positions
        self.judged = [span for span in positions.answers if span in right]
        row = {place: index for index, place in enumerate(places)}
        self.logs = log_probabilities(logits[[row[place] for place in self.positions.measured]])

    @property
    def given(self) -> int:
        return len(self.judged)

    def _says(self, likeliest: dict[int, int], span: Span) -> bool:
        """Whether the likeliest token is right at every position of an answer that `likeliest` has."""
        ids = self.ids[0].tolist()
        return all(likeliest[place] == ids[place + 1] for place in predicting([span]) if place in likeliest)

    @torch.no_grad()
    def prefilled(self, model: Any) -> Any:
        """The cache of a dense prefill, where only decoding is measured; None otherwise."""
        if "prefill" in self.phases:
            return None
        return logits_at(model, self.ids[:, : self.positions.split], use_cache=True)[1].past_key_values

    @torch.no_grad()
    def compare(self, model: Any, setting: Setting, cache: Any = None, prefill: Prefill | None = None) -> PromptKL:
        """One run under `setting`. `cache` is what `prefilled` gave; it is left as it is. prefill: what runs the first
        `split` tokens instead of `logits_at` (prefix.py)."""
        in_chunks = continues_in_chunks(model)
        with attach_setting(model, setting) as attached:
            if prefill is None:
                run = functools.partial(logits_at, model)
            else:
                run = functools.partial(prefill, model, attached)
            together = in_chunks and attached.memory is None
            decode = functools.partial(self._together, attached) if together else self._one_by_one
            logits = torch.cat([wide(rows) for rows in self._sparse(model, copy.deepcopy(cache), run, decode)])
            attached.report()  # raises if the model did not run the plan
        divergence = kl_divergence(self.logs, log_probabilities(logits))
        border, kl = len(self.positions.prefill), {}
        for phase, part in (("prefill", divergence[:border]), ("decode", divergence[border:])):
            if phase in self.phases:
                value = float(part.mean())
                kl[phase] = value if value == value else float("inf")  # NaN logits are infinitely wrong
        likeliest = logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1).tolist()
        said = dict(zip(self.positions.measured, likeliest, strict=True))
        return PromptKL(kl, self.asked, self.given, sum(self._says(said, span) for span in self.judged))

    def _sparse(
        self,
        model: Any,
        cache: Any,
        prefill: Callable[..., tuple[Tensor, Any]],
        decode: Callable[..., Iterator[Tensor]],
    ) -> Iterator[Tensor]:
        """Logits at the measured positions, in order, [n, vocabulary] at a time."""
        positions = self.positions
        if "prefill" in self.phases:
            prompt = self.ids[:, : positions.split]
            logits, output = prefill(prompt, positions.prefill, use_cache="decode" in self.phases)
            yield logits[0]
            cache = output.past_key_values
        if positions.decode:
            yield from decode(model, cache)

    def _together(self, attached: Any, model: Any, cache: Any) -> Iterator[Tensor]:
        """The decode steps in one pass: their tokens are known."""
        split, last = self.positions.split, self.positions.decode[-1]
        at = [position - split for position in self.positions.decode]
        with attached.steps_together():
            yield logits_behind(model, self.ids[:, split : last + 1], cache, split, at)[0][0]

    def _one_by_one(self, model: Any, cache: Any) -> Iterator[Tensor]:
        wanted = set(self.positions.decode)
        for position in range(self.positions.split, self.positions.decode[-1] + 1):
            logits, output = logits_behind(model, self.ids[:, position : position + 1], cache, position)
            cache = output.past_key_values
            if position in wanted:
                yield logits[0, -1:]


def wide(logits: Tensor) -> Tensor:
    """At least in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def log_probabilities(logits: Tensor) -> Tensor:
    """At least in float32."""
    return wide(logits).log_softmax(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats over the last dimension, float64, from log-probabilities; never below 0."""
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), torch.zeros_like(log_p))
    return terms.double().sum(-1).clamp_min(0.0)
