"""A model spread over memory and disk does what it does in one place, in every command."""

import numpy as np
import pytest
import torch

from kascade_cli.app import main
from kascade_cli.capture.run import CaptureOptions, run_capture
from kascade_cli.devset import load_devset
from kascade_cli.errors import KascadeError
from kascade_cli.evaluation.forced import DensePrompt
from kascade_cli.evaluation.run import Run, run_cases
from kascade_cli.models import describe, load_model, loading
from kascade_cli.sparse import Setting
from tests.capture.crash_points import everything
from tests.evaluation.test_sharing import CASES
from tests.integrations.transformers.naive import some_profile

pytest.importorskip("accelerate")
PARTS = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]


def spread(monkeypatch, on_disk):
    where = {part: "cpu" for part in PARTS} | {f"model.layers.{index}": "cpu" for index in range(8)}
    where |= {part: "disk" for part in where if part in on_disk}
    monkeypatch.setattr(loading, "placement", lambda device, device_map: (where, None))
    return load_model("demo-small", device_map="auto", dtype="float32")


@pytest.fixture(scope="module")
def whole():
    return load_model("demo-small", device="cpu", dtype="float32")


def captured(model, tokenizer, path):
    info = describe(model, "demo-small")
    options = CaptureOptions(num_prompts=1, max_length=128, tiles_per_prompt=4, decode_tokens=2)
    devset = load_devset("pairs", tokenizer, num_prompts=1, max_length=128, seed=0)
    run_capture(model, info, devset, path, options)
    return everything(path), info


def test_layers_on_the_disk_change_nothing(whole, monkeypatch, tmp_path):
    model, tokenizer = spread(monkeypatch, {f"model.layers.{index}" for index in (3, 5, 6)})
    assert any(parameter.is_meta for parameter in model.parameters())
    want, info = captured(*whole, tmp_path / "one.h5")
    found, same = captured(model, tokenizer, tmp_path / "two.h5")
    assert found.keys() == want.keys()
    assert all(np.array_equal(found[name], want[name]) for name in want)
    assert same.fingerprint == info.fingerprint
    profile = some_profile(info, anchors=[0, 2, 5], ratio=0.1, min_keys=4)
    setting = Setting("kascade", profile, backend="torch")
    results = []
    for each in (whole[0], model):
        with monkeypatch.context() as patched:
            patched.setattr(
                "kascade_cli.evaluation.run.score_question", lambda _, tokens, question: hash(tuple(tokens))
            )
            outcome = run_cases(each, None, CASES[:2], Run("kascade", (setting,)))
        with torch.no_grad():
            dense = DensePrompt(each, CASES[0].context, [(50, 52)], ["prefill", "decode"])
            kl = dense.compare(each, setting, dense.prefilled(each))
        results.append((outcome.right.tolist(), outcome.density, kl))
    assert results[0] == results[1]


def test_embeddings_that_fit_nowhere_are_one_line(monkeypatch):
    with pytest.raises(KascadeError, match="demo-small: not even its embeddings fit into memory here"):
        spread(monkeypatch, {"model.embed_tokens", "lm_head"})


@pytest.mark.parametrize(
    "command",
    ["profile demo-small -o c.h5", "evaluate demo-small --strategies dense",
     "generate demo-small --prompt x --strategy dense", "sweep oracle demo-small -o s.json"],
)  # fmt: skip
def test_commands_that_load_a_model_take_a_map(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--device-map", "balanced"])
    assert ended.value.code == 2
    assert "device map 'balanced' is not known; use --device-map auto" in capsys.readouterr().err
