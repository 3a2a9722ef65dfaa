"""profile -> select-anchors -> show -> generate on random models of several architectures, by the command line."""

import json
import shutil

import pytest

from kascade_cli import app
from kascade_cli.demo import DEMO_MODELS
from kascade_cli.models import describe
from kascade_cli.schema import Profile


def kascade(*arguments, code=0):
    with pytest.raises(SystemExit) as stop:
        app.main([str(argument) for argument in arguments])
    assert stop.value.code == code


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "phi3", "gemma3"])
def test_every_architecture(kind, make_tiny_model, tmp_path, capsys):
    model = make_tiny_model(kind, layers=6, vocab=512).float()
    info = describe(model)
    folder, capture, profile = tmp_path / "model", tmp_path / "capture.h5", tmp_path / "profile.yaml"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODELS["demo"] / name, folder)

    common = ("--device", "cpu", "--dtype", "float32")
    kascade("profile", folder, "-o", capture, "--num-prompts", 2, "--max-length", 300, "--decode-tokens", 2, *common)
    kascade(
        *("select-anchors", capture, "-o", profile, "--anchors", 2, "--min-keys", 8, "--bootstrap", 5),
        *("--verify", "--verify-prompts", 1, *common),
    )
    chosen = Profile.load(profile)
    assert chosen.attention_layers == info.profiled_layers
    assert len(chosen.anchors) == 2
    assert chosen.model.fingerprint == info.fingerprint

    kascade("show", profile)
    kascade("show", capture)
    capsys.readouterr()
    words = " ".join(f"k{i % 200} v{i % 100}" for i in range(100))
    kascade("generate", folder, "--profile", profile, "--prompt", words, "--max-new-tokens", 4, "--json", *common)
    sparse = json.loads(capsys.readouterr().out)
    kascade(
        *("generate", folder, "--profile", profile, "--prompt", words, "--max-new-tokens", 4, "--json", *common),
        *("--ratio", 1.0, "--compare", "dense"),
    )
    compared = json.loads(capsys.readouterr().out)
    dense_layers = 1 / len(info.profiled_layers)
    assert dense_layers < density(sparse) < 1
    assert density(compared) == 1  # with every key, sparse is dense: same tokens, no divergence
    assert compared["comparison"]["token_agreement"] == 1
    assert compared["comparison"]["kl_mean"] == pytest.approx(0, abs=1e-5)


def density(document):
    return document["runs"][-1]["report"]["density"]
