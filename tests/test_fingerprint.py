"""A fingerprint tells models apart that attend differently, and is the same however one model is held."""

import copy
import math

import pytest
import torch
import transformers as tf

from kascade_cli.errors import KascadeError
from kascade_cli.models import attention_modules, describe, fingerprint, fingerprint_problem
from tests.conftest import tiny_model


def changed(**entries):
    """A tiny Llama whose config alone differs: the weights are equal."""
    model = tiny_model("llama").float()
    for name, value in entries.items():
        setattr(model.config, name, value)
    return fingerprint(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 20000.0}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        ("rms_norm_eps", 1e-3),
        ("hidden_act", "gelu"),
        ("sliding_window", 16),
        ("layer_types", ["full_attention", "sliding_attention"] * 2),
        ("attention_multiplier", 0.5),
        ("residual_multiplier", 0.22),
        ("embedding_multiplier", 12.0),
        ("scale_depth", 1.4),
        ("attn_logit_softcapping", 50.0),
        ("attention_bias", True),
        ("head_dim", 16),
        ("num_attention_heads", 8),
        ("max_position_embeddings", 2048),
        ("time_step_limit", (0.0, math.inf)),
    ],
)
def test_configuration_that_shapes_attention_counts(name, value):
    assert changed(**{name: value}) != changed()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("architectures", ["Other"]),
        ("_name_or_path", "/elsewhere"),
        ("name_or_path", "/elsewhere"),
        ("use_cache", False),
        ("dtype", torch.float16),
        ("transformers_version", "9.9"),
        ("eos_token_id", [2, 7]),
        ("pad_token_id", None),
        ("attention_dropout", 0.5),
        ("initializer_range", 1.0),
        ("output_attentions", False),
        ("_attn_implementation", "eager"),
        ("id2label", {0: "A", 1: "B"}),
    ],
)
def test_configuration_that_changes_no_activation_does_not(name, value):
    assert changed(**{name: value}) == changed()


def test_a_default_that_is_written_down_is_that_default():
    """A release of transformers that adds an option with a default does not change what is identified."""
    config = tf.LlamaConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=8)
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config)
    before = fingerprint(model)
    config.__dict__.pop("mlp_bias")  # as a config of another release, which does not know it
    assert fingerprint(model) == before


@pytest.mark.parametrize("position", [(0, 0), (47, 31), (20, 7)])
def test_every_element_of_a_small_tensor_counts(position):
    model = tiny_model("llama").float()
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[position] += 1
    assert fingerprint(model) != before


def test_the_sample_of_a_large_tensor_is_spread_over_all_of_it():
    """No block of 1/1000 of a tensor and no column can change unnoticed."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=2, vocab_size=1024
        )
    )
    before = fingerprint(model)
    weight = model.model.layers[0].mlp.up_proj.weight.detach()  # [512, 256]: 32 times the sample
    kept = weight.clone()
    for change in (slice(0, 131), slice(65_000, 65_131), slice(131_072 - 131, None)):
        weight.view(-1)[change] += 1
        assert fingerprint(model) != before
        weight.copy_(kept)
    for column in (0, 1, 100, 255):
        weight[:, column] += 1
        assert fingerprint(model) != before
        weight.copy_(kept)
    assert fingerprint(model) == before


def test_persistent_buffers_count():
    model = tiny_model("llama").float()
    before = fingerprint(model)
    model.model.layers[0].register_buffer("scratch", torch.ones(3), persistent=False)
    assert fingerprint(model) == before
    model.model.layers[0].register_buffer("correction", torch.ones(3))  # as DeepSeek-V3's router
    assert fingerprint(model) != before


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16])
def test_a_checkpoint_has_one_fingerprint_in_every_dtype(saved):
    model = tiny_model("qwen2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[..., ::3] *= 1e-6  # subnormal in float16
    checkpoint = model.to(saved)
    found = {fingerprint(copy.deepcopy(checkpoint).to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.half)}
    assert len(found) == 1


def test_a_saved_and_loaded_model_keeps_it(tmp_path):
    for kind in ("gemma3", "phi3", "mistral"):
        model = tiny_model(kind).float()
        model.save_pretrained(tmp_path / kind)
        loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32)
        assert fingerprint(loaded) == fingerprint(model)


def test_compiled_models_keep_it():
    model = tiny_model("llama").float()
    before = fingerprint(model)
    assert fingerprint(torch.compile(model)) == before
    model.model.layers[1] = torch.compile(model.model.layers[1])
    assert fingerprint(model) == before


class _Offloaded:
    """What accelerate puts on a module whose weights are elsewhere."""

    def __init__(self, weights):
        self.weights_map = weights


@pytest.mark.parametrize("whole_block", [False, True])
def test_offloaded_weights_are_read_through_the_hook(whole_block):
    model = tiny_model("llama").float()
    before = fingerprint(model)
    layer = model.model.layers[2]
    weights = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    layer.to("meta")
    if whole_block:
        layer._hf_hook = _Offloaded(weights)
    else:
        for path, module in layer.named_modules():
            own = {name: weights[f"{path}.{name}"] for name, _ in module.named_parameters(recurse=False)}
            module._hf_hook = type("Sequential", (), {"hooks": [object(), _Offloaded(own)]})() if own else None
    assert fingerprint(model) == before


def test_offloading_by_accelerate_itself():
    accelerate = pytest.importorskip("accelerate")
    for tied in (False, True):
        torch.manual_seed(0)
        config = tf.LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
            tie_word_embeddings=tied,
        )  # fmt: skip
        model = tf.LlamaForCausalLM(config).eval()
        before = fingerprint(model)
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert any(parameter.is_meta for parameter in model.parameters())
        assert fingerprint(model) == before


def test_weights_that_are_nowhere_are_refused_in_words():
    model = tiny_model("llama").to("meta")
    with pytest.raises(KascadeError, match=r"weight model\.embed_tokens\.weight is not loaded \(it is on the meta"):
        fingerprint(model)


def test_adapters_count_when_they_are_merged():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama").float()
    before = fingerprint(model)
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, config)
    assert fingerprint(wrapped) == before == describe(wrapped, "m").fingerprint
    assert len(attention_modules(wrapped)) == 4
    assert fingerprint(torch.compile(wrapped)) == before
    wrapped.merge_adapter()
    assert fingerprint(wrapped) != before
    wrapped.unmerge_adapter()


class _Layer(torch.nn.Module):
    """A layer of PEFT's as far as names go (PEFT itself is not among the test requirements)."""

    adapter_layer_names = ("lora_A",)

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A = base, torch.nn.Linear(2, 2)


def test_layers_of_adapters_bear_the_models_names():
    model = tiny_model("llama").float()
    before = fingerprint(model)
    attention = model.model.layers[1].self_attn
    attention.q_proj = _Layer(attention.q_proj)
    assert fingerprint(model) == before
    with torch.no_grad():
        attention.q_proj.base_layer.weight += 1
    assert fingerprint(model) != before


def test_problems_are_told_in_one_line():
    info = describe(tiny_model("llama").float(), "here")
    assert info.fingerprint.startswith("v2-sha256:")
    assert fingerprint_problem(info.fingerprint, info, name="m") is None
    old = fingerprint_problem("sha256:" + "0" * 64, info, name="m")
    assert old == (
        "the profile was made by an older version of kascade, whose fingerprint left out the configuration: "
        "profile the model again"
    )
    other = fingerprint_problem("v2-sha256:" + "0" * 64, info, name="m", what="capture")
    assert other == "the capture was made for m, whose weights or configuration are not those of here"
