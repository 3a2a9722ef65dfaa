"""Training sequences: a haystack, then all its questions again and again. Batches by worker processes.

The batch of step s depends on the seed, s and its size alone, so that a resumed run sees the same data.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np

from kascade_cli.tasks import SPLITS
from kascade_cli.tasks import vocabulary as voc
from kascade_cli.tasks.haystack import Haystack, build_haystack
from kascade_cli.tasks.questions import item_count, question_ids

# What a position's target token is: 0 is filler or nothing.
KINDS = {"single-hop": 1, "two-hop": 2, "copy": 3, "silent-two-hop": 4, "silent-three-hop": 5}
FILLER_WEIGHT, ANSWER_WEIGHT = 1, 10  # tenths: the weights are 0.1 and 1

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


def training_haystack(rng: np.random.Generator, length: int, layout: str) -> Haystack:
    """A haystack of 35 to 75 % of `length`, 40 to 100 % of it items in shares drawn anew each time."""
    words = int((length - 1) * rng.uniform(0.35, 0.75))
    single, hops, copy = (share := rng.random(3) * np.array([1.0, 0.8, 0.6])) / share.sum()
    room = words * rng.uniform(0.4, 1.0)
    if layout == "hops":
        records = min(max(2, int(room * (single + 0.4 * hops) / 4)), 110)
        links = min(max(1, int(room * hops * 0.4 / 3)), 80)
        relinks = min(int(room * hops * 0.2 / 3), 60)
    else:
        records = min(max(2, int(room * (single + 0.5 * hops) / 4)), voc.KEYS * 2 // 3)
        links = min(int(room * hops * 0.5 / 3), voc.KEYS - records)
        relinks = 0
    left = int(room * copy)
    copies = []
    while left > 5:
        copies.append(int(rng.integers(5, min(left, 48) + 1)))
        left -= copies[-1] + 1
    used = 4 * records + 3 * (links + relinks) + sum(copies) + len(copies)
    return build_haystack(
        rng, records=records, links=links, relinks=relinks, copy_lengths=copies, filler_words=words - used
    )


def all_questions(rng: np.random.Generator, haystack: Haystack, layout: str) -> list[tuple[str, list[int], int]]:
    """(kind, ids, first answer position) of every question; links are asked about twice in `hops`."""
    found: list[tuple[str, int]] = [("single-hop", i) for i in range(item_count("single-hop", haystack))]
    if layout == "hops":
        draws = rng.random(item_count("two-hop", haystack)) < 0.25
        found += [("two-hop" if written else "silent-two-hop", i) for i, written in enumerate(draws)] * 2
        found += [("silent-three-hop", i) for i in range(item_count("silent-three-hop", haystack))] * 2
    else:
        found += [("two-hop", i) for i in range(item_count("two-hop", haystack))]
    questions = []
    for kind, item in found:
        prompt, answer = question_ids(kind, haystack, item)
        questions.append((kind, [*prompt, *answer], len(prompt)))
    # A copy question gives the segment's first word; the rest is the answer.
    questions += [("copy", [voc.COPY, *segment], 2) for segment in haystack.segments]
    return questions


def training_sequence(rng: np.random.Generator, length: int, layout: str) -> Batch:
    """(ids, weight in tenths of predicting each id, its kind), int16/int8/int8 [length + 1] with BOS."""
    haystack = training_haystack(rng, length, layout)
    ids: list[np.ndarray] = [np.array([voc.BOS]), haystack.ids]
    weights: list[np.ndarray] = [np.zeros(1), haystack.predictable * FILLER_WEIGHT]
    kinds: list[np.ndarray] = [np.zeros(1 + len(haystack.ids))]
    count = 1 + len(haystack.ids)
    questions = all_questions(rng, haystack, layout)
    while count <= length:
        for index in rng.permutation(len(questions)):
            kind, words, start = questions[index]
            ids.append(np.array(words))
            weights.append((np.arange(len(words)) >= start) * ANSWER_WEIGHT)
            kinds.append(np.full(len(words), KINDS[kind]))
            count += len(words)
            if rng.random() < 0.1:
                span = voc.filler(rng, int(rng.integers(3, 9)))
                ids.append(span)
                weights.append((np.arange(len(span)) > 0) * FILLER_WEIGHT)
                kinds.append(np.zeros(len(span)))
                count += len(span)
            if count > length:
                break
    return (
        np.concatenate(ids)[: length + 1].astype(np.int16),
        np.concatenate(weights)[: length + 1].astype(np.int8),
        np.concatenate(kinds)[: length + 1].astype(np.int8),
    )


def make_batch(seed: int, step: int, length: int, sequences: int, layout: str) -> Batch:
    """The batch of one step, [sequences, length + 1] each."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS["train"], step)))
    rows = [training_sequence(rng, length, layout) for _ in range(sequences)]
    ids, weights, kinds = (np.stack(part) for part in zip(*rows, strict=True))
    return ids, weights, kinds


def mixed_size(seed: int, step: int, mixed: tuple[tuple[int, int, float], ...]) -> tuple[int, int]:
    """(tokens, sequences) of a step of the mixed phase."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS["train"], step, 1)))
    length, sequences, _ = mixed[int(rng.choice(len(mixed), p=[share for _, _, share in mixed]))]
    return length, sequences


def _follow_parent(parent: int) -> None:
    """Ends this worker soon after its parent is gone, even by kill -9."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class BatchSource:
    """Hands out the batches of consecutive steps, made ahead by `workers` processes (0: made on the spot).

    Create it before CUDA is initialised: the workers are forked. A context manager.
    """

    def __init__(self, seed: int, layout: str, workers: int) -> None:
        self.seed, self.layout, self.workers = seed, layout, workers
        self.ahead: deque[tuple[tuple[int, int, int], Future[Batch]]] = deque()
        self.pool: ProcessPoolExecutor | None = None
        if workers:
            context = multiprocessing.get_context("fork")
            self.pool = ProcessPoolExecutor(workers, context, _follow_parent, (os.getpid(),))
            self.pool.submit(int).result()

    def __enter__(self) -> BatchSource:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def get(self, wanted: list[tuple[int, int, int]]) -> Batch:
        """The batch of `wanted[0]`, entries being (step, tokens, sequences); the rest are expected next."""
        if self.pool is None:
            return make_batch(self.seed, *wanted[0], self.layout)
        while self.ahead and self.ahead[0][0] != wanted[0]:
            self.ahead.popleft()[1].cancel()  # made for a stage that has ended
        for key in wanted[len(self.ahead) :]:
            self.ahead.append((key, self.pool.submit(make_batch, self.seed, *key, self.layout)))
        return self.ahead.popleft()[1].result()
