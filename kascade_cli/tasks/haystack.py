"""A haystack: records, links, copy segments and filler in random order, with its ground truth.

record        @ k v1 v2      key k has the values v1 v2
link          # a k          key a leads to key k (of a record, or of another link)
copy segment  <c> s1 .. sn   n random values and fillers
filler        w3 w71 ..      spans of 4 to 16 words of the bigram chain
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kascade_cli.errors import KascadeError
from kascade_cli.tasks import vocabulary as voc

COPY_LENGTH = 24
WORDS_PER_RECORD, WORDS_PER_LINK = 4, 3


@dataclass(frozen=True)
class Layout:
    """How many items of each kind a haystack of given length holds: share of its words, and a cap."""

    name: str
    record_share: float
    max_records: int
    link_share: float
    max_links: int
    relink_share: float  # links to links; 0: none
    max_relinks: int

    @property
    def shortest(self) -> int:
        """Tokens of the shortest haystack, BOS included: one of each kind, without filler."""
        return 1 + WORDS_PER_RECORD + WORDS_PER_LINK * (2 if self.relink_share else 1)

    def counts(self, length: int) -> tuple[int, int, int, int]:
        """(records, links, links to links, copy segments) for `length` tokens, BOS included.

        At least one of each kind that the layout has; short haystacks give up their copy segments first.
        Raises KascadeError when not even one of each fits.
        """
        records = max(1, min(self.max_records, int(length * self.record_share / WORDS_PER_RECORD)))
        links = max(1, min(self.max_links, int(length * self.link_share / WORDS_PER_LINK)))
        relinks = min(self.max_relinks, int(length * self.relink_share / WORDS_PER_LINK))
        if self.relink_share:
            relinks = max(1, relinks)
        left = length - 1 - WORDS_PER_RECORD * records - WORDS_PER_LINK * (links + relinks)
        if left < 0:
            raise KascadeError(
                f"a haystack of {length} tokens is too short for `{self.name}` tasks: take at least {self.shortest}"
            )
        copies = min(max(1, length // 256), left // (COPY_LENGTH + 1))
        return records, links, relinks, copies


# `hops` is what the 16-layer model was trained on, `pairs` (no links to links) the 8-layer model.
LAYOUTS: dict[str, Layout] = {
    "hops": Layout("hops", 0.30, 110, 0.12, 80, 0.08, 60),
    "pairs": Layout("pairs", 0.32, 160, 0.16, 80, 0.0, 0),
}


@dataclass(frozen=True)
class Haystack:
    """Word ids and ground truth. Keys and values are word ids; `*_target` are positions in the arrays above.

    ids: int64 [words], no BOS. predictable: bool [words], the filler words that follow another filler word.
    record_keys [R], record_values [R, 2]; link_keys [L], link_target [L] in records;
    relink_keys [M], relink_target [M] in links; segments: one int64 array per copy segment.
    """

    ids: np.ndarray
    predictable: np.ndarray
    record_keys: np.ndarray
    record_values: np.ndarray
    link_keys: np.ndarray
    link_target: np.ndarray
    relink_keys: np.ndarray
    relink_target: np.ndarray
    segments: list[np.ndarray]


def build_haystack(
    rng: np.random.Generator,
    *,
    records: int,
    links: int,
    relinks: int = 0,
    copy_lengths: Sequence[int] = (),
    filler_words: int = 0,
) -> Haystack:
    """Draw items, shuffle them, join them. All keys differ; several links may lead to one record.

    Raises ValueError when there are more keys than the vocabulary has, or a link has nothing to lead to.
    """
    if records + links + relinks > voc.KEYS:
        raise ValueError(f"{records} + {links} + {relinks} keys asked for, the vocabulary has {voc.KEYS}")
    if (links and not records) or (relinks and not links):
        raise ValueError("links need a record and links to links need a link to lead to")
    keys = voc.FIRST_KEY + rng.permutation(voc.KEYS)[: records + links + relinks]
    record_keys, link_keys, relink_keys = np.split(keys, [records, records + links])
    values = voc.FIRST_VALUE + rng.integers(0, voc.VALUES, (records, 2))
    link_target = rng.integers(0, records, links) if links else np.zeros(0, np.int64)
    relink_target = rng.integers(0, links, relinks) if relinks else np.zeros(0, np.int64)
    segments = [rng.integers(voc.FIRST_VALUE, voc.VOCABULARY_SIZE, n) for n in copy_lengths]

    items = [np.array([voc.RECORD, k, *v]) for k, v in zip(record_keys, values, strict=True)]
    items += [np.array([voc.LINK, k, record_keys[t]]) for k, t in zip(link_keys, link_target, strict=True)]
    items += [np.array([voc.LINK, k, link_keys[t]]) for k, t in zip(relink_keys, relink_target, strict=True)]
    items += [np.concatenate([[voc.COPY], s]) for s in segments]
    plain = len(items)
    while filler_words > 0:
        span = min(filler_words, int(rng.integers(4, 17)))
        items.append(voc.filler(rng, span))
        filler_words -= span

    order = rng.permutation(len(items))
    flags = [np.arange(len(items[i])) > 0 if i >= plain else np.zeros(len(items[i]), bool) for i in order]
    return Haystack(
        ids=np.concatenate([items[i] for i in order]).astype(np.int64) if items else np.zeros(0, np.int64),
        predictable=np.concatenate(flags) if flags else np.zeros(0, bool),
        record_keys=record_keys,
        record_values=values,
        link_keys=link_keys,
        link_target=link_target,
        relink_keys=relink_keys,
        relink_target=relink_target,
        segments=segments,
    )


def haystack_of_length(rng: np.random.Generator, length: int, layout: Layout) -> Haystack:
    """A haystack of exactly `length - 1` words: `length` tokens with the BOS token of the demo tokenizers."""
    records, links, relinks, copies = layout.counts(length)
    used = 1 + WORDS_PER_RECORD * records + WORDS_PER_LINK * (links + relinks) + (COPY_LENGTH + 1) * copies
    return build_haystack(
        rng,
        records=records,
        links=links,
        relinks=relinks,
        copy_lengths=[COPY_LENGTH] * copies,
        filler_words=length - used,
    )
