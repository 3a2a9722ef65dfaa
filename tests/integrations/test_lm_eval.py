"""lm-evaluation-harness over kascade: equal to attach, padding changes nothing, what ran stands in the results."""

import argparse
import contextlib
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from kascade_cli import Profile, attach
from kascade_cli.app import main
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.models import load_model
from kascade_cli.tasks import make_prompts

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'kascade-cli[eval]'")
pytest.importorskip("lm_eval.models.huggingface")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from kascade_cli.commands.lm_eval import _complete  # noqa: E402
from kascade_cli.integrations.lm_eval import KascadeLM  # noqa: E402

PROFILE = Path(__file__).parents[2] / "profiles" / "demo-small.yaml"
SHARP = {"ratio": 0.05, "min_keys": 16, "dtype": "float32"}
RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")


@pytest.fixture(scope="module")
def demo():
    return load_model("demo-small", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def lm():
    """The small demo model under kascade, reading few keys; batches of 5."""
    model = KascadeLM("demo-small", profile=str(PROFILE), device="cpu", batch_size=5, **SHARP)
    yield model
    model.attachment.detach()


@pytest.fixture(scope="module")
def dense():
    return KascadeLM("demo-small", strategy="dense", device="cpu", batch_size=5, dtype="float32")


@pytest.fixture(scope="module")
def prompts():
    """(haystack with its question, answer), of unequal lengths."""
    found = []
    for length in (150, 211, 290):
        for prompt in make_prompts("single-hop", length=length, count=1, questions_per_task=2, seed=length):
            found += [(f"{prompt.haystack} {question.prompt}", question.answer) for question in prompt.questions]
    return found


@pytest.fixture
def tasks(tmp_path, prompts):
    """A folder with two tasks over the prompts: `hops` writes answers, `choices` scores four of them."""
    answers = [answer for _, answer in prompts]
    with (tmp_path / "hops.jsonl").open("w") as file:
        for index, (prompt, answer) in enumerate(prompts):
            choices = [answers[(index + step) % len(answers)] for step in range(2)]
            file.write(json.dumps({"prompt": prompt, "answer": answer, "choices": choices}) + "\n")
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "hops.jsonl")}}}
    shared |= {"test_split": "test", "doc_to_text": "{{prompt}}"}
    (tmp_path / "hops.yaml").write_text(
        yaml.safe_dump(
            shared
            | {
                "task": "hops",
                "output_type": "generate_until",
                "doc_to_target": "{{answer}}",
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2, "do_sample": False},
                "metric_list": [{"metric": "exact_match"}],
            }
        )
    )
    (tmp_path / "choices.yaml").write_text(
        yaml.safe_dump(
            shared
            | {
                "task": "choices",
                "output_type": "multiple_choice",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": 0,
                "metric_list": [{"metric": "acc"}],
            }
        )
    )
    return tmp_path


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def evaluate(model, tasks, *names):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    result = lm_eval.simple_evaluate(
        model, tasks=list(names), task_manager=manager, log_samples=True, bootstrap_iters=0, verbosity="ERROR"
    )
    return result, {name: [sample["resps"] for sample in result["samples"][name]] for name in names}


def test_answers_are_those_of_attach(tasks, demo, lm, prompts):
    """Generation in padded batches of 5 through the harness, and one by one through `attach`."""
    lm.attachment.reset()
    result, said = evaluate(lm, tasks, "hops")
    model, tokenizer = demo
    with attach(model, Profile.load(PROFILE), ratio=SHARP["ratio"], min_keys=SHARP["min_keys"]) as attachment:
        for (prompt, _), answers in zip(prompts, said["hops"], strict=True):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0
            )
            assert answers == [[tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)]]
        report = attachment.report()
    ran = result["config"]["kascade"]
    assert ran["strategy"] == "kascade"
    assert ran["roles"] == report["roles"]
    assert ran["fingerprint"] == Profile.load(PROFILE).model.fingerprint
    assert ran["profile"].endswith("demo-small.yaml")
    assert 0 < ran["phases"]["prefill"]["density"] < 0.5
    assert ran["phases"]["prefill"]["keys_visible"] == report["phases"]["prefill"]["keys_visible"]
    assert ran["phases"]["prefill"]["keys_read"] == report["phases"]["prefill"]["keys_read"]
    json.dumps(result["config"], default=str, allow_nan=False)


def test_reading_all_keys_is_dense(tasks, dense):
    """Answers and scores, and those of the harness's own model."""
    full = KascadeLM("demo-small", profile=str(PROFILE), ratio=1.0, device="cpu", batch_size=5, dtype="float32")
    plain = load_model("demo-small", device="cpu", dtype="float32")
    own = HFLM(pretrained=plain[0], tokenizer=plain[1], batch_size=5)
    (kascade, said), (_, expected), (harness, theirs) = (
        evaluate(model, tasks, "hops", "choices") for model in (full, dense, own)
    )
    assert said["hops"] == expected["hops"] == theirs["hops"]
    for one, other, third in zip(said["choices"], expected["choices"], theirs["choices"], strict=True):
        ours, dense_scores, hf_scores = map(flat, (one, other, third))
        assert [score for score, _ in ours] == pytest.approx([score for score, _ in dense_scores], abs=1e-4)
        assert [score for score, _ in ours] == pytest.approx([score for score, _ in hf_scores], abs=1e-4)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in hf_scores]
    assert kascade["results"]["hops"] == harness["results"]["hops"]
    assert kascade["config"]["kascade"]["density"] == 1
    assert kascade["results"]["hops"]["exact_match,none"] == 1


def flat(responses):
    """(score, greedy) of each choice."""
    return [(float(score), str(greedy) == "True") for [(score, greedy)] in responses]


def requests(prompts, tokenizer):
    """Contexts of odd lengths; continuations of one to four words, some of them after the same context."""
    words = ["k1", "v2", "v3", "v4", "v5"]
    found = []
    for index, (prompt, answer) in enumerate(prompts):
        context = " ".join(prompt.split()[: -1 - 7 * index])
        for number in range(1 + index % 3):
            found.append((context, " " + words[number]))
        found.append((context, " " + " ".join([answer, *words[:index]])))
    return found


def test_scores_in_padded_batches_are_those_of_single_rows(prompts, lm, demo):
    """Under kascade, where a mask that is missing shows; against one row at a time through `attach`."""
    model, tokenizer = demo
    pairs = requests(prompts, tokenizer)
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    lm.attachment.reset()
    batched = lm.loglikelihood(asked, disable_tqdm=True)
    passes = lm.attachment.report()["forward_passes"]
    expected = []
    with attach(model, Profile.load(PROFILE), ratio=SHARP["ratio"], min_keys=SHARP["min_keys"]), torch.no_grad():
        for context, continuation in pairs:
            before, after = lm._encode_pair(context, continuation)
            # The last token is predicted and never read: as a query it would choose keys with its tile.
            logits = F.log_softmax(model(torch.tensor([(before + after)[:-1]])).logits[0, -len(after) :], -1)
            tokens = torch.tensor(after)
            score = logits.gather(1, tokens[:, None]).sum()
            expected.append((float(score), torch.equal(logits.argmax(-1), tokens)))
    assert [score for score, _ in batched] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in batched] == [greedy for _, greedy in expected]
    different = {tuple(sum(lm._encode_pair(*pair), [])[:-1]) for pair in pairs}
    assert len(different) < len(pairs)
    assert passes == -(-len(different) // 5)  # equal inputs run once

    unmasked = HFLM._loglikelihood_tokens(lm, [(pair, *lm._encode_pair(*pair)) for pair in pairs], True)
    assert max(abs(one[0] - other[0]) for one, other in zip(unmasked, expected, strict=True)) > 0.01


def test_rolling_scores(prompts, dense):
    texts = [(prompt,) for prompt, _ in prompts[:3]]
    asked = [Instance("loglikelihood_rolling", {}, text, index) for index, text in enumerate(texts)]
    model, tokenizer = load_model("demo-small", device="cpu", dtype="float32")
    own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=100)
    ours = KascadeLM("demo-small", strategy="dense", device="cpu", batch_size=3, dtype="float32", max_length=100)
    assert ours.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(
        own.loglikelihood_rolling(asked, disable_tqdm=True), rel=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({}, UsageError, "strategy kascade needs a profile"),
        ({"strategy": "dense", "parallelize": True}, UsageError, "does not take it; use device_map=auto"),
        ({"strategy": "dense", "peft": "x"}, UsageError, r"--model_args peft: .*docs/lm-eval\.md"),
        ({"strategy": "dense", "batch_size": "auto"}, UsageError, "--batch_size auto: give a number"),
        ({"strategy": "oracle", "ratio": 2}, UsageError, "ratio 2 is outside"),
        ({"profile": "no.yaml"}, KascadeError, r"no\.yaml"),
        ({"profile": str(PROFILE), "pretrained": "demo"}, KascadeError, "the profile is for demo-small"),
    ],
)
def test_what_is_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        KascadeLM(**{"pretrained": "demo-small", "device": "cpu"} | arguments)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        KascadeLM("demo-small", strategy="dense")


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of `kascade lm-eval`."""
    argv = list(sys.argv)
    with pytest.raises(SystemExit) as stop:
        main(["lm-eval", *map(str, arguments)])
    assert sys.argv == argv
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


@pytest.fixture
def no_index(monkeypatch):
    """The harness reads thousands of task files before it runs one; here only those of --include_path."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))


def test_the_six_ruler_tasks_that_make_themselves(tmp_path, capsys, monkeypatch, no_index):
    """Through the command line, the tokenizer of a model that only kascade knows included."""
    nltk = pytest.importorskip("nltk")
    words = pytest.importorskip("wonderwords")
    monkeypatch.setattr(nltk.data, "find", lambda *_: "")  # a sentence splitter that these do not use
    few = words.RandomWord()
    few._categories = {kind: list(found)[:200] for kind, found in few._categories.items()}
    monkeypatch.setattr(words, "RandomWord", lambda: few)  # of all pairs of words a list is made and sorted, 10 s
    folder = tmp_path / "ruler"
    folder.mkdir()
    for file in (Path(lm_eval.__file__).parent / "tasks" / "ruler").iterdir():
        if file.suffix in (".py", ".yaml"):  # the same tasks, of which 500 texts each are made and one is asked
            text = file.read_text().replace("num_samples=500", "num_samples=2")
            (folder / file.name).write_text(text.replace("num_samples: int = 500", "num_samples: int = 2"))
    model = f"pretrained=demo-small,profile={PROFILE},dtype=float32,ratio=0.2"
    options = ["--include_path", folder, "--metadata", "max_seq_lengths=[1024]", "--limit", 1]
    options += ["--gen_kwargs", "max_gen_toks=4", "--output_path", tmp_path / "out.json", "--batch_size", 2]
    code, out, err = run(capsys, "--model_args", model, "--tasks", *RULER, *options)
    assert code == 0, err
    [path] = tmp_path.glob("**/out*.json")
    result = json.loads(path.read_text())
    assert set(result["results"]) == set(RULER)
    assert all(0 <= row["1024,none"] <= 1 for row in result["results"].values())
    ran = result["config"]["kascade"]
    assert ran["strategy"] == "kascade"
    assert ran["model"] == "demo-small"
    assert ran["phases"]["prefill"]["density"] < 0.5
    assert ran["phases"]["decode"]["keys_read"] > 0
    assert "kascade (" in out


def test_a_task_through_the_command_line(tasks, capsys, no_index):
    model = "pretrained=demo-small,strategy=streaming-llm:ratio=0.3"
    output = tasks / "out.json"
    options = ["--tasks", "hops", "--include_path", tasks, "--output_path", output, "--device", "cpu"]
    code, out, err = run(capsys, "run", "--model", "kascade", "--model_args", model, *options)
    assert code == 0, err
    [path] = tasks.glob("**/out*.json")
    ran = json.loads(path.read_text())["config"]["kascade"]
    assert (ran["strategy"], ran["setting"], ran["profile"]) == ("streaming-llm", "streaming-llm:ratio=0.3", None)
    code, out, err = run(capsys, "--model_args", "pretrained=demo-small", *options)
    assert (code, err.splitlines()[-1]) == (2, "error: strategy kascade needs a profile (--profile)")
    code, out, err = run(capsys, "run", "--help")
    assert code == 0
    assert "--model_args" in out
    assert "lm-eval run" in out


def test_without_the_extra(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = run(capsys, "ls", "tasks")
    assert (code, err) == (1, "error: lm_eval is not installed: pip install 'kascade-cli[eval]'\n")


def test_tasks_that_measure_tokens_get_the_tokenizer_of_a_gguf(tmp_path, make_tiny_model, byte_tokenizer):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from transformers import AutoTokenizer

    from tests.gguf_files import write_gguf

    path = write_gguf(tmp_path / "m.gguf", make_tiny_model("llama", vocab=len(byte_tokenizer)).float(), byte_tokenizer)
    with contextlib.ExitStack() as stack:
        parsed = argparse.Namespace(config=None, model=None, device=None, metadata={"a": 1})
        parsed.model_args = {"pretrained": str(path)}
        _complete(parsed, stack)
        assert (parsed.model, parsed.device, parsed.metadata["a"]) == ("kascade", "auto", 1)
        found = AutoTokenizer.from_pretrained(parsed.metadata["tokenizer"])
        assert found("k1 v2 x").input_ids == byte_tokenizer("k1 v2 x").input_ids
    assert not Path(parsed.metadata["tokenizer"]).exists()
    other = argparse.Namespace(config=None, model="hf", device=None, metadata=None, model_args={"pretrained": "demo"})
    _complete(other, stack)
    assert (other.model, other.device, other.metadata) == ("hf", None, None)

    lm = KascadeLM(str(path), strategy="oracle", device="cpu", ratio=0.5)
    assert lm.get_model_info()["kascade"]["model"] == "m"
    [(score, _)] = lm.loglikelihood([Instance("loglikelihood", {}, ("k1 v2", " k3"), 0)], disable_tqdm=True)
    assert score < 0
