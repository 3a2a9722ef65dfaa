"""Greedy answers to the questions of many contexts: prefilled one by one, decoded as rows of a batch.

Which rows are decoded together depends on the cases alone, not on how many processes share them: in 16 bits a row's
logits depend on the batch in their last bits, and a table of answers must not on the number of GPUs.

Each row is padded on the left, so that all of them end at the same slot. Prefill is that of `answers`: a row's answer
is the one that `model.generate` gives on its context and question alone. Models whose cache is more than keys and
values (sliding windows, linear attention) answer context by context.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kascade_cli.evaluation.answers import (
    Repeated,
    SlotsLayer,
    cache_bytes,
    ends,
    greedy_answers,
    read_context,
    until_end,
)
from kascade_cli.evaluation.behind import logits_behind
from kascade_cli.evaluation.cases import Case
from kascade_cli.integrations.transformers.decoding import decode_behind
from kascade_cli.models import logits_at

_LOOK = 8  # steps between two looks whether all answers have ended
_TOGETHER = 8  # questions of consecutive cases that are decoded together, or more where the last case has them


@dataclass
class _Row:
    """A question whose prompt has been read: keys and values [1, G, N, D] of every layer, and its first token."""

    place: tuple[int, int]
    layers: list[tuple[Tensor, Tensor]]
    first: Tensor
    steps: int

    @property
    def tokens(self) -> int:
        return self.layers[0][0].shape[2]

    def bytes(self, extra: int) -> int:
        return sum(
            tensor.shape[1] * (self.tokens + extra) * tensor.shape[3] * tensor.element_size()
            for pair in self.layers
            for tensor in pair
        )


def grouped(cases: Sequence[Case]) -> Iterator[range]:
    """Cases that are decoded together. Of several such groups in a row it makes the same groups again."""
    first, rows = 0, 0
    for index, case in enumerate(cases):
        rows += len(case.questions)
        if rows >= _TOGETHER or index == len(cases) - 1:
            yield range(first, index + 1)
            first, rows = index + 1, 0


@torch.no_grad()
def answer_all(
    model: nn.Module,
    cases: Sequence[Case],
    *,
    tile: int,
    max_bytes: int | None = None,
    advance: Callable[[int], None] = lambda index: None,
) -> list[list[list[int]]]:
    """Per case and question, the tokens that greedy decoding writes, without the end-of-sequence token.

    Runs whatever attention the model has attached. `max_bytes` bounds the keys and values of a batch (default: 1 GB,
    16 GB on a GPU). `advance(index)` is called when a case has been read.
    """
    answers: list[list[list[int]]] = [[[] for _ in case.questions] for case in cases]
    limit = max_bytes or cache_bytes(model.device)
    for group in grouped(cases):
        _answer_group(model, cases, group, answers, tile, limit, advance)
    return answers


def _answer_group(
    model: nn.Module,
    cases: Sequence[Case],
    group: range,
    answers: list[list[list[int]]],
    tile: int,
    limit: int,
    advance: Callable[[int], None],
) -> None:
    """Fills in the answers to the cases of a group, in as few batches as `limit` allows."""
    rows: list[_Row] = []
    for index in group:
        case = cases[index]
        asked = [question.ids for question in case.questions]
        read = read_context(model, case.context, asked, tile)
        found: Iterable[_Row] = ()
        if _stands_alone(read[1]):
            found = _rows(model, case, index, *read)
        else:
            new = [question.new_tokens for question in case.questions]
            answers[index] = greedy_answers(model, case.context, asked, new, tile=tile, read=read)
        for row in found:
            grown = [*rows, row]
            widest = max(other.tokens for other in grown)
            needed = sum(other.bytes(widest - other.tokens + row.steps) for other in grown)
            if rows and (needed > limit or rows[0].steps != row.steps):
                _finish(model, rows, answers)
                rows = []
            rows.append(row)
        advance(index)
    if rows:
        _finish(model, rows, answers)


def _stands_alone(cache: Any) -> bool:
    """Whether a cache is keys and values and nothing else, so that rows of several can be put side by side."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def _rows(model: nn.Module, case: Case, index: int, shared: int, cache: Any) -> Iterator[_Row]:
    """The questions of a case, read one by one behind the `shared` tokens of the context."""
    rest = list(case.context[shared:])
    repeated = Repeated(cache, 1, len(rest) + max(len(question.ids) for question in case.questions))
    for number, question in enumerate(case.questions):
        chunk = torch.tensor([rest + question.ids], device=model.device)
        logits, output = logits_behind(model, chunk, repeated.take(1), shared)
        # The next question writes over these slots.
        layers = [(layer.keys.clone(), layer.values.clone()) for layer in output.past_key_values.layers]
        yield _Row((index, number), layers, logits[0, -1].argmax(-1), question.new_tokens)


def _finish(model: nn.Module, rows: list[_Row], answers: list[list[list[int]]]) -> None:
    """Decodes the rows as one batch, and frees their caches."""
    steps = rows[0].steps
    width = max(row.tokens for row in rows)
    lengths = torch.tensor([row.tokens for row in rows], device=model.device)
    cache = _joined(rows, width, steps)
    first = torch.stack([row.first for row in rows]).to(model.device)
    written = decode_behind(model, cache, first, steps, lengths=lengths, stops=ends(model))
    if written is None:
        written = _decode(model, cache, first, lengths, width, steps)
    for row, tokens in zip(rows, written.tolist(), strict=True):
        index, number = row.place
        answers[index][number] = until_end(tokens, model)


def _joined(rows: Sequence[_Row], width: int, steps: int) -> DynamicCache:
    """One cache of all rows with room for `steps` tokens more; takes the rows' layers away, one after the other."""
    cache = DynamicCache()
    while rows[0].layers:
        parts = [row.layers.pop(0) for row in rows]
        pair = []
        for which in (0, 1):
            like = parts[0][which]
            wide = like.new_zeros(len(rows), like.shape[1], width + steps, like.shape[3])
            for number, part in enumerate(parts):
                wide[number, :, width - part[which].shape[2] : width] = part[which][0]
            pair.append(wide)
        cache.layers.append(SlotsLayer(pair[0], pair[1], width))
    return cache


def _decode(model: nn.Module, cache: Any, token: Tensor, lengths: Tensor, width: int, steps: int) -> Tensor:
    """Greedy: int64 [B, up to steps], beginning with `token` [B]. lengths int64 [B]: tokens that each row holds."""
    tokens = [token]
    stops = torch.tensor(sorted(ends(model)), device=token.device)
    mask = (torch.arange(width + steps, device=token.device) >= (width - lengths)[:, None]).long()
    over = torch.isin(token, stops)
    for step in range(1, steps):
        if step % _LOOK == 0 and bool(over.all()):
            break
        logits, output = logits_at(
            model,
            tokens[-1][:, None],
            1,
            past_key_values=cache,
            use_cache=True,
            attention_mask=mask[:, : width + step],
            position_ids=(lengths + step - 1)[:, None],
        )
        cache = output.past_key_values
        tokens.append(logits[:, -1].argmax(-1))
        over |= torch.isin(tokens[-1], stops)
    return torch.stack(tokens, 1)
