import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kascade_cli.demo import DEMO_MODELS
from kascade_cli.devset import check_source, ids_sha256, load_devset
from kascade_cli.errors import KascadeError, UsageError

WORDS = [f"t{i}" for i in range(400)]
TEMPLATE = "{{ bos_token }}{% for m in messages %} <{{ m.role }}> {{ m.content }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %} <assistant>{% endif %}"


def make_tokenizer(*, bos=True, eos=False, template=None):
    """Words t0 .. t399 and chat markers; adds BOS (and EOS) itself as Llama's tokenizers do."""
    vocabulary = ["<unk>", "<s>", "</s>", "<user>", "<assistant>", "<system>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        single = "<s> $A </s>" if eos else "<s> $A"
        specials = [("<s>", 1), ("</s>", 2)] if eos else [("<s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODELS["demo"])


def text(start, count=80):
    return " ".join(WORDS[(start * 7 + i) % len(WORDS)] for i in range(count))


def write_jsonl(path, records):
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    return str(path)


def load(source, tokenizer, **options):
    return load_devset(source, tokenizer, **{"num_prompts": 100, "max_length": 64, "seed": 0, **options})


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "dev.jsonl", [{"text": text(i)} for i in range(20)])


def test_every_kind_of_file_gives_the_same_prompts(tmp_path, tokenizer, jsonl):
    texts = [text(i) for i in range(20)]
    pq.write_table(pa.table({"id": list(range(20)), "text": texts}), tmp_path / "dev.parquet")
    folder = tmp_path / "texts" / "deeper"
    folder.mkdir(parents=True)
    for i, content in enumerate(texts):
        (folder / f"{i:02}.txt").write_text(content)
    (folder / "notes.md").write_text("not a document")
    sets = [load(s, tokenizer) for s in (jsonl, str(tmp_path / "dev.parquet"), str(tmp_path / "texts"))]
    assert sets[0].prompts == sets[1].prompts == sets[2].prompts
    assert len({s.sha256 for s in sets}) == 1
    expected = {tuple(tokenizer(t)["input_ids"][:64]) for t in texts}
    assert set(map(tuple, sets[0].prompts)) <= expected


def test_the_choice_follows_the_seed(tokenizer, jsonl):
    few, many = load(jsonl, tokenizer, num_prompts=5), load(jsonl, tokenizer, num_prompts=9)
    assert many.prompts[:5] == few.prompts
    assert load(jsonl, tokenizer, num_prompts=5) == few
    other = load(jsonl, tokenizer, num_prompts=5, seed=1)
    assert other.sha256 != few.sha256
    assert other.prompts != few.prompts


@pytest.mark.parametrize("documents", [4, 7, 20, 33])
def test_held_out_prompts_are_disjoint_and_nothing_is_lost(tmp_path, tokenizer, documents):
    source = write_jsonl(tmp_path / "d.jsonl", [{"text": text(i)} for i in range(documents)])
    kept = load(source, tokenizer)
    out = load(source, tokenizer, held_out=True)
    assert len(out.prompts) == documents // 4
    both = [tuple(p) for p in kept.prompts + out.prompts]
    assert len(set(both)) == len(both) == documents
    # Disjoint however many prompts either side asks for.
    assert load(source, tokenizer, num_prompts=1, held_out=True).prompts == out.prompts[:1]
    assert out.name != kept.name


def test_documents_equal_up_to_the_maximum_length_count_once(tmp_path, tokenizer):
    records = [{"text": text(0) + f" {WORDS[i]}"} for i in range(12)] + [{"text": text(i)} for i in range(1, 8)]
    source = write_jsonl(tmp_path / "d.jsonl", records)
    kept, out = load(source, tokenizer), load(source, tokenizer, held_out=True)
    both = [tuple(p) for p in kept.prompts + out.prompts]
    assert len(set(both)) == len(both) == 8
    assert kept.duplicates == 11
    assert "11 duplicates dropped" in kept.notes()


def test_short_documents_are_dropped_and_counted(tmp_path, tokenizer):
    lengths = [1, 10, 62, 63, 64, 200, 5]  # tokens without BOS: 64 with it is just enough
    source = write_jsonl(tmp_path / "d.jsonl", [{"text": text(i, n)} for i, n in enumerate(lengths)])
    kept = load(source, tokenizer, max_length=100)
    assert kept.too_short == 4
    assert sorted(map(len, kept.prompts)) == [64, 65, 100]
    assert kept.notes() == ["4 documents shorter than 64 tokens dropped"]
    short = write_jsonl(tmp_path / "s.jsonl", [{"text": text(i, 10)} for i in range(3)])
    with pytest.raises(KascadeError, match="no prompts left.*3 of 3 documents are shorter than 64 tokens"):
        load(short, tokenizer)
    assert len(load(short, tokenizer, max_length=8).prompts) == 3


def test_one_line_when_nothing_is_held_out(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "d.jsonl", [{"text": text(i)} for i in range(3)])
    with pytest.raises(KascadeError, match="3 usable documents, and only every 4th is held out"):
        load(source, tokenizer, held_out=True)


@pytest.mark.parametrize("prefix", ["", "<s> ", "<s> <s> "])
def test_never_two_bos_tokens(tmp_path, prefix):
    source = write_jsonl(tmp_path / "d.jsonl", [{"text": prefix + text(i)} for i in range(4)])
    for ids in load(source, make_tokenizer(), max_length=200).prompts:
        assert ids[0] == 1
        assert ids.count(1) == 1


def test_a_tokenizer_without_bos_gets_none_and_eos_is_not_appended(jsonl):
    plain = load(jsonl, make_tokenizer(bos=False), max_length=500).prompts
    ended = load(jsonl, make_tokenizer(eos=True), max_length=500).prompts
    assert all(len(ids) == 80 for ids in plain)
    assert all(len(ids) == 81 and ids[0] == 1 and 2 not in ids for ids in ended)


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("{{ bos_token }}", "")])
def test_the_chat_template_is_applied_once_without_a_second_bos(jsonl, template):
    tokenizer = make_tokenizer(template=template)
    off = load(jsonl, tokenizer, max_length=500)
    on = load(jsonl, tokenizer, max_length=500, chat_template=True)
    assert [len(ids) for ids in off.prompts] == [81] * 15
    written = 1 if "bos" in template else 0
    for plain, chat in zip(off.prompts, on.prompts, strict=True):
        assert chat.count(1) == written
        assert chat[written:] == [3, *plain[1:], 4]


def test_chats_use_the_template_unless_it_is_switched_off(tmp_path):
    tokenizer = make_tokenizer(template=TEMPLATE)
    chat = [{"role": "system", "content": text(1)}, {"role": "user", "content": text(2)}]
    shared = [{"from": "human", "value": text(3)}, {"from": "gpt", "value": text(4)}]
    source = write_jsonl(tmp_path / "c.jsonl", [{"messages": chat}, {"conversations": shared}])
    prompts = load(source, tokenizer, max_length=500).prompts
    assert {tuple(tokenizer.decode(p).split()) for p in prompts} == {
        ("<s>", "<system>", *text(1).split(), "<user>", *text(2).split(), "<assistant>"),
        ("<s>", "<user>", *text(3).split(), "<assistant>", *text(4).split()),
    }
    off = load(source, tokenizer, max_length=500, chat_template=False).prompts
    assert sorted(map(len, off)) == [161, 161]
    assert all(not {3, 4, 5} & set(ids) for ids in off)


def test_text_field(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "d.jsonl", [{"title": "t1", "body": text(i)} for i in range(4)])
    assert len(load(source, tokenizer, text_field="body").prompts) == 3
    with pytest.raises(KascadeError, match="no known text field, choose one with --text-field: title, body"):
        load(source, tokenizer)
    with pytest.raises(KascadeError, match="no field 'story'"):
        load(source, tokenizer, text_field="story")


@pytest.mark.parametrize("task", ["hops", "pairs", "silent-two-hop"])
@pytest.mark.parametrize("max_length", [64, 257, 1024])
def test_built_in_tasks(demo_tokenizer, task, max_length):
    options = {"num_prompts": 4, "max_length": max_length}
    kept = load(task, demo_tokenizer, **options)
    out = load(task, demo_tokenizer, held_out=True, **options)
    assert len(kept.prompts) == len(out.prompts) == len(kept.answer_positions) == 4
    assert not set(map(tuple, kept.prompts)) & set(map(tuple, out.prompts))
    for ids, positions in zip(kept.prompts, kept.answer_positions, strict=True):
        assert 0.8 * max_length <= len(ids) <= max_length
        assert ids.count(demo_tokenizer.bos_token_id) == 1
        assert positions == sorted(set(positions))
        # What follows an answer position is a value, or the written key of an explicit two-hop.
        answers = [demo_tokenizer.decode(ids[p + 1]) for p in positions]
        assert all(word[0] in "kv" for word in answers)
    assert load(task, demo_tokenizer, **options) == kept
    assert load(task, demo_tokenizer, num_prompts=2, max_length=max_length).prompts == kept.prompts[:2]


def test_dev_prompts_never_meet_test_prompts(demo_tokenizer):
    from kascade_cli import tasks

    seen = set()
    for seed in range(5):
        seen |= {
            tuple(p[:100]) for p in load("hops", demo_tokenizer, num_prompts=6, max_length=256, seed=seed).prompts
        }
    for seed in range(5):
        for prompt in tasks.make_prompts("hops", length=256, count=6, questions_per_task=2, seed=seed):
            assert tuple(tasks.encode_prompt(prompt, demo_tokenizer).ids[:100]) not in seen


def test_sha256_is_over_the_ids_in_order():
    assert ids_sha256([1, 2], [3]) != ids_sha256([1], [2, 3]) != ids_sha256([1, 2, 3])
    assert ids_sha256([1, 2], [3]) != ids_sha256([3], [1, 2])
    assert ids_sha256([7, 300]) == "b766d5c0452e83a979b9fd5259d7bd79f6bf7fa679412edc805793c898ffed53"


@pytest.fixture
def fake_hub(monkeypatch):
    """A stand-in for `datasets` that records how it was called."""
    calls = []

    def load_dataset(*arguments, split):
        calls.append((arguments, split))
        if "missing" in arguments[0]:
            raise FileNotFoundError("Dataset doesn't exist\nsecond line")
        return [{"text": text(i)} for i in range(8)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_hub_ids(fake_hub, tokenizer):
    for source, call in (
        ("org/set", (("org/set",), "train")),
        ("org/set:validation", (("org/set",), "validation")),
        ("org/set:en:test", (("org/set", "en"), "test")),
    ):
        assert len(load(source, tokenizer).prompts) == 6
        assert fake_hub[-1] == call
    with pytest.raises(KascadeError, match="cannot load 'train' of the dataset org/missing: Dataset doesn't exist$"):
        load("org/missing", tokenizer)


def test_a_missing_package_is_named(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(KascadeError, match=r"pip install 'kascade-cli\[hub\]'"):
        load("org/set", tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b"[1, 2]\n", "record 1: expected an object with a text field, got list"),
        ("a.jsonl", b'{"text": 5}\n', "field 'text' is neither text nor a list of chat messages"),
        ("a.jsonl", b'{"messages": [{"text": "x"}]}\n', "a chat message needs `role` and `content`"),
        ("a.jsonl", b"", "holds no documents"),
        ("a.parquet", b"PAR1 no more", "not a parquet file"),
        ("a.csv", b"x,y", "a dev set is a .jsonl or .parquet file or a folder"),
    ],
)
def test_bad_files_get_one_line(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KascadeError, match=message) as caught:
        load(str(tmp_path / name), tokenizer)
    assert "\n" not in str(caught.value)


def test_bad_requests_get_one_line(tmp_path, tokenizer, demo_tokenizer, jsonl):
    (tmp_path / "empty").mkdir()
    for source, options, error, message in (
        ("nowhere.jsonl", {}, KascadeError, "cannot read nowhere.jsonl: No such file"),
        ("nonsense", {}, KascadeError, "no dev set 'nonsense'"),
        (str(tmp_path / "empty"), {}, KascadeError, "holds no .txt files"),
        (jsonl, {"num_prompts": 0}, UsageError, "at least one prompt"),
        (jsonl, {"max_length": 0}, UsageError, "must be positive"),
        (jsonl, {"chat_template": True}, UsageError, "no chat template"),
        ("hops", {"chat_template": True}, UsageError, "is plain text"),
        ("hops", {}, KascadeError, "lacks words of the built-in tasks"),
        ("", {}, KascadeError, "no dev set ''"),
    ):
        with pytest.raises(error, match=message):
            load(source, tokenizer, **options)


def test_what_is_no_dev_set_is_refused_without_reading(tmp_path, jsonl):
    check_source("hops")
    check_source(str(tmp_path))
    check_source(jsonl, "body", True)
    (tmp_path / "notes.md").write_text("x")
    for source, options, error, message in (
        ("nowhere.jsonl", (), KascadeError, "cannot read nowhere.jsonl: No such file"),
        ("nonsense", (), KascadeError, "no dev set 'nonsense'"),
        (str(tmp_path / "notes.md"), (), KascadeError, "notes.md: a dev set is a .jsonl"),
        ("hops", ("body",), UsageError, "'hops' is plain text without fields: leave --text-field out"),
        (str(tmp_path), ("body",), UsageError, "plain text without fields: leave --text-field out"),
        ("hops", (None, True), UsageError, "'hops' is plain text: leave --chat-template out"),
    ):
        with pytest.raises(error, match=message):
            check_source(source, *options)


@pytest.mark.parametrize("source", ["single-hop", "pairs", "hops"])
@pytest.mark.parametrize("words", ["demo_tokenizer", "byte_tokenizer"])
def test_a_length_too_short_for_a_task_names_the_least_that_works(request, source, words):
    tokenizer = request.getfixturevalue(words)
    with pytest.raises(KascadeError) as error:
        load(source, tokenizer, max_length=5, num_prompts=3)
    message = str(error.value)
    least = int(message.rpartition(" ")[2])
    assert message == f"5 tokens cannot hold the task '{source}': take at least {least}"
    for prompt in load(source, tokenizer, max_length=least, num_prompts=3).prompts:
        assert len(prompt) <= least
    with pytest.raises(KascadeError, match=f"take at least {least}$"):
        load(source, tokenizer, max_length=least - 1, num_prompts=3)


def test_files_that_are_not_utf8_are_refused_where_they_go_wrong(tmp_path, tokenizer):
    """As `--prompt-file` is; a replacement character in a capture would never be seen again."""
    lines = [json.dumps({"text": text(i)}).encode() for i in range(5)]
    lines[3] = lines[3].replace(b"t30", b"t3\xe9")  # Latin-1
    at = lines[3].index(b"\xe9") + 1
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(KascadeError) as error:
        load(str(tmp_path / "d.jsonl"), tokenizer)
    assert str(error.value) == f"{tmp_path}/d.jsonl, line 4: not UTF-8 at byte {at} (0xe9)"
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(text(1))
    (folder / "b.txt").write_bytes(text(2).encode("utf-16"))
    with pytest.raises(KascadeError, match=r"texts/b\.txt: not UTF-8 at byte 1 \(0xff\)$"):
        load(str(folder), tokenizer)
    broken = pa.array([text(i).encode() for i in range(3)] + [b"t1 \xe9 t2"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "d.parquet")
    with pytest.raises(KascadeError, match=r"d\.parquet, record 4: not UTF-8 at byte 4$"):
        load(str(tmp_path / "d.parquet"), tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a \\ud800 b"}', r"record 1, field 'text': holds half of a surrogate pair"),
        ('"a \\udfff b"', r"record 1: holds half of a surrogate pair"),
        ('{"text": [{"role": "user", "content": "\\ud9ab"}]}', r"field 'text': holds half of a surrogate pair"),
        ('{"text": ' + "9" * 5000 + "}", r"line 1: not JSON \(too deep, or too long a number\)"),
        ("[" * 200_000, r"line 1: not JSON \(too deep, or too long a number\)"),
    ],
)
def test_json_that_python_reads_and_no_tokenizer_can(tmp_path, tokenizer, line, message):
    (tmp_path / "d.jsonl").write_text(line)
    with pytest.raises(KascadeError, match=message) as error:
        load(str(tmp_path / "d.jsonl"), tokenizer)
    assert "\n" not in str(error.value)


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "' + text(1) + ' \\ud83d\\ude00"}')
    assert len(load(str(tmp_path / "d.jsonl"), make_tokenizer()).prompts) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 999_000_000}, "999000000 tokens is beyond any model: take at most 16777216"),
        ({"max_length": 10**20}, "is beyond any model"),
        ({"max_length": 1 << 24, "num_prompts": 17}, "17 prompts of 16777216 tokens do not fit in memory.*most 16"),
        ({"max_length": 4096, "num_prompts": 10**9}, "do not fit in memory"),
        ({"max_length": 4097, "positions": 4096}, "the model takes 4096 tokens, not 4097: pass --max-length 4096"),
    ],
)
def test_absurd_lengths_are_refused_before_anything_is_built(demo_tokenizer, monkeypatch, options, message):
    import kascade_cli.devset as devset

    monkeypatch.setattr(devset, "make_prompt", lambda *_, **__: pytest.fail("a prompt was built"))
    with pytest.raises(UsageError, match=message):
        load("hops", demo_tokenizer, **options)


def test_documents_may_be_shorter_than_asked_for(jsonl, tokenizer):
    """A file's prompts are as long as they are: the model's positions bound them when they are captured."""
    assert load(jsonl, tokenizer, max_length=1 << 24, positions=512).prompts
