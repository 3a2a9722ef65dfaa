"""`kascade profile` as a user meets it: output, options, mistakes."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from kascade_cli.app import main
from kascade_cli.capture.store import open_capture
from kascade_cli.demo import DEMO_MODELS
from tests.capture.conftest import make_model

SMALL = ["--max-length", "256", "--num-prompts", "2", "--tiles-per-prompt", "6"]


@pytest.fixture
def kascade(capsys):
    """Runs the command line: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


@pytest.fixture
def save_model(tmp_path):
    """Saves a random model with the demo tokenizer; returns its folder."""
    from transformers import AutoTokenizer

    def save(family, **changes):
        folder = tmp_path / family
        make_model(family, vocab_size=512, **changes).save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(DEMO_MODELS["demo-small"])).save_pretrained(folder)
        return folder

    return save


def test_json_is_one_document_and_says_what_was_captured(kascade, tmp_path):
    path = tmp_path / "c.h5"
    code, out, err = kascade("profile", "demo-small", "-o", path, "--json", *SMALL)
    assert code == 0
    document = json.loads(out)
    with open_capture(path) as capture:
        assert capture.complete
        assert document["prompts"] == len(capture) == 2
        assert document["tokens"] == sum(prompt.n_tokens for prompt in capture)
        assert document["bytes"] == path.stat().st_size
        importance = np.mean([prompt.importance for prompt in capture], axis=0)
        assert [row["importance"] for row in document["layers"]] == pytest.approx(importance.tolist(), abs=1e-6)
        assert capture.meta["options"]["tiles_per_prompt"] == 6
    assert document["tiles"] == {"prefill": 6, "decode": 6}
    assert [row["layer"] for row in document["layers"]] == list(range(8))
    assert "will take about" in " ".join(err.split())
    assert "before compression" in " ".join(err.split())


def test_people_get_a_table_and_a_complete_capture_stays(kascade, tmp_path):
    path = tmp_path / "c.h5"
    code, out, _ = kascade("profile", "demo-small", "-o", path, *SMALL)
    assert code == 0
    assert "worst head" in out
    assert "2 prompts, " in out
    before = path.read_bytes()
    code, out, err = kascade("profile", "demo-small", "-o", path, *SMALL)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "complete capture (2 prompts); pass --overwrite" in err
    code, out, _ = kascade("profile", "demo-small", "-o", path, "--resume", *SMALL)
    assert code == 0
    assert "2 prompts (2 of them earlier)" in " ".join(out.split())
    assert path.read_bytes() == before
    code, _, err = kascade("profile", "demo-small", "-o", path, "--resume", *SMALL, "--seed", "1")
    assert code == 2
    assert "--seed was 0, now 1" in err
    other = tmp_path / "other"
    shutil.copytree(DEMO_MODELS["demo"], other)
    code, _, err = kascade("profile", other, "-o", path, "--resume", "--dev-set", "pairs", *SMALL)
    assert code == 2
    assert "the model was demo-small" in err
    assert path.read_bytes() == before
    assert kascade("profile", "demo-small", "-o", path, "--overwrite", *SMALL, "--seed", "1")[0] == 0
    with open_capture(path) as capture:
        assert capture.meta["seed"] == 1


def test_a_dev_set_that_is_none_is_refused_before_the_model_is_loaded(kascade, tmp_path, monkeypatch):
    monkeypatch.setattr("kascade_cli.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    for source in ("nowhere.jsonl", "nowhere", "nowhere.parquet"):
        code, out, err = kascade("profile", "demo-small", "-o", tmp_path / "c.h5", "--dev-set", source)
        assert (code, out) == (1, "")
        assert err.startswith("error: ")
        assert source in err


def test_other_options_are_refused_before_the_model_is_loaded(kascade, tmp_path, monkeypatch):
    path, damaged, texts = tmp_path / "c.h5", tmp_path / "d.h5", tmp_path / "texts.jsonl"
    texts.write_text("")
    assert kascade("profile", "demo-small", "-o", path, *SMALL, "--dtype", "float32")[0] == 0
    damaged.write_bytes(path.read_bytes()[:5000])
    before = path.read_bytes()
    monkeypatch.setattr("kascade_cli.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    resume = ["profile", "demo-small", "-o", path, "--resume", *SMALL]
    for changed, line in (
        (["--num-prompts", "3"], "--num-prompts was 2, now 3"),
        (["--max-length", "300"], "--max-length was 256, now 300"),
        (["--tiles-per-prompt", "all"], "--tiles-per-prompt was 6, now all"),
        (["--tile", "16"], "--tile was 32, now 16"),
        (["--decode-tokens", "3"], "--decode-tokens was 0, now 3"),
        (["--seed", "7"], "--seed was 0, now 7"),
        (["--no-chat-template"], "--chat-template was not given, now --no-chat-template"),
        (["--dtype", "bf16"], "--dtype was float32, now bfloat16"),
        (["--dev-set", "hops"], "--dev-set was pairs, now hops"),
        (["--dev-set", texts], f"--dev-set was pairs, now {texts}"),
        (["--dev-set", texts, "--text-field", "body"], "--text-field was not given, now body"),
    ):
        code, out, err = kascade(*resume, *changed)
        assert (code, out) == (2, ""), err
        assert err.startswith(f"error: cannot resume {path}: {line}; ")
        assert len(err.splitlines()) == 1
    code, _, err = kascade("profile", "demo-small", "-o", damaged, "--resume", *SMALL)
    assert code == 1
    assert "truncated" in err
    assert path.read_bytes() == before


@pytest.mark.parametrize("family", ["Gemma3Text", "Phi3"])
def test_saved_models_of_other_architectures(kascade, save_model, tmp_path, family):
    path = tmp_path / "c.h5"
    options = ["--dtype", "bfloat16", "--decode-tokens", "2", "--tile", "16"]
    code, out, err = kascade("profile", save_model(family), "-o", path, "--json", *options, *SMALL)
    assert code == 0, err
    with open_capture(path) as capture:
        assert capture.meta["dtype"] == "bfloat16"
        assert capture.profiled_layers == ([1, 3] if family == "Gemma3Text" else [0, 1, 2])
        for prompt in capture:
            assert set(prompt.tiles[:, 1].tolist()) == {16, 1}
            assert prompt.n_tokens - prompt.n_prompt_tokens <= 2
            for t in range(len(prompt.tiles)):
                np.testing.assert_allclose(prompt.read_tile(t).astype(np.float64).sum(-1), 1, atol=5e-3)
    assert len(json.loads(out)["layers"]) == len(capture.profiled_layers)


def test_text_sources(kascade, tmp_path):
    words = "@ k1 v1 v2 " * 60
    (tmp_path / "texts").mkdir()
    for index in range(3):
        (tmp_path / "texts" / f"{index}.txt").write_text(f"# k{index} " + words)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"body": f"# k{i} " + words}) + "\n" for i in range(3)))
    for source, more in ((tmp_path / "texts", []), (tmp_path / "d.jsonl", ["--text-field", "body"])):
        path = tmp_path / "c.h5"
        code, _, err = kascade(
            "profile", "demo-small", "-o", path, "--dev-set", source, *more, *SMALL, "--overwrite", "--num-prompts", 5
        )
        assert code == 0, err
        assert "3 prompts, fewer than the 5 asked for" in " ".join(err.split())
        with open_capture(path) as capture:
            assert capture.meta["dev_set_name"] == str(source)
    code, _, err = kascade(
        "profile", "demo-small", "-o", path, "--dev-set", tmp_path / "texts", "--text-field", "body", "--overwrite"
    )
    assert code == 2
    assert "plain text without fields: leave --text-field out" in err
    code, _, err = kascade("profile", "demo-small", "-o", path, "--dev-set", tmp_path / "d.jsonl", "--overwrite")
    assert code == 1
    assert "--text-field" in err


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--tile", "1"], 2, "--tile must be at least 2"),
        (["--tiles-per-prompt", "0"], 2, "--tiles-per-prompt must be at least 1"),
        (["--tiles-per-prompt", "many"], 2, "a number or 'all', not 'many'"),
        (["--decode-tokens", "-1"], 2, "--decode-tokens cannot be negative"),
        (["--max-length", "long"], 2, "--max-length: 'long' is not a size"),
        (["--max-length", "8k"], 2, "demo-small takes 4096 tokens: pass --max-length 4096 or less"),
        (["--max-length", "4k", "--decode-tokens", "9"], 2, "9 of them are to be generated: pass --max-length 4087"),
        (["--max-length", "999m"], 2, "--max-length: 999m is too much: the most is 16m"),
        (["--max-length", "16m"], 2, "demo-small takes 4096 tokens: pass --max-length 4096 or less"),
        (["--decode-tokens", "5000"], 2, "leaves no room: demo-small takes 4096 tokens"),
        (["--max-length", "1k", "--decode-tokens", "9999999"], 2, "leaves no room: demo-small takes 4096 tokens"),
        (["--decode-tokens", "1" + "0" * 20], 2, "--decode-tokens"),
        (["--tile", "1" + "0" * 20], 2, "--tile"),
        (["--seed", "1" + "0" * 23], 2, "--seed"),
        (["--num-prompts", "1" + "0" * 20], 2, "--num-prompts"),
        (["--tiles-per-prompt", "1" + "0" * 20], 2, "is too many: pass 'all'"),
        (["--tiles-per-prompt", "9" * 5000], 2, "a number or 'all', not '9999"),
        (["--device", "meta"], 2, "device 'meta' holds no data"),
        (["--device", "meta:0"], 2, "device 'meta' holds no data"),
        (["--dev-set", "x" * 300], 2, "too long for a name"),
        (["-o", "x" * 300], 2, "too long for a name"),
        (["-o", "x\udcff.h5"], 2, "'x?.h5' is not valid UTF-8"),
        (["--dev-set", "x\udcff"], 2, "'x?' is not valid UTF-8"),
        (["--text-field", "x\udcff"], 2, "'x?' is not valid UTF-8"),
        (["--dtype", "int8"], 2, "dtype 'int8'"),
        (["--device", "cuda:99"], 2, "cuda:99"),
        (["--dev-set", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["--dev-set", ""], 1, "no dev set ''"),
        (["--chat-template"], 2, "the built-in task 'pairs' is plain text: leave --chat-template out"),
        (["--num-prompts", "0"], 2, "num-prompts"),
        (["--resume", "--overwrite"], 2, "pass one of them"),
        (["--max-length", "5"], 1, "5 tokens cannot hold the task 'pairs': take at least 17"),
        (["--text-field", "body"], 2, "the built-in task 'pairs' is plain text without fields: leave"),
        (["--dev-set", "hops", "--text-field", "body"], 2, "the built-in task 'hops' is plain text"),
        (["--revision", "main"], 2, "demo-small is shipped with the package and has no revisions"),
        (["-o", "missing-folder/c.h5"], 2, "missing-folder does not exist"),
        (["-o", "."], 2, "is a folder"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(kascade, tmp_path, monkeypatch, arguments, code, line):
    monkeypatch.chdir(tmp_path)
    got, out, err = kascade("profile", "demo-small", *arguments)
    assert got == code, err
    assert out == ""
    errors = [text for text in err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert line in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_numbers(kascade, save_model, tmp_path):
    folder = save_model("Llama")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code, out, err = kascade("profile", folder, "-o", tmp_path / "c.h5", *SMALL)
    assert (code, out) == (1, "")
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in err
    assert not (tmp_path / "c.h5").exists()


def test_a_disk_that_is_too_small_is_told_before_the_work(kascade, tmp_path, monkeypatch):
    from kascade_cli.capture import store

    monkeypatch.setattr(store, "disk_free", lambda path: 1000)
    code, _, err = kascade("profile", "demo-small", "-o", tmp_path / "c.h5", *SMALL)
    assert code == 1
    assert "the disk has 1.0 kB left" in err
    assert not (tmp_path / "c.h5").exists()
    # What is stored already needs no more room.
    monkeypatch.undo()
    assert kascade("profile", "demo-small", "-o", tmp_path / "c.h5", *SMALL)[0] == 0
    monkeypatch.setattr(store, "disk_free", lambda path: 100_000)
    monkeypatch.setattr(store, "stored_bytes", lambda path: 10**6)
    assert kascade("profile", "demo-small", "-o", tmp_path / "c.h5", "--resume", *SMALL)[0] == 0


def test_all_tiles(kascade, tmp_path):
    path = tmp_path / "c.h5"
    assert kascade("profile", "demo-small", "-o", path, *SMALL, "--tiles-per-prompt", "all")[0] == 0
    with open_capture(path) as capture:
        for prompt in capture:
            prefill = prompt.tiles[prompt.tiles[:, 1] > 1]
            assert prefill[:, 0].tolist() == list(range(0, prompt.n_tokens - 1, 32))
            # The tiles together are all queries: their mean is the mean of the whole attention.
            assert prefill[:, 1].sum() in (prompt.n_tokens, prompt.n_tokens - 1)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom kascade_cli.app import main\n"
        "try:\n    main(['profile', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'h5py', 'numpy')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0
    assert "--tiles-per-prompt" in run.stdout


def test_random_models_are_really_random():
    """The fixtures would hide mistakes if attention were uniform."""
    model = make_model("Llama", vocab_size=512)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(torch.arange(3, 99)[None], output_attentions=True).attentions
    assert torch.stack(attention)[:, 0, :, -1].max(-1).values.mean() > 5 / 96


def test_a_dangling_link_is_no_place_for_a_capture(kascade, tmp_path, monkeypatch):
    monkeypatch.setattr("kascade_cli.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    link = tmp_path / "c.h5"
    link.symlink_to(tmp_path / "elsewhere.h5")
    for more in ([], ["--resume"]):
        code, _, err = kascade("profile", "demo-small", "-o", link, *SMALL, *more)
        assert code == 2
        assert "c.h5 is a link to a file that is not there; pass --overwrite" in err
        assert link.is_symlink()


@pytest.mark.parametrize("stage", ["loading", "first prompt", "second prompt", "resumed"])
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(kascade, tmp_path, monkeypatch, stage):
    from kascade_cli import models
    from kascade_cli.capture import loop

    path, real, calls = tmp_path / "c.h5", loop._capture_prompt, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == (1 if stage == "first prompt" else 2):
            raise KeyboardInterrupt
        return real(*arguments)

    def stop(*_, **__):
        raise KeyboardInterrupt

    if stage in ("loading", "resumed"):
        load = models.load_model
        monkeypatch.setattr(models, "load_model", stop)
    if stage in ("second prompt", "resumed", "first prompt"):
        monkeypatch.setattr(loop, "_capture_prompt", interrupted)
    if stage == "resumed":
        monkeypatch.setattr(models, "load_model", load)
        assert kascade("profile", "demo-small", "-o", path, *SMALL)[0] == 130
        monkeypatch.setattr(models, "load_model", stop)
    code, out, err = kascade(
        "profile", "demo-small", "-o", path, *SMALL, *(["--resume"] if stage == "resumed" else [])
    )
    assert (code, out) == (130, "")
    kept = stage in ("second prompt", "resumed")
    assert ("the finished prompts are in " in err) == kept
    assert ("go on with --resume" in err) == kept
    assert ("nothing was written" in err) == (stage == "first prompt")
    assert path.exists() == kept
    monkeypatch.undo()
    if kept:
        assert kascade("profile", "demo-small", "-o", path, *SMALL, "--resume")[0] == 0


def test_names_from_outside_reach_the_terminal_as_text(kascade, tmp_path):
    """Markup, emoji codes and escape sequences in the dev set's name and the output's."""
    words = "@ k1 v1 v2 " * 60
    source = tmp_path / "a[/b]:smile:\x1b[31m.jsonl"
    path = tmp_path / "[red]c[/x]\x1b]0;t\x07.h5"
    for folder in (source.parent, path.parent):
        folder.mkdir()
    source.write_text("".join(json.dumps({"text": f"# k{i} " + words}) + "\n" for i in range(2)))
    code, out, err = kascade("profile", "demo-small", "-o", path, "--dev-set", source, *SMALL)
    assert code == 0, err
    assert path.exists()
    assert "[red]c[/x].h5: 2 prompts" in out
    assert "a[/b]:smile:.jsonl" in err
    assert "\x1b" not in out + err
