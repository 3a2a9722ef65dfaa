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
    return model_class(config_class(**sizes | heads | options))


SMALL_INDEXER = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "n_routed_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
INDEXER = "chooses its keys with an indexer of its own"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(tf.Gemma2Config, tf.Gemma2ForCausalLM, head_dim=16), "soft-capping"),
        (lambda: tiny(tf.GptOssConfig, tf.GptOssForCausalLM, head_dim=16, num_local_experts=2), "attention sinks"),
        (
            lambda: tiny(tf.MistralConfig, tf.MistralForCausalLM, sliding_window=8),
            "every attention layer uses a sliding window; there is no full attention",
        ),
        (
            lambda: tiny(tf.FalconH1Config, tf.FalconH1ForCausalLM, head_dim=16, mamba_d_ssm=32, mamba_n_heads=4),
            "every layer mixes attention with a state-space block",
        ),
        (lambda: tiny(tf.DeepseekV32Config, tf.DeepseekV32ForCausalLM, **SMALL_INDEXER), INDEXER),
        (lambda: tiny(tf.GlmMoeDsaConfig, tf.GlmMoeDsaForCausalLM, **SMALL_INDEXER), INDEXER),
        (lambda: tiny(tf.DiffLlamaConfig, tf.DiffLlamaForCausalLM, num_key_value_heads=2), "differential attention"),
        (lambda: tiny(tf.DogeConfig, tf.DogeForCausalLM), "a mask made of the keys' content"),
    ],
)
def test_attention_that_cannot_run_is_refused_with_its_reason(make, message, tmp_path):
    """By `describe`, and by `load_model` before it reads (or misses) a single weight."""
    model = make()
    with pytest.raises(KascadeError, match=message) as described:
        describe(model, "m")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "m")
    with pytest.raises(KascadeError, match=message) as loaded:
        load_model(str(tmp_path / "m"), device="cpu")
    assert str(loaded.value).removeprefix(str(tmp_path / "m")) == str(described.value).removeprefix("m")


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


def test_a_repository_of_gguf_files_is_told_what_to_name():
    """As transformers words it, with the file it misses."""
    from kascade_cli.models.checks import loading_problem

    said = "org/M-GGUF does not appear to have a file named config.json. Checkout 'https://huggingface.co/org/M-GGUF'"
    assert loading_problem("org/M-GGUF", "org/M-GGUF", OSError(said)) == (
        "org/M-GGUF: a repository of GGUF files; download one (hf download org/M-GGUF FILE.gguf) and name the file"
    )
    assert "cannot load org/M: " in loading_problem("org/M", "org/M", OSError(said))


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


@pytest.fixture
def folder(tmp_path):
    """A copy of the small demo model, to be damaged."""
    return shutil.copytree(DEMO_MODELS["demo-small"], tmp_path / "model")


@pytest.mark.parametrize("lost", [1, 5])
def test_a_checkpoint_that_lacks_weights_is_refused_with_their_names(folder, lost):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    names = [f"model.layers.{index}.self_attn.q_proj.weight" for index in range(lost)]
    for name in names:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KascadeError) as error:
        load_model(str(folder), device="cpu")
    more = " and 2 more" if lost == 5 else ""
    assert str(error.value) == (
        f"{folder}: the checkpoint lacks {', '.join(names[:3])}{more}; it is damaged or not complete"
    )


def test_tied_weights_are_not_missed(folder):
    model, _ = load_model(str(folder), device="cpu")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    from safetensors.torch import load_file

    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded, _ = load_model(str(folder), device="cpu")
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_code_of_a_models_own_is_refused_with_the_flag(folder):
    import json

    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    config["model_type"] = "own"
    (folder / "config.json").write_text(json.dumps(config))
    for read in (load_config, load_model):
        with pytest.raises(KascadeError, match="code of its own.*pass --trust-remote-code") as error:
            read(str(folder))
        assert "trust_remote_code" not in str(error.value)


def test_loading_says_what_was_loaded():
    said = []
    model, _ = load_model("demo-small", device="cpu", dtype="float32", notify=said.append)
    megabytes = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6
    assert said == [f"demo-small: float32, weights: {megabytes:.1f} MB on cpu"]


def test_weights_go_straight_to_where_they_run(monkeypatch):
    """With accelerate, transformers gets the device; without, the model is moved afterwards."""
    from kascade_cli.models import placement

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(placement, "resolve_device", lambda device: gpu)
    for installed, expected in ((object(), ({"": gpu}, None)), (None, (None, gpu))):
        monkeypatch.setattr(placement, "find_spec", lambda name, installed=installed: installed)
        assert placement.placement("cuda", None) == expected
        assert placement.placement("cpu", None) == (None, torch.device("cpu"))


def test_device_maps(monkeypatch):
    from kascade_cli.models import placement

    with pytest.raises(UsageError, match="'balanced' is not known; use --device-map auto"):
        load_model("demo-small", device_map="balanced")
    with pytest.raises(UsageError, match="leave --device out"):
        load_model("demo-small", device="cpu", device_map="auto")
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(KascadeError, match="--device-map needs accelerate: pip install"):
        load_model("demo-small", device_map="auto")


def test_accelerate_places_the_layers():
    pytest.importorskip("accelerate")
    model, _ = load_model("demo-small", device_map="auto")
    plain, _ = load_model("demo-small", device="cpu")
    assert fingerprint(model) == fingerprint(plain)
    ids = torch.arange(5, 25, device=model.device)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.cpu().float(), plain(ids.cpu()).logits.float(), atol=0.1, rtol=0)


def test_options():
    for device in ("meta", "meta:0"):
        with pytest.raises(UsageError, match="'meta' holds no weights"):
            resolve_device(device)
    assert resolve_dtype("bf16") is torch.bfloat16
    with pytest.raises(UsageError, match="dtype 'int8'"):
        resolve_dtype("int8")
    with pytest.raises(UsageError, match="device 'nope'"):
        resolve_device("nope")
