"""The 512 words that the built-in tasks are written in, and the bigram chain of their filler text.

Word ids are positions in `WORDS`; the demo tokenizers use the same order. A task is plain text: any tokenizer
that round-trips these words will do (`kascade_cli.tasks.encoding.check_words`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PAD, BOS, EOS, UNK, RECORD, LINK, ASK, ASK_TWO, COPY, _DOT, ASK_SILENT_TWO, ASK_SILENT_THREE = range(12)
_MARKERS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "@",
    "#",
    "?",
    "??",
    "<c>",
    ".",
    *(f"<r{i}>" for i in range(6)),
]

KEYS, VALUES, FILLERS = 256, 128, 112
FIRST_KEY = len(_MARKERS)
FIRST_VALUE = FIRST_KEY + KEYS
FIRST_FILLER = FIRST_VALUE + VALUES

WORDS: tuple[str, ...] = (
    *_MARKERS,
    *(f"k{i}" for i in range(KEYS)),
    *(f"v{i}" for i in range(VALUES)),
    *(f"w{i}" for i in range(FILLERS)),
)
VOCABULARY_SIZE = len(WORDS)

# What a prompt can contain; the special tokens and the spare markers never appear in text.
TASK_WORDS: tuple[str, ...] = (
    tuple(WORDS[i] for i in (RECORD, LINK, ASK, ASK_TWO, COPY, ASK_SILENT_TWO, ASK_SILENT_THREE)) + WORDS[FIRST_KEY:]
)

# Filler word i is followed by one of four successors with these cumulative probabilities (1.07 nats a word).
# The demo models have learned this very table: its seed is part of the vocabulary.
_chain = np.random.default_rng(1234)
SUCCESSORS: np.ndarray = np.stack([_chain.permutation(FILLERS)[:4] for _ in range(FILLERS)])
SUCCESSOR_CUMULATIVE: np.ndarray = np.cumsum([0.6, 0.2, 0.15, 0.05])


def to_text(ids: Sequence[int] | np.ndarray) -> str:
    """Word ids as space-separated words."""
    return " ".join(WORDS[i] for i in ids)


def filler(rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` filler word ids, int64 [count], drawn from the bigram chain with a uniform first word."""
    ids = np.empty(count, np.int64)
    state = int(rng.integers(FILLERS))
    # `* 0.9999` keeps a draw below the last cumulative probability, which rounding may leave under 1.
    steps = np.searchsorted(SUCCESSOR_CUMULATIVE, rng.random(count) * 0.9999)
    for i, step in enumerate(steps):
        ids[i] = FIRST_FILLER + state
        state = SUCCESSORS[state, step]
    return ids
