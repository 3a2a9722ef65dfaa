"""Which split a word, a number, a fact or a passage belongs to: one each, so that splits never share any."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kascade_cli.errors import KascadeError
from kascade_cli.tasks.questions import SPLITS

OWNERS = ("dev", "held-out", "test")


def owner(text: str) -> str:
    """The split that owns `text`, by its sha256: about a third of all texts each."""
    return OWNERS[hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] % len(OWNERS)]


@dataclass(frozen=True)
class Draw:
    """Where the numbers of one prompt come from: the seed, the split and its number in it (SeedSequence)."""

    seed: int
    split: str
    index: int

    def rng(self, purpose: int) -> np.random.Generator:
        """One independent stream for each purpose, so that a longer text leaves the needles as they are."""
        if self.seed < 0:
            raise KascadeError(f"the seed must not be negative, got {self.seed}")
        key = (SPLITS[self.split], self.index, purpose)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def own(self, rng: np.random.Generator, make: Callable[[np.random.Generator], str], count: int) -> list[str]:
        """`count` different texts from `make` that this split owns, in the order drawn."""
        found: dict[str, None] = {}
        for _ in range(1000 + 100 * count):
            if len(found) == count:
                return list(found)
            text = make(rng)
            if owner(text) == self.split:
                found[text] = None
        raise KascadeError(f"cannot draw {count} different words for one prompt: ask for a shorter one")
