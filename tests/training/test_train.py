import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import train
from export import build_tokenizer, scale_queries
from recipes import RECIPES
from transformers import AutoModelForCausalLM, AutoTokenizer

from kascade_cli.demo import DEMO_MODELS
from kascade_cli.errors import UsageError
from tests.training.conftest import SCRIPTS

RUN = ["--model", "tiny", "--steps", "60", "--device", "cpu", "--threads", "1"]


def children(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(p) for p in listed.stdout.split()]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    train.main([*RUN, "--out", str(out), "--workers", "0"])
    return out


def test_killed_and_resumed_gives_the_very_same_model(finished, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(SCRIPTS / "train.py"), *RUN, "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--workers", "1", "--checkpoint-seconds", "0"], stderr=subprocess.PIPE, text=True
    )
    checkpoint = out / "checkpoint.pt"
    while not checkpoint.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    at = torch.load(checkpoint, weights_only=True)["state"]["step"]
    assert 0 < at < 60
    train.main([*RUN, "--out", str(out), "--workers", "0", "--resume"])
    resumed, whole = (o / "model" / "model.safetensors" for o in (out, finished))
    assert resumed.read_bytes() == whole.read_bytes()
    record = json.loads((out / "train.json").read_text())
    assert (record["steps"], record["tokens"]) == (
        60,
        json.loads((finished / "train.json").read_text())["tokens"],
    )
    # The data processes of the killed run are gone too.
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers
    assert not any(alive(pid) for pid in workers)


def test_the_loss_falls_and_all_phases_are_seen(finished):
    log = json.loads((finished / "train.json").read_text())["log"]
    assert log[-1]["stage"] == "mixed"
    assert log[-1]["loss"] < 6.0  # log(512) = 6.24


def test_the_result_loads_like_a_shipped_model(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert model.dtype == torch.bfloat16
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    ids = tokenizer("? k1", return_tensors="pt")
    assert ids.input_ids.tolist() == [[1, 6, 17]]
    assert model(**ids).logits.shape == (1, 3, 512)


def test_a_run_is_not_overwritten_nor_mixed_with_another(finished):
    with pytest.raises(UsageError, match="holds a run already; go on with --resume"):
        train.main([*RUN, "--out", str(finished)])
    with pytest.raises(UsageError, match="was made with --seed 0, not 1"):
        train.main([*RUN, "--out", str(finished), "--workers", "0", "--resume", "--seed", "1"])


@pytest.mark.parametrize("name", ["16l", "8l"])
def test_recipes_are_those_of_the_shipped_models(name):
    folder = DEMO_MODELS["demo" if name == "16l" else "demo-small"]
    shipped = json.loads((folder / "config.json").read_text())
    recipe = RECIPES[name]
    assert {key: shipped[key] for key in recipe.config} == recipe.config
    assert shipped["model_type"] == recipe.architecture
    built = build_tokenizer(recipe.config["max_position_embeddings"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert json.loads(built.backend_tokenizer.to_str())["model"] == tokenizer["model"]
    assert json.loads(built.backend_tokenizer.to_str())["post_processor"] == tokenizer["post_processor"]


@pytest.mark.parametrize("rows", [16, 64])
def test_muon_turns_a_gradient_into_a_scaled_orthogonal_step(rows):
    torch.manual_seed(0)
    recipe = RECIPES["16l"]
    model = torch.nn.ModuleDict({"hidden": torch.nn.Linear(32, rows, bias=False), "norm": torch.nn.LayerNorm(4)})
    muon, adamw = train.build_optimisers(model, recipe)
    weight = model["hidden"].weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight) * 1e-3
    muon.step()
    step = (before * (1 - recipe.muon_lr * 0.01) - weight.detach()) / recipe.muon_lr
    values = torch.linalg.svdvals(step) / max(1, rows / 32) ** 0.5
    assert values.min() > 0.5
    assert values.max() < 1.4
    assert sum(len(g["params"]) for g in adamw.param_groups) == 2


def test_the_curriculum_waits_for_silent_hops_until_patience_ends():
    recipe, state = RECIPES["16l"], train.State()
    state.accuracy |= {"single-hop": 0.99, "silent-two-hop": 0.75}
    train.update_curriculum(state, recipe, 0.1)
    assert state.stage == 0
    state.accuracy["silent-two-hop"] = 0.85
    train.update_curriculum(state, recipe, 0.1)
    assert (state.stage, state.accuracy["single-hop"]) == (1, 0.5)
    state.accuracy |= {"single-hop": 0.99, "silent-two-hop": 0.0}
    train.update_curriculum(state, recipe, 0.2)
    assert state.stage == 1
    train.update_curriculum(state, recipe, 0.4)
    assert state.stage == 2
    state.stage = len(recipe.stages)
    train.update_curriculum(state, recipe, 0.5)
    assert state.stage == len(recipe.stages)
    assert train.step_size(0, state, recipe, 3) == (3, *train.mixed_size(0, 3, recipe.mixed))


def test_learning_rate_warms_up_stays_and_falls():
    recipe = RECIPES["16l"]
    assert train.rate(recipe, 0, 0) == pytest.approx(1 / 60)
    assert train.rate(recipe, 100, 0.3) == 1
    assert train.rate(recipe, 1000, 0.75) == pytest.approx(0.5)
    assert train.rate(recipe, 1000, 0.999) == recipe.floor


def test_scaling_the_queries_is_scaling_the_scores():
    torch.manual_seed(0)
    model = train.build_model(RECIPES["tiny"], 0).eval()
    ids = torch.randint(0, 512, (2, 50))
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.15
    expected = model(ids).logits
    for layer in model.model.layers:
        layer.self_attn.scaling /= 0.15
    assert not torch.allclose(model(ids).logits, expected, atol=1e-4)
    scale_queries(model, 0.15)
    torch.testing.assert_close(model(ids).logits, expected)


def test_bad_arguments(tmp_path):
    with pytest.raises(UsageError, match="above 0"):
        train.parse(["--model", "8l", "--out", str(tmp_path), "--minutes", "0"])
    with pytest.raises(SystemExit):
        train.parse(["--model", "7l", "--out", str(tmp_path)])
    defaults = train.parse(["--model", "16l", "--out", str(tmp_path)])
    assert defaults.minutes == 7.6
    assert 1 <= defaults.workers <= max(1, os.cpu_count() - 1)
