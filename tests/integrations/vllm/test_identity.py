"""The served model's fingerprint, from its files alone, is that of the model loaded."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kascade_cli import Profile
from kascade_cli.demo import DEMO_MODELS
from kascade_cli.errors import KascadeError
from kascade_cli.integrations.vllm import identity
from kascade_cli.models import ModelInfo, describe
from kascade_cli.sparse import Setting

from ...conftest import tiny_model
from .test_settings import DEMO


@pytest.fixture
def copied(tmp_path):
    """The demo model's folder, to be changed."""
    return shutil.copytree(DEMO_MODELS["demo"], tmp_path / "demo")


def config(folder, **more):
    model = SimpleNamespace(model=str(folder), revision=None, trust_remote_code=False, hf_overrides={})
    vars(model).update(more)
    load = SimpleNamespace(load_format=more.get("load_format", "auto"), download_dir=None)
    return SimpleNamespace(model_config=model, load_config=load)


def info(folder):
    return ModelInfo(str(folder), None, 16, 8, 2, 64, list(range(16)))


@pytest.mark.parametrize("name", ["demo", "demo-small"])
def test_of_the_shipped_models(name):
    profile = Profile.load(DEMO.with_name(f"{name}.yaml"))
    assert identity.folder_fingerprint(DEMO_MODELS[name]) == profile.model.fingerprint


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "phi3"])
def test_of_a_model_in_several_files(tmp_path, kind):
    model = tiny_model(kind).float()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert identity.folder_fingerprint(tmp_path) == describe(model).fingerprint


def test_other_weights_are_refused(copied):
    profile = Profile.load(DEMO)
    identity.check_identity(info(copied), Setting(profile=profile), config(copied))
    path = copied / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.3.mlp.up_proj.weight"] += 1
    save_file(weights, path, {"format": "pt"})
    identity._known.clear()
    with pytest.raises(KascadeError, match="weights or configuration are not those of"):
        identity.check_identity(info(copied), Setting(profile=profile), config(copied))
    identity.check_identity(info(copied), Setting(profile=profile, allow_other_weights=True), config(copied))


def test_another_configuration_is_refused(copied):
    path = copied / "config.json"
    document = json.loads(path.read_text())
    document["rope_parameters"]["rope_theta"] = 10000.0
    path.write_text(json.dumps(document))
    with pytest.raises(KascadeError, match="weights or configuration"):
        identity.check_identity(info(copied), Setting(profile=Profile.load(DEMO)), config(copied))


def test_another_geometry_is_refused_first(copied):
    small = ModelInfo("m", None, 16, 8, 4, 64, list(range(16)))
    with pytest.raises(KascadeError, match="2 kv heads; m has 4"):
        identity.check_identity(small, Setting(profile=Profile.load(DEMO)), config(copied, load_format="dummy"))


@pytest.mark.parametrize("more", [{"load_format": "dummy"}, {"hf_overrides": {"rope_theta": 1}}, {"model": "no/such"}])
def test_weights_that_cannot_be_compared_are_taken_on_trust_with_a_warning(copied, more, caplog, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    identity.check_identity(info(copied), Setting(profile=Profile.load(DEMO)), config(copied, **more))
    assert "cannot be compared" in caplog.text


def test_files_that_lack_a_weight(copied):
    path = copied / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(KascadeError, match="not loaded"):
        identity.folder_fingerprint(copied)
    path.unlink()
    torch.save({}, copied / "pytorch_model.bin")
    with pytest.raises(KascadeError, match="no safetensors"):
        identity.folder_fingerprint(copied)
