"""KL(dense || sparse) at the answers: where the dense model's own answer is written, token by token.

Every prompt is prefilled under the setting up to the question's last token; then the dense model's greedy answer is
decoded, one of its tokens after the other, whatever the setting would have said (evaluation/forced.py). So a sparse
run is compared where it matters, and at the same positions for every setting.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kascade_cli.evaluation.answers import greedy_answers
from kascade_cli.evaluation.cases import Case, EncodedQuestion
from kascade_cli.evaluation.forced import DensePrompt
from kascade_cli.sparse import Setting

MOST_TOKENS = 32  # of an answer
_TILE = 32  # of the context that greedy_answers prefills once; any size gives the same answer


def spread(cases: Sequence[Case], count: int) -> list[Case]:
    """The first `count` cases, the tasks in turn where each has cases of its own."""
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        groups.setdefault(tuple(sorted({question.task for question in case.questions})), []).append(case)
    rounds = range(max(map(len, groups.values()), default=0))
    turns = [group[place] for place in rounds for group in groups.values() if place < len(group)]
    return turns[:count]


class AnswerKL:
    """Made with a model that nothing is attached to; `measure` then takes any setting.

    One question of each of `prompts` cases (`spread`), another of a case's tasks in turn. tokens: what one
    measurement reads; positions: how many it compares.
    """

    def __init__(self, model: Any, cases: Sequence[Case], prompts: int, *, advance: Callable[[int], None]) -> None:
        self.model = model
        self.prompts: list[DensePrompt] = []
        for number, case in enumerate(spread(cases, prompts)):
            kinds = list(dict.fromkeys(question.task for question in case.questions))
            kind = kinds[number % len(kinds)]
            question = next(question for question in case.questions if question.task == kind)
            self.prompts.append(_answered(model, case, question))
            advance(case.tokens)
        self.positions = sum(len(prompt.positions.measured) for prompt in self.prompts)

    @torch.no_grad()
    def measure(self, setting: Setting, *, advance: Callable[[int], None]) -> list[float]:
        """Per prompt the mean over its positions, in nats; infinite where a logit is NaN."""
        found = []
        for prompt in self.prompts:
            kl = prompt.compare(self.model, setting).kl
            sizes = {"prefill": len(prompt.positions.prefill), "decode": len(prompt.positions.decode)}
            found.append(sum(value * sizes[phase] for phase, value in kl.items()) / len(prompt.positions.measured))
            advance(prompt.ids.shape[1])
        return found


@torch.no_grad()
def _answered(model: Any, case: Case, question: EncodedQuestion) -> DensePrompt:
    """The prompt with the dense model's answer; with its end, which is a token too, where it is empty."""
    limit = min(question.new_tokens, MOST_TOKENS)
    (answer,) = greedy_answers(model, case.context, [question.ids], [limit], tile=_TILE)
    ids = [*case.context, *question.ids]
    answer = answer or [0]  # its own token is not looked at: what predicts it is
    phases = ("prefill", "decode") if len(answer) > 1 else ("prefill",)
    return DensePrompt(model, [*ids, *answer], [(len(ids), len(ids) + len(answer))], phases)
