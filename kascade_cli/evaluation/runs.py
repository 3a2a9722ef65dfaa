"""Sparse runs over held-out prompts: each is made once, remembered, and written down."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kascade_cli.evaluation.forced import DECODE_TOKENS, DensePrompt, PromptKL
from kascade_cli.evaluation.prefix import SharedPrefill, can_share, layout_of
from kascade_cli.evaluation.sharing import SharedRuns
from kascade_cli.schema import Profile
from kascade_cli.sparse import Setting

if TYPE_CHECKING:
    from kascade_cli.devset import DevSet
    from kascade_cli.evaluation.journal import Journal
    from kascade_cli.processes import Team

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
        team: "Team | None" = None,
    ) -> None:
        """dense: what runs the dense model over a prompt, where others need that too; once is enough. team: the
        processes that share the runs; all but the leader are in `sharing.follow`."""
        self.model, self.devset, self.phases, self.backend = model, devset, list(phases), backend
        self.journal, self.advance = journal, advance
        self.dense = functools.cache(dense or self._run)
        self._known: dict[tuple[str, int], PromptKL] = {}
        self._can_share: bool | None = None
        self._shared = SharedRuns(team, self) if team else None

    def measure(
        self, profiles: Sequence[tuple[str, Profile]], prompt: int, ahead: Sequence[int] = ()
    ) -> list[PromptKL]:
        """What each (description, profile) does on one prompt. Raises KascadeError if the dense model gives NaN.

        ahead: prompts that will be asked for next with the same profiles. Several processes measure them all at once.
        """
        keys = [layout_key(profile) for _, profile in profiles]
        if self._shared:
            once = sorted({keys.index(key) for key in keys})
            self._shared.measure(
                profiles, keys, _in_order([profile for _, profile in profiles], once), [prompt, *ahead]
            )
        found = {place: self._find(key, prompt) for place, key in enumerate(keys)}
        todo = [place for place, result in found.items() if result is None]
        for place, result in self.compare([profile for _, profile in profiles], prompt, todo):
            found[place] = self.learn(keys[place], prompt, profiles[place][0], result)
        for place, key in enumerate(keys):
            self._tell(key, prompt, profiles[place][0], found[place])
        return [found[place] for place in range(len(keys))]

    def compare(
        self, profiles: Sequence[Profile], prompt: int, places: Sequence[int]
    ) -> Iterator[tuple[int, PromptKL]]:
        """Runs the profiles at these places over one prompt: (place, result), layouts that begin alike in a row."""
        if not places:
            return
        with torch.no_grad():
            dense = self.dense(prompt)
            cache = dense.prefilled(self.model)
            shares = self._shares([profiles[place] for place in places], prompt)
            prefill = SharedPrefill(self.model) if shares else None
        for place in _in_order(profiles, places):
            with torch.no_grad():
                setting = Setting(profile=profiles[place], backend=self.backend)
                result = dense.compare(self.model, setting, cache, prefill)
            yield place, result

    def learn(self, key: str, prompt: int, what: str, result: PromptKL) -> PromptKL:
        """Takes the result of a run that has just been made, here or elsewhere."""
        self._write(key, prompt, result)
        self._tell(key, prompt, what, result)
        return result

    def knows(self, key: str, prompt: int) -> bool:
        return self._find(key, prompt) is not None

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


def _in_order(profiles: Sequence[Profile], places: Sequence[int]) -> list[int]:
    """Layouts that begin alike follow each other, so that they share what they have in common."""
    return sorted(places, key=lambda place: layout_of(profiles[place]))


def layout_key(profile: Profile) -> str:
    """What a run depends on: model, budget, layers and head maps; not how they were found."""
    from kascade_cli.evaluation.journal import digest

    return digest(profile.model_dump(mode="json", by_alias=True, exclude={"selection", "provenance"}))
