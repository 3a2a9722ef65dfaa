import hashlib
import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from kascade_cli import tasks
from kascade_cli.errors import KascadeError
from kascade_cli.tasks import vocabulary
from tests.tasks.solver import parse, solve

CHAIN = "ffb3f98ce034c137"
KINDS = ("single-hop", "two-hop", "silent-two-hop", "silent-three-hop")


@pytest.mark.parametrize("length", [11, 12, 31, 64, 100, 257, 1024, 4097])
@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_reader_of_the_text_finds_every_answer(task, length):
    for prompt in tasks.make_prompts(task, length=length, count=4, questions_per_task=6, seed=3):
        assert len(prompt.haystack.split()) == length - 1
        assert prompt.questions
        for question in prompt.questions:
            assert question.answer == solve(prompt.haystack, question.prompt)
            assert question.task in tasks.member_tasks(task)


def test_no_answer_is_given_away_by_another_question():
    for prompt in tasks.make_prompts("hops", length=1024, count=20, questions_per_task=8, seed=0):
        _, links = parse(prompt.haystack)
        keys = []
        for question in prompt.questions:
            key = question.prompt.split()[1]
            while key in links:
                key = links[key]
            keys.append(key)
        assert len(set(keys)) == len(keys)


def test_asks_as_many_questions_as_wanted_where_there_is_room():
    for length, each in ((1024, 6), (4096, 8)):
        for prompt in tasks.make_prompts("hops", length=length, count=5, questions_per_task=each, seed=1):
            assert Counter(q.task for q in prompt.questions) == dict.fromkeys(KINDS, each)


def test_the_order_of_questions_is_mixed():
    prompts = tasks.make_prompts("hops", length=1024, count=40, questions_per_task=4, seed=0)
    first = Counter(prompt.questions[0].task for prompt in prompts)
    assert set(first) == set(KINDS)


@pytest.mark.parametrize(
    ("task", "length", "records", "links"),
    [
        # records, links + links to links: floor(share * length / words), capped.
        ("hops", 1024, 76, 40 + 27),
        ("hops", 4096, 110, 80 + 60),
        ("hops", 300, 22, 12 + 8),
        ("pairs", 1024, 81, 54),
        ("pairs", 4096, 160, 80),
    ],
)
def test_the_distribution_is_the_one_the_models_were_trained_on(task, length, records, links):
    for prompt in tasks.make_prompts(task, length=length, count=3, questions_per_task=1, seed=9):
        found_records, found_links = parse(prompt.haystack)
        assert (len(found_records), len(found_links)) == (records, links)
        assert prompt.haystack.split().count("<c>") == max(1, length // 256)
        to_links = sum(target in found_links for target in found_links.values())
        assert (to_links > 0) == (task == "hops")


def test_filler_follows_the_chain_that_the_models_learned():
    table = hashlib.sha256(vocabulary.SUCCESSORS.astype("<i8").tobytes()).hexdigest()
    assert table.startswith(CHAIN)
    words = vocabulary.filler(np.random.default_rng(0), 20000) - vocabulary.FIRST_FILLER
    rank = Counter()
    for a, b in itertools.pairwise(words):
        rank[vocabulary.SUCCESSORS[a].tolist().index(b)] += 1
    shares = np.array([rank[i] for i in range(4)]) / (len(words) - 1)
    np.testing.assert_allclose(shares, [0.6, 0.2, 0.15, 0.05], atol=0.02)


def test_the_vocabulary_has_512_different_words():
    assert len(set(vocabulary.WORDS)) == vocabulary.VOCABULARY_SIZE == 512
    assert (vocabulary.WORDS[16], vocabulary.WORDS[272], vocabulary.WORDS[400]) == ("k0", "v0", "w0")


def test_prompts_depend_on_seed_split_and_index_alone():
    few = tasks.make_prompts("hops", length=200, count=2, questions_per_task=2, seed=5)
    many = tasks.make_prompts("hops", length=200, count=6, questions_per_task=2, seed=5)
    assert few == many[:2]
    assert few != tasks.make_prompts("hops", length=200, count=2, questions_per_task=2, seed=6)


def test_no_two_splits_share_a_stream_whatever_the_seeds():
    states = set()
    draws = 0
    for split, seed, index in itertools.product(tasks.SPLITS, (0, 1, 2, 3, 7, 2**32, 2**32 + 1, 2**64), range(40)):
        sequence = tasks.prompt_rng(seed, split, index).bit_generator.seed_seq
        assert sequence.spawn_key == (tasks.SPLITS[split], index)
        states.add(tuple(sequence.generate_state(8)))
        draws += 1
    assert len(states) == draws
    assert len(set(tasks.SPLITS.values())) == len(tasks.SPLITS)


def test_dev_and_test_prompts_differ():
    texts = {
        split: {
            p.haystack
            for seed in range(6)
            for p in tasks.make_prompts("hops", length=128, count=10, questions_per_task=1, seed=seed, split=split)
        }
        for split in tasks.SPLITS
    }
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == 4 * 60


@pytest.mark.parametrize("length", [-5, 0, 1, 7, 10])
def test_too_short_a_haystack_is_refused(length):
    with pytest.raises(KascadeError, match="at least 11"):
        tasks.make_prompts("hops", length=length, count=1, questions_per_task=1, seed=0)


def test_bad_input_gets_one_line():
    with pytest.raises(KascadeError, match="'four-hop': choose from single-hop"):
        tasks.get_task("four-hop")
    with pytest.raises(KascadeError, match="no silent-three-hop questions"):
        tasks.make_prompt(np.random.default_rng(0), 256, 1, tasks=("silent-three-hop",), layout="pairs")
    with pytest.raises(KascadeError, match="no layout is called"):
        tasks.make_prompt(np.random.default_rng(0), 256, 1, layout="rows")
    with pytest.raises(KascadeError, match="must not be negative"):
        tasks.prompt_rng(-1, "dev", 0)


def test_tasks_do_not_import_torch():
    code = "import sys, kascade_cli.tasks, kascade_cli.demo; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
