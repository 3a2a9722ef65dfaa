"""Loading and describing models: what is refused, and what identifies a model."""

import shutil
import threading
import time

import pytest
import torch
import transformers as tf

from kascade_cli.demo import DEMO_MODELS
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.models import (
    decoder_layers,
    describe,
    fingerprint,
    load_config,
    load_model,
    resolve_device,
    resolve_dtype,
)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_geometry(make_tiny_model, kind):
    model = make_tiny_model(kind)
    info = describe(model, kind)
    head_dim = 12 if kind == "qwen3" else 8
    assert (info.name, info.layers, info.query_heads, info.kv_heads, info.head_dim) == (kind, 4, 4, 2, head_dim)
    assert info.profiled_layers == [0, 1, 2, 3]
    assert info.max_positions == 1024
    assert [model.model.layers[i] for i in range(4)] == list(decoder_layers(model).values())


def test_hybrid_models_list_their_full_layers(make_tiny_model):
    assert describe(make_tiny_model("gemma3", layers=6)).profiled_layers == [1, 3, 5]


def test_fingerprint_knows_weights_and_not_dtype(make_tiny_model):
    model = make_tiny_model("llama").float()
    mark = fingerprint(model)
    assert fingerprint(make_tiny_model("llama").float()) == mark
    assert fingerprint(make_tiny_model("llama", seed=1).float()) != mark
    assert fingerprint(make_tiny_model("llama").bfloat16()) == mark
    with torch.no_grad():
        model.model.layers[3].self_attn.v_proj.weight[0, 0] += 1
    assert fingerprint(model) != mark


def tiny(config_class, model_class, **options):
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return model_class(config_class(**sizes, **heads, **options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(tf.Gemma2Config, tf.Gemma2ForCausalLM, head_dim=16), "soft-capping"),
        (lambda: tiny(tf.GptOssConfig, tf.GptOssForCausalLM, head_dim=16, num_local_experts=2), "attention sinks"),
        (
            lambda: tiny(tf.MistralConfig, tf.MistralForCausalLM, sliding_window=8),
            "every attention layer uses a sliding",
        ),
    ],
)
def test_attention_that_cannot_run_is_refused(make, message):
    with pytest.raises(KascadeError, match=message):
        describe(make(), "m")


def test_loading_the_demo_models():
    model, tokenizer = load_model("demo-small", device="cpu", dtype="float32")
    assert describe(model).name == "demo-small"
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer("k1 v2").input_ids[-1] == tokenizer.convert_tokens_to_ids("v2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "name is empty"),
        ("/no/such/folder", "no such folder"),
        ("some-org/no-such-model", "cannot load some-org/no-such-model"),
    ],
)
def test_missing_models(name, message):
    with pytest.raises(KascadeError, match=message) as error:
        load_model(name, device="cpu")
    assert "\n" not in str(error.value)


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine that knows no model: it answers after `hub.delay` seconds and counts `hub.requests`."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from huggingface_hub import constants

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            server.requests += 1
            time.sleep(server.delay)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.delay = 0, 0.0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_that_cannot_be_reached_is_told_quickly(hub, monkeypatch):
    hub.shutdown()
    hub.server_close()
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for read in (load_config, load_model):
        with pytest.raises(KascadeError) as error:
            read("some-org/no-such-model")
        assert str(error.value) == (
            "cannot load some-org/no-such-model: no such folder, and the hub cannot be reached to look there"
        )
    assert sum(waited) <= 2
    assert hub.requests == 0


def test_a_slow_hub_and_one_that_answers_are_left_to_the_loading(hub):
    hub.delay = 1.5
    with pytest.raises(KascadeError) as error:
        load_config("some-org/no-such-model")
    assert "not a valid model identifier" in str(error.value)
    assert hub.requests > 1


def test_nothing_is_asked_of_the_hub_for_local_models(hub, tmp_path):
    assert load_config("demo").num_hidden_layers == 16
    with pytest.raises(KascadeError, match=r"no config\.json"):
        load_config(str(tmp_path))
    with pytest.raises(KascadeError, match="no such folder"):
        load_config("/no/such/folder")
    assert hub.requests == 0


def test_folders_that_hold_no_causal_model(tmp_path):
    with pytest.raises(KascadeError, match=r"no config\.json"):
        load_model(str(tmp_path), device="cpu")
    tf.BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path / "bert")
    with pytest.raises(KascadeError, match="not a causal language model"):
        load_model(str(tmp_path / "bert"), device="cpu")
    # a BERT that says nothing of its class, and one saved as its own causal class but still an encoder
    for architectures in (None, ["BertLMHeadModel"]):
        tf.BertConfig(architectures=architectures).save_pretrained(tmp_path / "bert")
        with pytest.raises(KascadeError, match="not a causal language model"):
            load_model(str(tmp_path / "bert"), device="cpu")
    tf.T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    with pytest.raises(KascadeError, match="encoder-decoder"):
        load_model(str(tmp_path / "t5"), device="cpu")


def test_a_revision_of_a_model_that_is_not_on_the_hub(tmp_path):
    shutil.copytree(DEMO_MODELS["demo-small"], tmp_path / "model")
    for name in ("demo", "demo-small", str(tmp_path / "model")):
        with pytest.raises(UsageError, match="--revision") as error:
            load_model(name, device="cpu", revision="main")
        assert str(error.value).startswith(name)
    with pytest.raises(KascadeError, match="cannot load some-org/no-such-model"):
        load_model("some-org/no-such-model", device="cpu", revision="main")


def test_folders_that_cannot_be_used(tmp_path):
    tiny(tf.Gemma2Config, tf.Gemma2ForCausalLM, head_dim=16).save_pretrained(tmp_path / "gemma2")
    with pytest.raises(KascadeError, match="soft-capping is not supported"):
        load_model(str(tmp_path / "gemma2"), device="cpu")
    tiny(tf.LlamaConfig, tf.LlamaForCausalLM).save_pretrained(tmp_path / "bare")
    with pytest.raises(KascadeError, match=r"bare: no tokenizer that can be read"):
        load_model(str(tmp_path / "bare"), device="cpu")
    (tmp_path / "file").write_text("hello")
    with pytest.raises(KascadeError, match=r"file: a file; name the folder"):
        load_model(str(tmp_path / "file"), device="cpu")


def test_damaged_weights_are_named(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODELS["demo-small"], folder)
    model, _ = load_model(str(folder), device="cpu")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(KascadeError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN"):
        load_model(str(folder), device="cpu")
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(KascadeError) as error:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(error.value)


def test_options():
    assert resolve_dtype("bf16") is torch.bfloat16
    with pytest.raises(UsageError, match="dtype 'int8'"):
        resolve_dtype("int8")
    with pytest.raises(UsageError, match="device 'nope'"):
        resolve_device("nope")
