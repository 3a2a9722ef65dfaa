"""Tasks in natural language: what is asked can be found in the text, lengths fit, splits share nothing."""

import re
from collections import Counter

import pytest

from kascade_cli.devset import default_devset, load_devset
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.tasks.natural import (
    MIX,
    MIX_TASKS,
    MIXED,
    NATURAL,
    Draw,
    dialogue,
    natural_names,
    open_corpus,
    questions,
)
from kascade_cli.tasks.natural.splits import OWNERS, owner
from kascade_cli.tasks.scoring import score_answer
from tests.toy_tokenizers import TEMPLATE, trained


@pytest.fixture(scope="module")
def corpus():
    return open_corpus()


@pytest.fixture(scope="module")
def tokenizer(corpus):
    import numpy as np

    texts = corpus.take(np.random.default_rng(0), "prose", "dev", 40_000)
    return trained(texts + corpus.take(np.random.default_rng(1), "code", "dev", 40_000), TEMPLATE)


@pytest.mark.parametrize("name", NATURAL)
@pytest.mark.parametrize("split", ["dev", "test"])
def test_answers_are_in_the_text_and_follow_from_it(name, split, corpus):
    """An independent reader of each kind of text finds what the task says is the answer."""
    text = NATURAL[name].make(Draw(3, split, 5), corpus, 9000, 3)
    assert 0.8 * 9000 < len(text.body) < 1.2 * 9000
    for asked in text.asked:
        assert list(asked.answers) == read(name, text.body, asked.question)


def read(name, body, question):
    if name.startswith("niah"):
        asked = question.split(" for ")[1].removesuffix(" mentioned in the provided text?")
        keys = re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[a-z]+-[a-z]+", asked)
        needles = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", body)
        order = {key: [value for k, value in needles if k == key] for key in keys}
        found = [value for key in keys for value in order[key]]
        # The values of one key are asked for in the order drawn, and hidden anywhere.
        return found if len(found) == len(keys) else Unordered(found)
    if name == "vt":
        value = re.search(r"value (\d+)", question)[1]
        lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", body)
        holds = [variable for variable, given in lines if given == value]
        while True:
            more = [variable for variable, given in lines if given in holds and variable not in holds]
            if not more:
                return holds
            holds += more
    if name in ("cwe", "fwe"):
        count = Counter(re.findall(r"[a-z]+", body))
        most = [word for word, _ in count.most_common(10 if name == "cwe" else 3)]
        return Unordered(most)
    if name == "qa_multihop":
        person = re.search(r"(?:where|teacher of) ([A-Z]\w+ [A-Z]\w+)", question)[1]
        born = dict(re.findall(r"(?:^|\n)([A-Z]\w+ [A-Z]\w+) was born in (\w+)\.", body))
        taught = dict(re.findall(r"([A-Z]\w+ [A-Z]\w+) was taught by ([A-Z]\w+ [A-Z]\w+)", body))
        rivers = dict(re.findall(r"(\w+) is a town on the river (\w+)\.", body))
        mayors = dict(re.findall(r"The mayor of (\w+) is ([A-Z]\w+ [A-Z]\w+)\.", body))
        if "river" in question:
            return [rivers[born[person]]]
        teacher = taught[re.search(r"teacher of ([A-Z]\w+ [A-Z]\w+)", question)[1]]
        return [born[teacher]] if "In which town" in question else [mayors[born[teacher]]]
    shown = re.search(r"```python\n(.*)\n```", question, re.S)[1]
    assert body.count(shown + "\n") == 1
    return [body.split(shown + "\n")[1].split("\n")[0].strip()]


class Unordered(list):
    """A list that equals another one of the same words."""

    def __eq__(self, other):
        return sorted(self) == sorted(other)

    __hash__ = None


def test_splits_share_no_word_number_fact_or_passage(corpus):
    owned = {split: set() for split in OWNERS}
    for split in OWNERS:
        for name in ("niah_multikey_1", "niah_multikey_3", "vt", "qa_multihop", "fwe"):
            for index in range(4):
                text = NATURAL[name].make(Draw(0, split, index), corpus, 6000, 4)
                for asked in text.asked:
                    assert {owner(answer) for answer in asked.answers} == {split}
                    owned[split] |= set(asked.answers)
    pairs = [("dev", "test"), ("dev", "held-out"), ("test", "held-out")]
    assert not any(owned[a] & owned[b] for a, b in pairs)
    passages = {
        split: {
            " ".join(passage.split())
            for kind in corpus.documents.values()
            for document in kind[split]
            for passage in document
            if len(" ".join(passage.split())) >= 60
        }
        for split in OWNERS
    }
    assert all(len(found) > 500 for found in passages.values())
    assert not any(passages[a] & passages[b] for a, b in pairs)


@pytest.mark.parametrize("name", ["niah_multikey_1", "vt", "qa_multihop", "code_completion", "cwe"])
@pytest.mark.parametrize("length", [1111, 2500])
def test_prompts_have_the_length_and_the_answer_follows(name, length, corpus, tokenizer):
    text, context, added = questions(NATURAL[name], tokenizer, corpus, Draw(1, "test", 2), length, 3, True)
    longest = len(context) + max(map(len, added))
    assert 0.9 * (length - NATURAL[name].new_tokens) < longest <= length - NATURAL[name].new_tokens
    for asked, ids in zip(text.asked, added, strict=True):
        prompt = tokenizer.decode(context + ids)
        assert prompt.startswith("<|user|>\n")
        assert prompt.endswith("<|assistant|>\n" + asked.prefix)
        assert asked.question in prompt


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("index", range(12))
def test_spans_of_a_dialogue_hold_the_answers(index, chat, corpus, tokenizer):
    prompt = dialogue(MIX, tokenizer, corpus, Draw(0, "dev", index), 1500, chat)
    assert len(prompt.ids) <= 1500
    found = [tokenizer.decode(prompt.ids[start:stop]).strip() for start, stop in prompt.answers]
    again = dialogue(MIX, tokenizer, corpus, Draw(0, "dev", index), 1500, chat)
    assert again == prompt
    if not found:
        assert prompt.questions == []
        return
    assert prompt.answers[-1][1] == len(prompt.ids)  # it ends with the last answer
    text = tokenizer.decode(prompt.ids)
    place = 0
    for answer in found:  # in order, each behind the one before
        place = text.index(answer, place) + len(answer)
    for start, stop in prompt.questions:
        asked = tokenizer.decode(prompt.ids[start:stop])
        assert "?" in asked or "Write that line" in asked or "Find all" in asked
        assert any(start < begin and end <= stop for begin, end in prompt.answers)


def test_the_mix_is_the_dev_set_of_tokenizers_without_the_demo_words(tokenizer):
    assert default_devset(tokenizer) == MIX
    first = load_devset(MIX, tokenizer, num_prompts=3, max_length=1200, seed=4)
    more = load_devset(MIX, tokenizer, num_prompts=5, max_length=1200, seed=4)
    assert more.prompts[:3] == first.prompts
    held_out = load_devset(MIX, tokenizer, num_prompts=5, max_length=1200, seed=4, held_out=True)
    assert held_out.name == "mix/held-out"
    assert not {tuple(ids) for ids in held_out.prompts} & {tuple(ids) for ids in more.prompts}
    assert natural_names(MIX) == MIX_TASKS
    taken = more.take([0, 3])
    assert (taken.prompts, taken.answers) == ([more.prompts[0], more.prompts[3]], [more.answers[0], more.answers[3]])


def test_a_haystack_of_the_users(tmp_path, tokenizer):
    for number in range(12):
        lines = "\n\n".join(
            f"Paragraph {number}.{i}: " + "the grey goose flies over the hills. " * 4 for i in range(40)
        )
        (tmp_path / f"{number}.txt").write_text(lines)
    corpus = open_corpus(tmp_path)
    text = NATURAL["niah_multikey_1"].make(Draw(0, "test", 0), corpus, 4000, 2)
    assert text.body.count("grey goose") > 50
    with pytest.raises(KascadeError, match="is too short: its prose for the test split has"):
        NATURAL["niah_multikey_1"].make(Draw(0, "test", 0), corpus, 4_000_000, 2)
    with pytest.raises(KascadeError, match="holds no source code"):
        NATURAL["code_completion"].make(Draw(0, "test", 0), corpus, 4000, 2)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for path, problem in ((tmp_path / "none", "No such file"), (tmp_path / "binary", "not a text file")):
        with pytest.raises(KascadeError, match=problem):
            open_corpus(path)
    with pytest.raises(UsageError, match="--haystack is for tasks in natural language"):
        load_devset("hops", tokenizer, num_prompts=1, max_length=500, seed=0, haystack=str(tmp_path))


def test_lengths_and_templates_that_cannot_be(corpus, tokenizer):
    with pytest.raises(KascadeError, match="100 tokens cannot hold the task qa_multihop"):
        load_devset("qa_multihop", tokenizer, num_prompts=1, max_length=100, seed=0)
    plain = trained(["some words to learn from"] * 3)
    with pytest.raises(UsageError, match="has no chat template"):
        load_devset(MIX, plain, num_prompts=1, max_length=2000, seed=0, chat_template=True)


def test_scores():
    assert score_answer("It is 12 and 7.", ["12", "7", "9"], "all") == pytest.approx(2 / 3)
    assert score_answer("no", ["12", "7"], "any") == 0
    assert score_answer("PARIS, of course", ["london", "paris"], "any") == 1
    assert score_answer("v3  v90", ["v3 v90"], "exact") == 1
    assert score_answer("v3 v90 v1", ["v3 v90"], "exact") == 0


def test_lengths_in_turn_and_every_task_in_every_length(tokenizer):
    lengths, turn, task = [500, 300, 400], len(MIXED), "niah_single_1"

    def devset(length, **options):
        return load_devset(task, tokenizer, num_prompts=3 * turn, max_length=length, seed=4, **options)

    found, alike = devset(500, lengths=lengths), {length: devset(length) for length in lengths}
    seen = {index: set() for index in range(turn)}
    for index, ids in enumerate(found.prompts):
        (length,) = [length for length in lengths if alike[length].prompts[index] == ids]
        seen[index % turn].add(length)
    assert all(each == set(lengths) for each in seen.values())
