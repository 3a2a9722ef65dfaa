"""Sparse runs over held-out prompts: each is made once, remembered, and written down."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kascade_cli.evaluation.forced import DECODE_TOKENS, DensePrompt, PromptKL
from kascade_cli.evaluation.prefix import SharedPrefill, can_share, layout_of
from kascade_cli.schema import Profile
from kascade_cli.sparse import Setting

if TYPE_CHECKING:
    from kascade_cli.devset import DevSet
    from kascade_cli.evaluation.journal import Journal

Advance = Callable[[str, PromptKL], None]


class Runs:
    """The prompts of a dev set and a model to run them with.

    `advance(what, result)` is called after each run, also of one that the journal knew.
    """

    def __init__(
        self,
        model: Any,
        devset: "DevSet",
        phases: Sequence[str],
        *,
        backend: str = "auto",
        journal: "Journal | None" = None,
        advance: Advance | None = None,
        dense: Callable[[int], DensePrompt] | None = None,
    ) -> None:
        """dense: what runs the dense model over a prompt, where others need that too; once is enough."""
        self.model, self.devset, self.phases, self.backend = model, devset, list(phases), backend
        self.journal, self.advance = journal, advance
        self.dense = functools.cache(dense or self._run)
        self._known: dict[tuple[str, int], PromptKL] = {}
        self._can_share: bool | None = None

    def measure(self, profiles: Sequence[tuple[str, Profile]], prompt: int) -> list[PromptKL]:
        """What each (description, profile) does on one prompt. Raises KascadeError if the dense model gives NaN."""
        keys = [layout_key(profile) for _, profile in profiles]
        found = {place: self._find(key, prompt) for place, key in enumerate(keys)}
        todo = [place for place, result in found.items() if result is None]
        with torch.no_grad():
            dense = self.dense(prompt) if todo else None
            cache = dense.prefilled(self.model) if todo else None
            prefill = (
                SharedPrefill(self.model) if self._shares([profiles[place][1] for place in todo], prompt) else None
            )
            # Layouts that begin alike follow each other.
            for place in sorted(todo, key=lambda place: layout_of(profiles[place][1])):
                setting = Setting(profile=profiles[place][1], backend=self.backend)
                found[place] = dense.compare(self.model, setting, cache, prefill)
                self._write(keys[place], prompt, found[place])
                self._tell(keys[place], prompt, profiles[place][0], found[place])
        for place, key in enumerate(keys):
            self._tell(key, prompt, profiles[place][0], found[place])
        return [found[place] for place in range(len(keys))]

    def _find(self, key: str, prompt: int) -> PromptKL | None:
        return self._known.get((key, prompt)) or self._read(key, prompt)

    def _tell(self, key: str, prompt: int, what: str, result: PromptKL) -> None:
        """Remembers a result, and says it the first time."""
        if (key, prompt) not in self._known:
            self._known[key, prompt] = result
            if self.advance:
                self.advance(what, result)

    def _shares(self, profiles: Sequence[Profile], prompt: int) -> bool:
        """Whether prefills of several profiles share what they have in common: tried once."""
        if "prefill" not in self.phases or len(profiles) < 2:
            return False
        if self._can_share is None:
            self._can_share = can_share(self.model, profiles, self.devset.prompts[prompt], self.backend)
        return self._can_share

    def _run(self, prompt: int) -> DensePrompt:
        ids, answers = self.devset.prompts[prompt], self.devset.answers[prompt]
        return DensePrompt(self.model, ids, answers, self.phases, DECODE_TOKENS)

    def _prompt_key(self, prompt: int) -> str:
        from kascade_cli.evaluation.journal import digest

        return digest(self.devset.prompts[prompt], self.devset.answers[prompt], self.phases, DECODE_TOKENS)

    def _read(self, key: str, prompt: int) -> PromptKL | None:
        return None if self.journal is None else self.journal.get(key, self._prompt_key(prompt))

    def _write(self, key: str, prompt: int, result: PromptKL) -> None:
        if self.journal is not None:
            self.journal.add(key, self._prompt_key(prompt), result)


def layout_key(profile: Profile) -> str:
    """What a run depends on: model, budget, layers and head maps; not how they were found."""
    from kascade_cli.evaluation.journal import digest

    return digest(profile.model_dump(mode="json", by_alias=True, exclude={"selection", "provenance"}))
