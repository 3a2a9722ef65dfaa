"""KL(dense || sparse) at the answers: where the dense model's own answer is written, token by token.

Every prompt is prefilled under the setting up to the question's last token; then the dense model's greedy answer is
decoded, one of its tokens after the other, whatever the setting would have said. So a sparse run is compared where it
matters, and at the same positions for every setting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError
from kascade_cli.evaluation.answers import greedy_answers
from kascade_cli.evaluation.behind import logits_behind
from kascade_cli.evaluation.cases import Case
from kascade_cli.evaluation.kl import kl_divergence, log_probabilities
from kascade_cli.integrations.transformers import attach_setting
from kascade_cli.models import logits_at
from kascade_cli.sparse import Setting

MOST_TOKENS = 32  # of an answer
_TILE = 32  # of the context that greedy_answers prefills once; any size gives the same answer


@dataclass(frozen=True)
class _Answered:
    """A question's whole prompt, the dense model's answer, and its log-probabilities [n, vocabulary] there."""

    ids: list[int]
    answer: list[int]
    logs: Tensor

    @property
    def tokens(self) -> int:
        return len(self.ids) + len(self.logs)


class AnswerKL:
    """Made with a model that nothing is attached to; `measure` then takes any setting.

    One question of each of the first `prompts` cases, another task's in turn.
    """

    def __init__(self, model: Any, cases: Sequence[Case], prompts: int, *, advance: Callable[[int], None]) -> None:
        self.model = model
        self.questions: list[_Answered] = []
        for number, case in enumerate(cases[:prompts]):
            kinds = list(dict.fromkeys(question.task for question in case.questions))
            kind = kinds[number % len(kinds)]
            question = next(question for question in case.questions if question.task == kind)
            self.questions.append(_answer(model, case, question))
            advance(self.questions[-1].tokens)

    @property
    def tokens(self) -> int:
        """What one measurement reads."""
        return sum(question.tokens for question in self.questions)

    @property
    def positions(self) -> int:
        return sum(len(question.logs) for question in self.questions)

    def measure(self, setting: Setting, *, advance: Callable[[int], None]) -> list[float]:
        """Per prompt the mean over its positions, in nats."""
        with attach_setting(self.model, setting) as attached:
            found = []
            for question in self.questions:
                found.append(_divergence(self.model, question))
                advance(question.tokens)
            if found:
                attached.report()  # raises if the model did not run what it was asked to
        return found


@torch.no_grad()
def _answer(model: Any, case: Case, question: Any) -> _Answered:
    limit = min(question.answer_tokens, MOST_TOKENS)
    (answer,) = greedy_answers(model, case.context, [question.ids], [limit], tile=_TILE)
    ids = [*case.context, *question.ids]
    whole = torch.tensor([ids + answer[:-1]], device=next(model.parameters()).device)
    logits = logits_at(model, whole, max(1, len(answer)), use_cache=False)[0][0]
    if torch.isnan(logits).any():
        raise KascadeError("the dense model gives NaN logits; use another --dtype")
    return _Answered(ids, answer, log_probabilities(logits))


@torch.no_grad()
def _divergence(model: Any, question: _Answered) -> float:
    device = next(model.parameters()).device
    logits, output = logits_at(model, torch.tensor([question.ids], device=device), use_cache=True)
    steps = [logits[0, -1]]
    for step, token in enumerate(question.answer[:-1]):
        chunk = torch.tensor([[token]], device=device)
        logits, output = logits_behind(model, chunk, output.past_key_values, len(question.ids) + step)
        steps.append(logits[0, -1])
    value = float(kl_divergence(question.logs, log_probabilities(torch.stack(steps))).mean())
    return value if value == value else float("inf")  # NaN is as wrong as can be
