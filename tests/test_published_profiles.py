"""profiles/ of the paper's models: made by their script, and they run on models of that geometry, and only there."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from kascade_cli import attach
from kascade_cli.errors import KascadeError
from kascade_cli.schema import Profile

ROOT = Path(__file__).parents[1]
# Published in the paper (section 4.1), and the models' config.json.
GEOMETRY = {
    "llama-3.1-8b-instruct": ("meta-llama/Llama-3.1-8B-Instruct", 32, [0, 2, 8, 13, 14]),
    "deepseek-r1-distill-llama-8b": ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 32, [0, 2, 8, 13, 14]),
    "qwen3-8b": ("Qwen/Qwen3-8B", 36, [0, 2, 7, 14, 23]),
}


def tiny(name, layers, heads=32):
    """The real layers and heads over 32 hidden units: half a second instead of 16 GB."""
    kind = tf.Qwen3Config if name.startswith("qwen") else tf.LlamaConfig
    config = kind(
        vocab_size=64, hidden_size=32, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=512, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("name", GEOMETRY)
def test_it_holds_what_was_published(name):
    title, layers, anchors = GEOMETRY[name]
    profile = Profile.load(ROOT / "profiles" / f"{name}.yaml")
    card = profile.model
    assert (card.name, card.fingerprint, profile.anchors) == (title, None, anchors)
    assert (card.layers, card.query_heads, card.kv_heads, card.head_dim) == (layers, 32, 8, 128)
    assert "2512.16391" in profile.selection["why"]
    assert f"--anchors {','.join(map(str, anchors))}" in profile.selection["head_maps"]


@pytest.mark.parametrize("name", ["llama-3.1-8b-instruct", "qwen3-8b"])
def test_it_runs_pooled_on_a_model_of_the_geometry(name):
    _, layers, anchors = GEOMETRY[name]
    profile = Profile.load(ROOT / "profiles" / f"{name}.yaml")
    model, ids = tiny(name, layers), torch.randint(3, 64, (1, 70), generator=torch.Generator().manual_seed(1))
    logits = {}
    for strategy in ("dense", "kascade", "kascade-pooled"):
        with torch.no_grad(), attach(model, profile, strategy=strategy, min_keys=8) as attachment:
            logits[strategy] = model(ids, use_cache=False).logits
            report = attachment.report()
        if strategy == "kascade":
            assert report["head_maps"] == "not measured: pooled"
            assert report["roles"]["anchor"] == anchors[1:]
            assert len(report["roles"]["reuse"]) == layers - len(anchors)
    torch.testing.assert_close(logits["kascade"], logits["kascade-pooled"])
    assert not torch.allclose(logits["kascade"], logits["dense"])


def test_other_geometries_are_refused():
    profile = Profile.load(ROOT / "profiles" / "qwen3-8b.yaml")
    with pytest.raises(KascadeError, match="^the profile is for Qwen/Qwen3-8B with 36 layers; .* has 3$"):
        attach(tiny("qwen3-8b", 3), profile)


def test_a_changed_file_is_seen(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("published_profiles", ROOT / "scripts" / "published_profiles.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["published_profiles.py", "--folder", str(tmp_path), *arguments])
        return script.main()

    assert run("--check") == 1  # nothing there
    assert run() == run("--check") == 0
    for name in GEOMETRY:
        made = (tmp_path / f"{name}.yaml").read_bytes()
        assert made == (ROOT / "profiles" / f"{name}.yaml").read_bytes()
    target = tmp_path / "qwen3-8b.yaml"
    target.write_text(target.read_text().replace("anchor: 2}", "anchor: 0}"))
    capsys.readouterr()
    assert run("--check") == 1
    assert capsys.readouterr().err.count("qwen3-8b.yaml") == 1
