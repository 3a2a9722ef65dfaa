import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kascade_cli import tasks
from kascade_cli.demo import DEMO_MODELS
from kascade_cli.errors import KascadeError
from kascade_cli.tasks.vocabulary import WORDS


@pytest.fixture(scope="module")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODELS["demo"])


@pytest.mark.parametrize("name", ["demo_tokenizer", "byte_tokenizer"])
@pytest.mark.parametrize("length", [33, 500])
def test_spans_hold_exactly_the_answers(name, length, request):
    tokenizer = request.getfixturevalue(name)
    tasks.check_words(tokenizer)
    for prompt in tasks.make_prompts("hops", length=length, count=3, questions_per_task=3, seed=2):
        encoded = tasks.encode_prompt(prompt, tokenizer)
        for question, (start, stop) in zip(prompt.questions, encoded.answers, strict=True):
            assert tokenizer.decode(encoded.ids[start:stop]).split() == question.answer.split()
            assert tokenizer.decode(encoded.ids[:start], skip_special_tokens=False).split()[-2:] == (
                question.prompt.split()
            )
        text = tokenizer.decode(encoded.ids, skip_special_tokens=True)
        assert text.split() == prompt.text().split()
        predicted = [encoded.ids[p + 1] for p in encoded.answer_positions]
        assert predicted == [t for start, stop in encoded.answers for t in encoded.ids[start:stop]]


def test_the_demo_tokenizer_writes_one_token_a_word_and_one_bos(demo_tokenizer):
    prompt = tasks.make_prompts("hops", length=777, count=1, questions_per_task=2, seed=0)[0]
    encoded = tasks.encode_prompt(prompt, demo_tokenizer)
    assert encoded.haystack_tokens == 777
    assert encoded.ids[0] == demo_tokenizer.bos_token_id
    assert encoded.ids.count(demo_tokenizer.bos_token_id) == 1
    assert encoded.ids[1:] == [WORDS.index(word) for word in prompt.text().split()]


def test_missing_words_are_named():
    words = {word: i for i, word in enumerate(w for w in WORDS if w not in ("v7", "<r1>"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(KascadeError, match=r"lacks words of the built-in tasks \(<r1> v7\)"):
        tasks.check_words(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
